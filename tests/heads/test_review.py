"""Test ReviewKD: the fusion of levels against loops, and the start of its layers."""

import numpy as np
import torch
import torch.nn.functional as F

from distill.heads import ReviewKD
from distill.heads.review import MIDDLE, AttentionBasedFusion
from tests.reference import literal_methods as literal
from tests.support.heads import (
    batch_norm,
    check_losses,
    level_maps,
    random_outputs,
    to_numpy,
    two_level_head,
)
from tests.support.networks import built_head


def fused(block, x, coarser):
    """Return the compared map and the one for the finer level, by loops over cells."""
    inside, norm = block.inside
    x = batch_norm(norm, np.einsum("oc,nchw->nohw", to_numpy(inside.weight)[:, :, 0, 0], x))
    if coarser is not None:
        height, width = x.shape[2:]
        y = np.zeros_like(x)
        for i, j in np.ndindex(height, width):
            nearest = i * coarser.shape[2] // height, j * coarser.shape[3] // width
            y[:, :, i, j] = coarser[:, :, nearest[0], nearest[1]]
        weight = to_numpy(block.attention.weight)[:, :, 0, 0]
        logits = np.einsum("oc,nchw->nohw", weight, np.concatenate([x, y], 1))
        share = literal.expit(logits + to_numpy(block.attention.bias)[:, None, None])
        x = share[:, :1] * x + share[:, 1:] * y
    outside, norm = block.outside
    made = to_numpy(F.conv2d(torch.from_numpy(x), outside.weight, padding=1))
    return batch_norm(norm, made), x


def test_reviewkd_fuses_from_coarse_to_fine():
    head, (student, teacher) = two_level_head(ReviewKD, weight=2.0), random_outputs()
    coarser, expected = None, {}
    for name, s, t in reversed([*level_maps(head, student, teacher)]):
        assert s.shape[1] == 3  # not adapted before
        made, coarser = fused(head.fusions[name], s, coarser)
        expected[f"loss_reviewkd/{name}"] = 2 * literal.hcl([made], [t])
    check_losses(head, student, teacher, expected)


def test_reviewkds_convolutions_start_as_the_authors_have_them():
    torch.manual_seed(0)
    block = AttentionBasedFusion(16, 24, coarsest=False)
    for convolution, fan in ((block.inside[0], 16), (block.outside[0], MIDDLE * 9)):
        assert convolution.bias is None
        bound = (3 / fan) ** 0.5  # kaiming_uniform with a = 1 has gain 1
        assert 0.99 * bound < convolution.weight.abs().max() <= bound
    bound = (1 / (2 * MIDDLE)) ** 0.5  # torch's own
    assert 0.95 * bound < block.attention.weight.abs().max() <= bound
    assert block.attention.weight.shape == (2, 2 * MIDDLE, 1, 1)
    assert AttentionBasedFusion(16, 24, coarsest=True).attention is None


def test_the_coarsest_level_alone_has_nothing_to_fuse():
    head = built_head(ReviewKD, "faster")
    assert [n for n in head.fusions if head.fusions[n].attention is None] == ["p6"]

"""Test FKD: its four terms and its non-local blocks against loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill.heads import FKD
from distill.heads.fkd import NonLocal
from tests.reference import literal_methods as literal
from tests.support.heads import (
    SIZES,
    batch_norm,
    check_losses,
    level_maps,
    random_outputs,
    to_numpy,
    two_level_head,
)
from tests.support.networks import built_head


def non_local(block, x):
    """Return z = x + W(y), y by loops over images, cells and pooled cells."""
    query, key, value = (
        to_numpy(F.conv2d(torch.from_numpy(x), f.weight, f.bias))
        for f in (block.query, block.key, block.value)
    )
    stride = block.pool.kernel_size
    read = np.zeros_like(query)
    height, width = x.shape[2:]
    for n in range(len(x)):
        keys, values = [], []
        for top in range(0, height, stride):
            for left in range(0, width, stride):
                cell = (n, slice(None), slice(top, top + stride), slice(left, left + stride))
                keys.append(key[cell].max((1, 2)))
                values.append(value[cell].max((1, 2)))
        for i, j in np.ndindex(height, width):
            for k, v in zip(keys, values):
                read[n, :, i, j] += query[n, :, i, j] @ k * v / len(keys)
    convolution, norm = block.outside
    out = np.einsum("oc,nchw->nohw", to_numpy(convolution.weight)[:, :, 0, 0], read)
    out += to_numpy(convolution.bias)[:, None, None]
    return x + batch_norm(norm, out)


def length(gap):
    return np.sqrt((gap**2).sum())


@pytest.mark.parametrize("started", [False, True])
def test_fkd_is_its_four_lengths(started):
    weights = {"attention_weight": 2.0, "pooled_weight": 0.5, "relation_weight": 0.3}
    head = two_level_head(FKD, temperature=0.5, weight=3.0, **weights)
    if started:
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.3)
    student, teacher = random_outputs()
    expected = {}
    for name, s, t in level_maps(head, student, teacher):
        assert s.shape[1] == 3  # not adapted before
        own = head.compared[name]
        adapted = to_numpy(own.map(torch.from_numpy(s)))
        mask = [
            (literal.spatial_attention(a, 0.5) + literal.spatial_attention(b, 0.5)) / 2
            for a, b in zip(s, t)
        ]
        weighted = np.stack(mask).reshape(2, 1, *SIZES[name])
        attended = length(np.sqrt(weighted) * (adapted - t))
        means = s.mean((2, 3)) @ to_numpy(own.channels.weight).T + to_numpy(own.channels.bias)
        channels = length(means - t.mean((2, 3)))
        across = torch.from_numpy(s.mean(1, keepdims=True))
        cells = length(
            to_numpy(F.conv2d(across, own.cells.weight, own.cells.bias, padding=1))
            - t.mean(1, keepdims=True)
        )
        related = to_numpy(own.relation(torch.from_numpy(non_local(own.of_student, s))))
        relation = length(related - non_local(own.of_teacher, t))
        value = 2 * attended + 0.5 * (channels + cells) + 0.3 * relation
        expected[f"loss_fkd/{name}"] = 3 * value
    check_losses(head, student, teacher, expected)


def test_fkds_attended_term_is_the_literal_one():
    head = two_level_head(
        FKD, (4, 4), temperature=0.5, attention_weight=1.0, pooled_weight=0.0, relation_weight=0.0
    )
    for own in head.compared.values():
        nn.init.dirac_(own.map.weight)
        nn.init.zeros_(own.map.bias)
    student, teacher = random_outputs(4, 4)
    found = head(student, teacher)
    for name, s, t in level_maps(head, student, teacher):
        expected = literal.fkd_attention(s, t, 0.5)
        assert found[f"loss_fkd/{name}"].item() == pytest.approx(expected)


def test_fkds_non_local_block_starts_as_the_identity():
    torch.manual_seed(0)
    block, x = NonLocal(6, 4, 2), torch.randn(2, 6, 5, 7)
    assert torch.equal(block(x), x)
    nn.init.ones_(block.outside[1].weight)
    assert (block(x) - x).abs().max() > 0.1


def test_fkds_relation_of_large_maps_fits_half_precision():
    """Sums over keys would overflow before they are divided by their number."""
    block = NonLocal(2, 4, 2)
    for layer in (block.key, block.value):
        nn.init.constant_(layer.bias, 20.0)
    nn.init.ones_(block.outside[1].weight)
    with torch.autocast("cpu", torch.float16):
        out = block(torch.randn(1, 2, 64, 64))  # 1024 keys of 400
    assert out.isfinite().all()


def test_fkds_sizes_are_the_authors():
    head = built_head(FKD, "faster", teacher_channels=24)
    blocks = [head.compared[f"p{k}"].of_student for k in range(2, 7)]
    assert [x.pool.kernel_size for x in blocks] == [8, 4, 2, 2, 2]
    assert [x.query.out_channels for x in blocks] == [64, 64, 128, 128, 128]
    assert {head.compared[f"p{k}"].of_teacher.query.in_channels for k in range(2, 7)} == {24}

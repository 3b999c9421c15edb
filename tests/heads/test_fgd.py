"""Test FGD: its four terms against loops, and the context blocks."""

import numpy as np
import pytest
import torch
from torch import nn

from distill.heads import FGD
from distill.heads.fgd import GlobalContext
from distill.losses.fgd import fgd_relation, pooled
from tests.reference import literal_methods as literal
from tests.support.heads import (
    BOXES,
    PADDED_SIZE,
    check_losses,
    level_maps,
    random_outputs,
    to_numpy,
    two_level_head,
)

FACTORS = {"alpha": 2.0, "beta": 0.7, "gamma": 0.3, "lambda_": 0.05}


def with_context(block, x):
    """Return a map after its context block, by loops over images and cells."""
    down, norm, activation, up = block.transform
    assert isinstance(activation, nn.ReLU) and isinstance(norm, nn.LayerNorm)
    weight = to_numpy(block.where.weight)[0, :, 0, 0]
    result = x.copy()
    for n, image in enumerate(x):
        logits = np.einsum("chw,c->hw", image, weight)
        share = literal.softmax(logits.ravel()).reshape(logits.shape)
        context = (image * share).sum((1, 2))
        hidden = to_numpy(down.weight)[:, :, 0, 0] @ context + to_numpy(down.bias)
        hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + norm.eps)
        hidden = hidden * to_numpy(norm.weight).ravel() + to_numpy(norm.bias).ravel()
        hidden = np.maximum(hidden, 0)
        added = to_numpy(up.weight)[:, :, 0, 0] @ hidden + to_numpy(up.bias)
        result[n] += added[:, None, None]
    return result


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("channels", [(4, 4), (3, 4)])
def test_fgd_is_its_four_terms(channels, started):
    head = two_level_head(FGD, channels, weight=3.0, temperature=0.8, **FACTORS)
    if started:
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.5)
    student, teacher = random_outputs(*channels)
    expected = {}
    for name, s, t in level_maps(head, student, teacher):
        terms = literal.fgd(s, t, BOXES, PADDED_SIZE, 0.8)
        relation = literal.fgd_relation(
            *(with_context(block, x) for block, x in zip(head.contexts[name], (s, t)))
        )
        value = sum(f * x for f, x in zip(FACTORS.values(), (*terms, relation)))
        expected[f"loss_fgd/{name}"] = 3 * value
    check_losses(head, student, teacher, expected)


def test_fgds_relation_is_the_squared_distance_at_the_start():
    off = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "lambda_": 1.0}
    head, (student, teacher) = (
        two_level_head(FGD, (4, 4), temperature=0.5, **off),
        random_outputs(4, 4),
    )
    found = head(student, teacher)
    for name, s, t in level_maps(head, student, teacher):
        assert found[f"loss_fgd/{name}"].item() == pytest.approx(((s - t) ** 2).sum() / 2)


def test_fgds_blocks_are_of_each_network_and_level():
    head = two_level_head(FGD, (3, 4), temperature=0.5, **FACTORS)
    blocks = [block for pair in head.contexts.values() for block in pair]
    assert len({id(p) for block in blocks for p in block.parameters()}) == 4 * 7
    for block in blocks:
        assert block.transform[0].weight.shape == (2, 4, 1, 1)
        last = block.transform[-1]
        assert not any(x.any() for x in (last.weight, last.bias))


def test_a_context_block_starts_with_kaimings_deviation():
    torch.manual_seed(0)
    weights = torch.cat([GlobalContext(256).where.weight.flatten() for _ in range(40)])
    assert weights.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.03)  # fan in, gain √2


def test_the_gradients_of_the_relation_reach_student_and_blocks():
    teacher, *inputs = (
        torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, shape in enumerate([(2, 3, 4, 5), (2, 3, 4, 5), (3,), (3,)])
    )

    def relation(student, own, other):
        added = pooled(student, own).tanh() - pooled(teacher, other).tanh()
        return fgd_relation(student, teacher, added)

    assert torch.autograd.gradcheck(relation, [x.requires_grad_() for x in inputs])


def test_fgd_without_any_box_has_no_foreground():
    weights = {"alpha": 1.0, "beta": 0.0, "gamma": 0.0, "lambda_": 0.0}
    head = two_level_head(FGD, (4, 4), temperature=0.5, **weights)
    found = head(*random_outputs(4, 4, boxes=[[], []]))
    assert all(x == 0 for x in found.values())
    sum(found.values()).backward()
    assert all(p.grad is not None for p in head.parameters())

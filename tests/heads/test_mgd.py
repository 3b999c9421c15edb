"""Test MGD: the generated maps against the formula, and the random masks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill.heads import MGD
from tests.reference import literal_methods as literal
from tests.support.heads import (
    LEVELS,
    PADDED_SIZE,
    SIZES,
    check_losses,
    level_maps,
    random_outputs,
    to_numpy,
    two_level_head,
)
from tests.support.networks import outputs


def generated(generator, x):
    first, activation, last = generator
    assert isinstance(activation, nn.ReLU)
    assert {x.weight.shape for x in (first, last)} == {(4, 4, 3, 3)}
    hidden = F.conv2d(torch.from_numpy(x), first.weight, first.bias, padding=1).clamp(min=0)
    return to_numpy(F.conv2d(hidden, last.weight, last.bias, padding=1))


@pytest.mark.parametrize("channels", [(4, 4), (3, 4)])
def test_mgd_generates_the_teacher_from_what_is_kept_of_the_student(channels):
    head = two_level_head(MGD, channels, weight=0.5, mask_ratio=0.65, seed=7)
    student, teacher = random_outputs(*channels)
    g = torch.Generator().manual_seed(7)
    expected = {}
    for name, s, t in level_maps(head, student, teacher):
        drawn = torch.rand(2, 1, *SIZES[name], generator=g)
        keep = (drawn <= 1 - 0.65).double().numpy()
        value = literal.mgd(s, t, lambda x, n=name: generated(head.generators[n], x), keep)
        expected[f"loss_mgd/{name}"] = 0.5 * value
    check_losses(head, student, teacher, expected)


class Kept(nn.Module):
    """A generator that shows the cells it is given."""

    def forward(self, x):
        self.cells = x[:, 0] != 0
        assert torch.equal(self.cells, x[:, 1] != 0)  # all channels of a cell together
        return x


def masks(head, calls=1):
    ones = outputs(PADDED_SIZE, p3=torch.ones(4, 2, 50, 60), p4=torch.ones(4, 2, 25, 30))
    other = outputs(PADDED_SIZE, c3=ones.features["p3"], c4=ones.features["p4"])
    seen = []
    for _ in range(calls):
        head(ones, other)
        seen += [head.generators[name].cells for name in SIZES]
    return seen


def masking(ratio=0.65, seed=7):
    head = MGD(levels=LEVELS, channels=[(2, 2)] * 2, mask_ratio=ratio, seed=seed)
    for name in SIZES:
        head.generators[name] = Kept()
    return head


def test_mgds_masks_come_from_the_seed_alone():
    heads = masking(), masking()
    before = torch.get_rng_state()
    first, again = (masks(x, calls=2) for x in heads)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], first[2]) and not torch.equal(first[1], first[3])
    assert not torch.equal(first[0][0], first[0][1])  # sums over two images
    assert not torch.equal(first[0], masks(masking(seed=8))[0])


@pytest.mark.parametrize("ratio", [0.0, 0.45, 0.65, 0.75])
def test_mgd_masks_a_share_of_lambda_out(ratio):
    share = 1 - masks(masking(ratio))[0].double().mean().item()  # over 12000 cells
    assert share == pytest.approx(ratio, abs=4 * (ratio * (1 - ratio) / 12000) ** 0.5)


def test_mgds_masks_start_anew_where_the_trainer_reseeds():
    head = masking()
    first = masks(head)
    head.random.reseed(7)
    assert torch.equal(masks(head)[0], first[0])

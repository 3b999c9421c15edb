"""Test the assigners against hand-made cases and loops over boxes and priors."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from distill.nets.assign import atss_assign, nearest_point_assign
from tests.reference.assign import random_boxes, slow_atss, slow_nearest

CANVAS = 128
STRIDES = (8, 16, 32, 64)


def centres(stride: int) -> Tensor:
    """Return the (H·W, 2) centres of the cells of a level, row by row."""
    at = torch.arange(0, CANVAS, stride) + stride / 2
    return torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).flatten(0, 1)


def squares(size: float) -> list[Tensor]:
    """Return the priors of each level, ``size`` strides wide."""
    levels = []
    for stride in STRIDES:
        half = size * stride / 2
        levels.append(torch.cat([centres(stride) - half, centres(stride) + half], 1))
    return levels


def boxes_of(assigned: Tensor | Sequence[int], gt: Tensor) -> list[list[float] | None]:
    """Return the box of each prior. Identical boxes count as one."""
    return [None if i < 0 else gt[i].tolist() for i in assigned]


def scenes() -> list[Tensor]:
    """Return 50 images with no box, one, 300, identical, and a few boxes."""
    generator = torch.Generator().manual_seed(0)
    numbers = [0, 1, 300, *torch.randint(1, 8, (46,), generator=generator).tolist()]
    boxes = [random_boxes(n, generator) for n in numbers]
    return [*boxes, random_boxes(1, generator).repeat(3, 1)]


@pytest.mark.parametrize("candidates", [9, 3])
def test_atss_against_loops(candidates: int) -> None:
    levels = squares(8)
    for gt in scenes():
        got = atss_assign(levels, gt, candidates)
        assert boxes_of(got, gt) == boxes_of(slow_atss(levels, gt, candidates), gt)


def points() -> tuple[Tensor, Tensor]:
    at = [centres(stride) for stride in STRIDES]
    return torch.cat(at), torch.cat([torch.full((len(x),), float(s)) for x, s in zip(at, STRIDES)])


def test_the_nearest_point_against_loops() -> None:
    at, strides = points()
    for gt in scenes():
        got = nearest_point_assign(at, strides, gt)
        assert boxes_of(got, gt) == boxes_of(slow_nearest(at, strides, gt, 4.0), gt)


def test_atss_by_hand() -> None:
    """Two anchors of one level are candidates. The anchor that equals the box passes.

    The IoUs are 1 and 1/3: mean 2/3 and unbiased deviation √2/3. The threshold 1.14 lets none pass.
    A third candidate of IoU 0 makes the threshold 4/9 + 0.51, and the first one passes.
    """
    anchors = torch.tensor([[0.0, 0, 8, 8], [4, 0, 12, 8], [40, 0, 48, 8]])
    gt = anchors[:1]
    assert atss_assign([anchors], gt, 2).tolist() == [-1, -1, -1]
    assert atss_assign([anchors], gt, 3).tolist() == [0, -1, -1]
    assert atss_assign([anchors], gt, 9).tolist() == [0, -1, -1]  # the level has only three anchors


def test_atss_needs_the_centre_inside() -> None:
    """A box lies between the anchors' centres: all have the same IoU, but no centre is inside."""
    anchors = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8]])
    assert atss_assign([anchors], torch.tensor([[5.0, 0, 11, 8]]), 2).tolist() == [-1, -1]


def test_atss_gives_an_anchor_to_the_box_that_it_overlaps_most() -> None:
    anchors = torch.tensor([[0.0, 0, 8, 8], [40, 0, 48, 8], [80, 0, 88, 8]])
    gt = torch.tensor([[0.0, 0, 8, 6], [0, 0, 8, 7.5], [1, 1, 8, 8]])
    assert atss_assign([anchors], gt, 3).tolist() == [1, -1, -1]


def test_the_level_of_a_box() -> None:
    at, strides = points()
    for side, stride in [(4, 8), (31, 8), (63, 8), (65, 16), (127, 16), (129, 32), (4000, 64)]:
        gt = torch.tensor([[64.0, 64, 64, 64]]) + torch.tensor([-1, -1, 1, 1]) * side / 2
        chosen = nearest_point_assign(at, strides, gt + 0.1) >= 0
        assert strides[chosen].tolist() == [stride], side


def test_a_point_goes_to_the_nearer_box() -> None:
    at, strides = torch.tensor([[4.0, 4], [100, 100]]), torch.tensor([8.0, 8])
    gt = torch.tensor([[0.0, 0, 30, 30], [0, 0, 16, 16]])  # centres 15 and 8
    # In units of the boxes, the distances are 11/30·√2 and 4/16·√2.
    assert nearest_point_assign(at, strides, gt).tolist() == [1, -1]
    assert nearest_point_assign(at, strides, gt[:1], number=2).tolist() == [0, 0]


def test_nothing_to_find() -> None:
    at, strides = points()
    empty = torch.zeros(0, 4)
    assert (nearest_point_assign(at, strides, empty) == -1).all()
    assert (atss_assign(squares(8), empty) == -1).all()

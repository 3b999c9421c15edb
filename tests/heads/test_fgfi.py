"""Test FGFI: anchors by loops, and the cells near the objects against the formula."""

import numpy as np
import pytest
import torch
from torch import nn

from distill.heads import FGFI
from distill.heads.dense import AnchorGrids
from distill.structures import DenseLayout
from tests.reference import literal_methods as literal
from tests.support.heads import (
    BOXES,
    SIZES,
    check_losses,
    level_maps,
    random_outputs,
    two_level_head,
)

SIDES = {"p3": (12.0, 24.0), "p4": (30.0, 60.0)}  # sides of both anchors of a cell


def layout(offset=0.5):
    """Return a layout with two square anchors per cell on both levels."""
    cells = [torch.tensor([[-s / 2, -s / 2, s / 2, s / 2] for s in SIDES[n]]) for n in SIZES]
    return DenseLayout(False, [*SIZES], [8, 16], cells, offset, (0.4, 0.5))


def anchors_of(name, offset=0.5):
    """Return the anchors of a level (H, W, A, 4), by loops."""
    (height, width), stride = SIZES[name], 8 if name == "p3" else 16
    grid = np.zeros((height, width, 2, 4))
    for i, j, a in np.ndindex(height, width, 2):
        x, y, half = (j + offset) * stride, (i + offset) * stride, SIDES[name][a] / 2
        grid[i, j, a] = [x - half, y - half, x + half, y + half]
    return grid


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_the_grids_are_the_anchors(offset):
    for found, name in zip(AnchorGrids(layout(offset))([*SIZES.values()]), SIZES):
        np.testing.assert_array_equal(found.numpy(), anchors_of(name, offset))


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_fgfi_imitates_near_the_objects(threshold):
    """An object is compared with the anchors of both levels."""
    grids = AnchorGrids(layout())
    head = two_level_head(FGFI, grids=grids, threshold=threshold, weight=10.0)
    for adapter in head.adapters.values():
        nn.init.normal_(adapter.weight)
    student, teacher = random_outputs()
    every = np.concatenate([anchors_of(n).reshape(1, -1, 2, 4) for n in SIZES], 1)
    near = np.stack([literal.fgfi_mask(every, boxes, threshold)[0] for boxes in BOXES])
    near = dict(zip(SIZES, np.split(near, [80], axis=1)))
    assert all(0 < x[0].mean() < 1 and not x[1].any() for x in near.values())
    expected = {}
    for name, s, t in level_maps(head, student, teacher):
        mask = near[name].reshape(2, *SIZES[name])
        expected[f"loss_fgfi/{name}"] = 10 * literal.fgfi(s, t, mask)
    check_losses(head, student, teacher, expected)

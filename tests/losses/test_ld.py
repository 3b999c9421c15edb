"""The valuable localization region against loops over boxes and anchors."""

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.losses import ld_region
from tests.reference.literal_methods import vlr

STRIDES = (8, 16, 32, 64)


def squares(size: float, canvas: int = 128) -> list[Tensor]:
    """The anchors of each level, ``size`` strides wide."""
    levels = []
    for stride in STRIDES:
        at = torch.arange(0, canvas, stride) + stride / 2
        centres = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).flatten(0, 1)
        half = size * stride / 2
        levels.append(torch.cat([centres - half, centres + half], 1))
    return levels


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("number", [0, 1, 2, 9])
def test_the_region_against_loops(number: int, released: bool) -> None:
    g = torch.Generator().manual_seed(number)
    for _ in range(5):
        corner = torch.rand(number, 2, generator=g) * 100
        size = torch.rand(number, 2, generator=g) ** 2 * 100 + 3
        gt = torch.cat([corner, corner + size], 1)
        gt = gt + torch.rand(number, 1, generator=g) / 7  # off the grid
        levels = squares(8)
        found = ld_region(levels, gt, 9, released)
        own = [x.double().numpy() for x in levels]
        expected = vlr(own, gt.double().numpy(), 9, not released)
        largest = found.numpy().max(0, initial=0)
        np.testing.assert_allclose(largest, expected, atol=1e-5)
        assert (found > 0).any() == (number > 0)

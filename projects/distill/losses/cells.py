"""Rasterization of boxes on the cells of a map."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .reduce import full_precision


def padded(boxes: Sequence[Tensor]) -> Tensor:
    """Stack the boxes of each image into one tensor, padded with NaN.

    Args:
        boxes: one (Ki, 4) tensor per image.

    Returns:
        (N, K, 4) in full precision, without gradient; K is the largest Ki. Missing boxes are NaN.
        Without images (0, 0, 4).
    """
    if not boxes:
        return torch.zeros(0, 0, 4)
    return pad_sequence(
        [full_precision(x.detach()) for x in boxes], batch_first=True, padding_value=torch.nan
    )


@torch.no_grad()
def painted(
    first: Tensor, last: Tensor, value: Tensor, height: int, width: int, at_once: int = 64
) -> Tensor:
    """Return the largest value of the boxes that cover each cell, 0 where no box does.

    The literal form for one image, x and y the indices of the cells::

        for (x1, y1), (x2, y2), v in zip(first, last, value):
            inside = (x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)
            drawn[inside] = drawn[inside].clamp(min=v)

    Args:
        first, last: (N, K, 2) x, y of the first and the last cell of each box. They may lie outside
            the map. A box with NaN covers no cell.
        value: (N, K) > 0.
        height, width: size of the map in cells.
        at_once: number of boxes per image that are painted together, which bounds the memory.

    Returns:
        (N, height, width).
    """
    drawn = value.new_zeros(len(value), height, width)
    for start in range(0, value.shape[1], at_once):
        part = slice(start, start + at_once)
        inside = covered(first[:, part], last[:, part], height, width)
        part_value = value[:, part, None, None]
        drawn = torch.maximum(drawn, torch.where(inside, part_value, 0).amax(1))
    return drawn


@torch.no_grad()
def covered(first: Tensor, last: Tensor, height: int, width: int) -> Tensor:
    """Return which cells each box covers.

    Args:
        first, last: (N, K, 2) x, y as in :func:`painted`.
        height, width: size of the map in cells.

    Returns:
        (N, K, height, width) bool.
    """
    columns, rows = (torch.arange(n, device=first.device) for n in (width, height))
    a, b = first[..., None], last[..., None]
    in_x = (a[:, :, 0] <= columns) & (columns <= b[:, :, 0])
    in_y = (a[:, :, 1] <= rows) & (rows <= b[:, :, 1])
    return in_y[..., None] & in_x[:, :, None]

"""Boxes on the cells of a map."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .reduce import full_precision


def padded(boxes: Sequence[Tensor]) -> Tensor:
    """(N, K, 4) of one (Ki, 4) tensor a picture; the corners of a box that there is not are NaN."""
    if not boxes:
        return torch.zeros(0, 0, 4)
    return pad_sequence(
        [full_precision(x.detach()) for x in boxes], batch_first=True, padding_value=torch.nan
    )


@torch.no_grad()
def painted(
    first: Tensor, last: Tensor, value: Tensor, height: int, width: int, at_once: int = 64
) -> Tensor:
    """The largest value of the boxes over each cell, 0 where there is none.

    Args:
        first, last: (N, K, 2) x, y of the first and the last cell of each box, which may lie
            beyond the map; NaN: no cell.
        value: (N, K) > 0.
        height, width: of the map in cells.
        at_once: boxes of a picture that are painted together, which bounds the memory.

    Returns:
        (N, height, width).
    """
    drawn = value.new_zeros(len(value), height, width)
    for start in range(0, value.shape[1], at_once):
        part = slice(start, start + at_once)
        inside = covered(first[:, part], last[:, part], height, width)
        some = value[:, part, None, None]
        drawn = torch.maximum(drawn, torch.where(inside, some, 0).amax(1))
    return drawn


@torch.no_grad()
def covered(first: Tensor, last: Tensor, height: int, width: int) -> Tensor:
    """Which cells each box covers.

    Args:
        first, last: (N, K, 2) x, y as in :func:`painted`.
        height, width: of the map in cells.

    Returns:
        (N, K, height, width) bool.
    """
    columns, rows = (torch.arange(n, device=first.device) for n in (width, height))
    a, b = first[..., None], last[..., None]
    in_x = (a[:, :, 0] <= columns) & (columns <= b[:, :, 0])
    in_y = (a[:, :, 1] <= rows) & (rows <= b[:, :, 1])
    return in_y[..., None] & in_x[:, :, None]

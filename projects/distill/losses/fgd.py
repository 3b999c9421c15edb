"""FGD (Yang et al., "Focal and global knowledge distillation for detectors")."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .boxes import padded, painted
from .reduce import full_precision, same_shape


class FGDTerms(NamedTuple):
    """Scalars to be weighted by α, β and γ (Eq. 8, 9)."""

    foreground: Tensor
    background: Tensor
    attention: Tensor


def fgd(
    student: Tensor,
    teacher: Tensor,
    boxes: Sequence[Tensor],
    padded_size: tuple[int, int],
    temperature: float = 0.5,
) -> FGDTerms:
    """Squared errors in and outside the objects, under the teacher's attention (Eq. 6-9).

    Σ M · A^S · A^C · (S − T)² / N, with M = 1/area of the smallest box that covers a cell, or
    1/(number of background cells) where none does, and the teacher's attention A;
    attention = (Σ |A^S(S) − A^S(T)| + Σ |A^C(S) − A^C(T)|) / N. All are sums over channels and
    cells: the weights belong to a number of channels and a size of pictures.

    Args:
        student, teacher: (N, C, H, W), adapted to the same channels. No gradient reaches the
            teacher.
        boxes: one (K, 4) XYXY tensor in canvas pixels a picture.
        padded_size: (height, width) of what the maps show, padding included. The released code
            takes the picture before padding, which stretches the boxes of padded ones.
        temperature: 𝒯 > 0 of the attention.

    Raises:
        ValueError: shapes differ, there are more or fewer lists of boxes than pictures, or the
            temperature is not above 0.
    """
    student, teacher = same_shape(student, teacher.detach())
    if len(boxes) != len(student):
        raise ValueError(f"boxes of {len(boxes)} pictures do not fit maps of {len(student)}")
    batch = max(len(student), 1)
    cells, channels = fgd_attention(student, temperature)
    taught_cells, taught_channels = fgd_attention(teacher, temperature)
    with torch.autocast(student.device.type, enabled=False):  # it would halve the product
        error = torch.einsum("nchw,nc->nhw", (student - teacher).square(), taught_channels)
    error = error * taught_cells
    inside = inverse_areas(boxes, padded_size, *student.shape[2:])
    outside = (inside == 0).to(error.dtype)
    outside = outside / outside.sum((1, 2), keepdim=True).clamp(min=1)
    gaps = (cells - taught_cells).abs().sum() + (channels - taught_channels).abs().sum()
    return FGDTerms((inside * error).sum() / batch, (outside * error).sum() / batch, gaps / batch)


def fgd_attention(maps: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Where and in which channels the absolute values of a map are (Eq. 2-5).

    Args:
        maps: (N, C, H, W).
        temperature: 𝒯 > 0.

    Returns:
        cells: (N, H, W), of sum H·W in each picture.
        channels: (N, C), of sum C.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    size = full_precision(maps).abs()
    cells, channels = size.mean(1), size.mean((2, 3))
    shares = (cells.flatten(1) / temperature).softmax(1).view(cells.shape)
    return (
        shares * (maps.shape[2] * maps.shape[3]),
        (channels / temperature).softmax(1) * maps.shape[1],
    )


@torch.no_grad()
def inverse_areas(
    boxes: Sequence[Tensor], padded_size: tuple[int, int], height: int, width: int
) -> Tensor:
    """1/area of the smallest box over each cell, 0 where there is none.

    A box covers the cells from ⌊x1⌋ to ⌈x2⌉ inclusive, in cells of the map, as released; its area
    is their number, those beyond the map included.

    Args:
        boxes, canvas: as of :func:`fgd`.
        height, width: of the map in cells.

    Returns:
        (N, height, width).
    """
    corners = padded(boxes)
    sides = torch.tensor([[width, height] * 2, [*padded_size[::-1]] * 2], dtype=corners.dtype)
    cells, pixels = sides.to(corners.device, non_blocking=True)  # no scalars, which would round
    first, last = (corners * cells / pixels).split(2, 2)
    first, last = first.floor(), last.ceil()
    return painted(first, last, 1 / (last + 1 - first).prod(2), height, width)

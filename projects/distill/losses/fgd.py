"""FGD (Yang et al., "Focal and global knowledge distillation for detectors")."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .boxes import padded, painted
from .reduce import full_precision, same_shape


class FGDTerms(NamedTuple):
    """Scalars that α, β and γ weigh (Eq. 8, 9)."""

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
    """FGD's focal losses of one level: errors inside and outside the objects (Eq. 6-9).

    foreground, background = Σ M · A^S · A^C · (S − T)² / N
    attention = (Σ |A^S(S) − A^S(T)| + Σ |A^C(S) − A^C(T)|) / N

    A^S and A^C are the teacher's attention over cells and channels. In the foreground, M is 1/area
    of the smallest box that covers a cell. In the background, M is 1/(number of cells that no box
    covers). All sums run over channels and cells: suitable weights depend on the number of channels
    and the image size.

    Args:
        student, teacher: (N, C, H, W), adapted to the same channels. No gradient reaches the
            teacher.
        boxes: one (K, 4) XYXY tensor per image, in pixels of the padded image.
        padded_size: (height, width) of the padded image. The released code uses the size before
            padding, which stretches the boxes of padded images.
        temperature: 𝒯 > 0 of the attention.

    Returns:
        Three scalars >= 0; connected zeros for an empty batch.

    Raises:
        ValueError: if shapes differ, if there is not one tensor of boxes per image, or if the
            temperature is not above 0.
    """
    student, teacher = same_shape(student, teacher.detach())
    if len(boxes) != len(student):
        raise ValueError(
            f"boxes are given for {len(boxes)} images, maps for {len(student)}: pass one (K, 4) "
            "tensor of boxes per image"
        )
    batch = max(len(student), 1)
    student_cells, student_channels = fgd_attention(student, temperature)
    teacher_cells, teacher_channels = fgd_attention(teacher, temperature)
    with torch.autocast(student.device.type, enabled=False):  # keeps the product in float32
        error = torch.einsum("nchw,nc->nhw", (student - teacher).square(), teacher_channels)
    error = error * teacher_cells
    inside = inverse_areas(boxes, padded_size, *student.shape[2:])
    outside = (inside == 0).to(error.dtype)
    outside = outside / outside.sum((1, 2), keepdim=True).clamp(min=1)
    gaps = (student_cells - teacher_cells).abs().sum()
    gaps = gaps + (student_channels - teacher_channels).abs().sum()
    return FGDTerms((inside * error).sum() / batch, (outside * error).sum() / batch, gaps / batch)


def fgd_attention(maps: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """FGD's attention: a softmax of mean absolute values over the cells and channels (Eq. 2-5).

    A^S = H·W · softmax_hw(mean_c |x| / 𝒯), A^C = C · softmax_c(mean_hw |x| / 𝒯)

    Args:
        maps: (N, C, H, W).
        temperature: 𝒯 > 0.

    Returns:
        cells: (N, H, W) A^S, with sum H·W in each image.
        channels: (N, C) A^C, with sum C in each image.

    Raises:
        ValueError: if the temperature is not above 0.
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
    """Return 1/area of the smallest box over each cell, 0 where no box covers the cell.

    A box covers the cells ⌊x1⌋ to ⌈x2⌉ inclusive, with x in cells, as in the released code. Its
    area is the number of these cells, including those outside the map.

    Args:
        boxes, canvas: see :func:`fgd`.
        height, width: size of the map in cells.

    Returns:
        (N, height, width).
    """
    corners = padded(boxes)
    sides = torch.tensor([[width, height] * 2, [*padded_size[::-1]] * 2], dtype=corners.dtype)
    cells, pixels = sides.to(corners.device, non_blocking=True)  # Python scalars would round
    first, last = (corners * cells / pixels).split(2, 2)
    first, last = first.floor(), last.ceil()
    return painted(first, last, 1 / (last + 1 - first).prod(2), height, width)

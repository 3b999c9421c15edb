"""FGD (Yang et al., "Focal and global knowledge distillation for detectors")."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .boxes import padded, painted
from .reduce import full_precision, same_shape
from .squares import weighted_squares


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
    inside = inverse_areas(boxes, padded_size, *student.shape[2:])
    outside = (inside == 0).to(student.dtype)
    outside = outside / outside.sum((1, 2), keepdim=True).clamp(min=1)
    weights = torch.stack([inside, outside]) * teacher_cells
    foreground, background = weighted_squares(student, teacher, weights, teacher_channels) / batch
    gaps = (student_cells - teacher_cells).abs().sum()
    gaps = gaps + (student_channels - teacher_channels).abs().sum()
    return FGDTerms(foreground, background, gaps / batch)


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
    cells, channels = mean_sizes(full_precision(maps))
    shares = (cells.flatten(1) / temperature).softmax(1).view(cells.shape)
    return (
        shares * (maps.shape[2] * maps.shape[3]),
        (channels / temperature).softmax(1) * maps.shape[1],
    )


def mean_sizes(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean |x| of (N, C, H, W) maps over the channels, (N, H, W), and cells, (N, C)."""
    cells, channels = _MeanSizes.apply(maps)
    return cells, channels


class _MeanSizes(torch.autograd.Function):
    """The literal form, which keeps a map for each mean::

    cells, channels = maps.abs().mean(1), maps.abs().mean((2, 3))
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(maps)
        number = max(maps.shape[1], 1), max(maps.shape[2] * maps.shape[3], 1)
        cells, channels = (torch.linalg.vector_norm(maps, 1, dim) for dim in (1, (2, 3)))
        return cells / number[0], channels / number[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cells: Tensor, channels: Tensor) -> Tensor:
        (maps,) = ctx.saved_tensors
        cells, channels = cells[:, None] / maps.shape[1], channels[:, :, None, None]
        return (cells + channels / (maps.shape[2] * maps.shape[3])).mul_(maps.sign())


def fgd_relation(student: Tensor, teacher: Tensor, added: Tensor) -> Tensor:
    """FGD's global loss: Σ (S − T + δ)² / N, with δ = R(S) − S − R(T) + T (Eq. 10-12).

    Args:
        student, teacher: (N, C, H, W), adapted to the same channels. No gradient reaches the
            teacher.
        added: (N, C) δ, what the context of the student adds to each cell, less the teacher's.

    Returns:
        A scalar >= 0; a connected zero for an empty batch.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    distance: Tensor = _ShiftedSquares.apply(student, teacher, full_precision(added))
    return distance / max(len(student), 1)


class _ShiftedSquares(torch.autograd.Function):
    """Σ (S − T + δ)²."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, added: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher, added)
        gap = (student - teacher).add_(added[:, :, None, None])
        return torch.linalg.vector_norm(gap, dim=(2, 3)).square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
        student, teacher, added = ctx.saved_tensors
        result = (student - teacher).add_(added[:, :, None, None]).mul_(2 * gradient)
        return result, None, result.sum((2, 3))


def pooled(maps: Tensor, where: Tensor) -> Tensor:
    """Return the mean of a map's cells, weighted by a softmax of their projections, (N, C).

    Args:
        maps: (N, C, H, W).
        where: (C,) what the cells are projected on.
    """
    vectors: Tensor = _Pooled.apply(full_precision(maps).flatten(2), full_precision(where))
    return vectors


class _Pooled(torch.autograd.Function):
    """Σ_p share_p x_p, share = softmax_p(w · x_p), of (N, C, P) x.

    Its gradient in x is a matrix of rank 2 for each image. The literal form makes a map for each of
    its two parts::

        share = torch.einsum("c,ncp->np", where, maps).softmax(1)
        vectors = torch.einsum("np,ncp->nc", share, maps)
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, where: Tensor) -> Tensor:
        with torch.autocast(maps.device.type, enabled=False):  # keeps float32
            share = (where @ maps).softmax(1)
            ctx.save_for_backward(maps, where, share)
            return (share[:, None] @ maps.mT)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        maps, where, share = ctx.saved_tensors
        of_share = (gradient[:, None] @ maps)[:, 0]
        of_logits = share * (of_share - (share * of_share).sum(1, keepdim=True))
        of_where = (of_logits[:, None] @ maps.mT).sum((0, 1))
        if not ctx.needs_input_grad[0]:
            return None, of_where
        columns = torch.stack([gradient, where.expand_as(gradient)], 2)
        return columns @ torch.stack([share, of_logits], 1), of_where


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

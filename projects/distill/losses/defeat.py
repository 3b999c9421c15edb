"""DeFeat (Guo et al., "Distilling object detectors via decoupled features")."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .boxes import padded, painted
from .fgfi import on_cells
from .reduce import same_shape


class DeFeatTerms(NamedTuple):
    """Scalars to be weighted by α_obj and α_bg (Eq. 3)."""

    foreground: Tensor
    background: Tensor


def defeat(student: Tensor, teacher: Tensor, mask: Tensor) -> DeFeatTerms:
    """Mean squared errors in and outside the objects of one level (Eq. 3).

    Σ M (S − T)² / max(1, 2 C Σ M), and the same with 1 − M.

    Args:
        student, teacher: (N, C, H, W), the student adapted to the teacher's channels. No gradient
            reaches the teacher.
        mask: (N, H, W) M in {0, 1}, of :func:`defeat_masks`.

    Raises:
        ValueError: shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    inside = on_cells(mask, student)
    error = (student - teacher).square().sum(1)
    return DeFeatTerms(
        *(
            (m * error).sum() / (2 * student.shape[1] * m.sum()).clamp(min=1)
            for m in (inside, 1 - inside)
        )
    )


@torch.no_grad()
def defeat_masks(
    boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]], strides: Sequence[int]
) -> list[Tensor]:
    """The cells of the objects, each on the level of its size.

    An object of w x h pixels belongs to level ⌊log₂(√((w + 1)(h + 1)) / 56)⌋, clamped to the
    levels there are; it covers the cells from ⌊x1 / stride⌋ to before ⌊x2 / stride⌋, or the first
    of them where these are none, as released.

    Args:
        boxes: one (K, 4) XYXY tensor in pixels a picture.
        sizes: (height, width) of each level in cells, finest first.
        strides: of the levels in pixels.

    Returns:
        (N, height, width) in {0, 1} a level.
    """
    corners = padded(boxes)
    area = (corners[..., 2:] - corners[..., :2] + 1).prod(2)
    level = (area.sqrt() / 56 + 1e-6).log2().floor().clamp(0, len(strides) - 1)
    masks = []
    for k, (size, stride) in enumerate(zip(sizes, strides)):
        first, end = (corners / stride).trunc().split(2, 2)
        empty = (end <= first).any(2, keepdim=True)
        last = first.where(empty, end - 1)
        masks.append(painted(first, last, (level == k).to(first.dtype), *size))
    return masks

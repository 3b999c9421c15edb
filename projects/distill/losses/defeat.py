"""DeFeat (Guo et al., "Distilling object detectors via decoupled features")."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .boxes import padded, painted
from .fgfi import on_cells
from .reduce import same_shape
from .squares import weighted_squares


class DeFeatTerms(NamedTuple):
    """Scalars that α_obj and α_bg weigh (Eq. 3)."""

    foreground: Tensor
    background: Tensor


def defeat(student: Tensor, teacher: Tensor, mask: Tensor) -> DeFeatTerms:
    """DeFeat's neck losses of one level: squared errors inside and outside the objects (Eq. 3).

    foreground = Σ M (S − T)² / max(1, 2 C Σ M), summed over images, channels and cells.
    The background term has 1 − M instead of M.

    Args:
        student, teacher: (N, C, H, W), the student adapted to the teacher's channels. No gradient
            reaches the teacher.
        mask: (N, H, W) M in {0, 1}, one level of :func:`defeat_masks`.

    Returns:
        Two scalars >= 0; connected zeros where no cell counts.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    inside = on_cells(mask, student)
    masks = torch.stack([inside, 1 - inside])
    cells = masks.sum((1, 2, 3))
    errors = weighted_squares(student, teacher, masks)
    return DeFeatTerms(*(errors / (2 * student.shape[1] * cells).clamp(min=1)))


@torch.no_grad()
def defeat_masks(
    boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]], strides: Sequence[int]
) -> list[Tensor]:
    """Return DeFeat's masks of the objects, each object on the level of its size.

    An object of w x h pixels belongs to level ⌊log₂(√((w + 1)(h + 1)) / 56)⌋, clamped to the
    existing levels. It covers the cells from ⌊x1 / stride⌋ up to but not including ⌊x2 / stride⌋.
    If these are no cells, it covers the first one. All of this follows the released code.

    Args:
        boxes: one (K, 4) XYXY tensor per image, in pixels.
        sizes: (height, width) of each level in cells, finest first.
        strides: pixels per cell of each level.

    Returns:
        One (N, height, width) tensor in {0, 1} per level.
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

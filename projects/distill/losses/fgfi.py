"""FGFI (Wang et al., "Distilling object detectors with fine-grained feature imitation")."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reduce import full_precision, same_shape

AT_ONCE = 16  # boxes that are compared with all anchors together, which bounds the memory


def fgfi_mask(anchors: Tensor, boxes: Tensor, threshold: float = 0.5) -> Tensor:
    """:func:`fgfi_masks` of one picture and one level.

    Args:
        anchors: (H, W, A, 4) XYXY.
        boxes: (K, 4) XYXY.
        threshold: ψ in [0, 1].

    Returns:
        (H, W) bool.
    """
    return fgfi_masks([anchors], [boxes], threshold)[0][0]


@torch.no_grad()
def fgfi_masks(
    anchors: Sequence[Tensor], boxes: Sequence[Tensor], threshold: float = 0.5
) -> list[Tensor]:
    """Cells with an anchor that overlaps an object nearly as well as the best one does (Sec. 3.2).

    A cell is masked in where the IoU of one of its anchors with an object is above ``threshold``
    times the largest IoU of that object with all anchors, those outside the picture included.

    Args:
        anchors: (H, W, A, 4) XYXY a level; the authors have one level.
        boxes: one (K, 4) XYXY tensor a picture; a box that no anchor overlaps adds nothing.
        threshold: ψ in [0, 1].

    Returns:
        (N, H, W) bool a level.
    """
    every = torch.cat([full_precision(x).flatten(0, 2) for x in anchors])
    owner = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(x) for x in boxes]))
    owner = owner.to(every.device, non_blocking=True)
    hits = every.new_zeros(len(boxes), len(every))
    every_box = full_precision(torch.cat(list(boxes)))
    for some, pictures in zip(every_box.split(AT_ONCE), owner.split(AT_ONCE)):
        iou = pixel_iou(some, every)
        largest = iou.amax(1, keepdim=True) if len(every) else 0
        near = (iou > threshold * largest) & (iou > 0)
        hits.index_add_(0, pictures, near.to(hits.dtype))
    levels = hits.split([x[..., 0].numel() for x in anchors], 1)
    return [(y > 0).view(-1, *x.shape[:3]).any(3) for x, y in zip(anchors, levels)]


def pixel_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """(P, K) IoU of (P, 4) and (K, 4) boxes of whole pixels, whose sides are x2 − x1 + 1."""
    corner = torch.maximum(boxes[:, None, :2], others[:, :2])
    sides = (torch.minimum(boxes[:, None, 2:], others[:, 2:]) - corner + 1).clamp(min=0)
    overlap = sides.prod(2)
    own, other = ((x[:, 2:] - x[:, :2] + 1).prod(1) for x in (boxes, others))
    return overlap / (own[:, None] + other - overlap)


def fgfi(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Σ M (T − S)² / (2 Σ M), a sum over the channels (Eq. 2).

    Args:
        student, teacher: (N, C, H, W), the student adapted to the teacher's channels. No gradient
            reaches the teacher.
        mask: (N, H, W) M in {0, 1}, of :func:`fgfi_mask`.

    Returns:
        A scalar >= 0; a connected zero where no cell is masked in.

    Raises:
        ValueError: shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    weight = on_cells(mask, student)
    error = (student - teacher).square().sum(1)
    return (weight * error).sum() / (2 * weight.sum()).clamp(min=1)


def on_cells(mask: Tensor, maps: Tensor) -> Tensor:
    """``mask`` as constant numbers of the type of the maps.

    Raises:
        ValueError: it is not (N, H, W) of the (N, C, H, W) maps.
    """
    if mask.shape != (len(maps), *maps.shape[2:]):
        raise ValueError(
            f"mask {tuple(mask.shape)} does not fit maps {tuple(maps.shape)}: it must be (N, H, W)"
        )
    return mask.detach().to(maps.dtype)

"""FGFI (Wang et al., "Distilling object detectors with fine-grained feature imitation")."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reduce import full_precision, same_shape
from .squares import weighted_squares

AT_ONCE = 16  # boxes that are compared with all anchors at once: bounds the memory


def fgfi_mask(anchors: Tensor, boxes: Tensor, threshold: float = 0.5) -> Tensor:
    """Return FGFI's mask of one image and one level; see :func:`fgfi_masks`.

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
    """Return FGFI's masks: cells with an anchor nearly as good as an object's best one (Sec. 3.2).

    A cell is in the mask if one of its anchors has an IoU with an object above ``threshold`` times
    that object's largest IoU. The largest IoU is taken over all anchors, also those outside the
    image.

    Args:
        anchors: one (H, W, A, 4) XYXY tensor per level. The authors have one level.
        boxes: one (K, 4) XYXY tensor per image. A box that no anchor overlaps adds no cell.
        threshold: ψ in [0, 1].

    Returns:
        One (N, H, W) bool tensor per level.
    """
    all_anchors = torch.cat([full_precision(x).flatten(0, 2) for x in anchors])
    owner = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(x) for x in boxes]))
    owner = owner.to(all_anchors.device, non_blocking=True)
    hits = all_anchors.new_zeros(len(boxes), len(all_anchors))
    all_boxes = full_precision(torch.cat(list(boxes)))
    for chunk, images in zip(all_boxes.split(AT_ONCE), owner.split(AT_ONCE)):
        iou = pixel_iou(chunk, all_anchors)
        largest = iou.amax(1, keepdim=True) if len(all_anchors) else 0
        near = (iou > threshold * largest) & (iou > 0)
        hits.index_add_(0, images, near.to(hits.dtype))
    levels = hits.split([x[..., 0].numel() for x in anchors], 1)
    return [(y > 0).view(-1, *x.shape[:3]).any(3) for x, y in zip(anchors, levels)]


def pixel_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the (P, K) IoU of (P, 4) and (K, 4) boxes whose sides are x2 − x1 + 1 whole pixels."""
    corner = torch.maximum(boxes[:, None, :2], others[:, :2])
    sides = (torch.minimum(boxes[:, None, 2:], others[:, 2:]) - corner + 1).clamp(min=0)
    overlap = sides.prod(2)
    area, other_area = ((x[:, 2:] - x[:, :2] + 1).prod(1) for x in (boxes, others))
    return overlap / (area[:, None] + other_area - overlap)


def fgfi(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """FGFI's imitation loss: Σ M (T − S)² / (2 Σ M), summed over the channels (Eq. 2).

    Args:
        student, teacher: (N, C, H, W), the student adapted to the teacher's channels. No gradient
            reaches the teacher.
        mask: (N, H, W) M in {0, 1} from :func:`fgfi_masks`.

    Returns:
        A scalar >= 0; a connected zero where the mask is empty.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    weight = on_cells(mask, student)
    error = weighted_squares(student, teacher, weight[None])[0]
    return error / (2 * weight.sum()).clamp(min=1)


def on_cells(mask: Tensor, maps: Tensor) -> Tensor:
    """Convert ``mask`` to numbers of the type of the maps, without gradient.

    Raises:
        ValueError: if it is not (N, H, W) of the (N, C, H, W) maps.
    """
    if mask.shape != (len(maps), *maps.shape[2:]):
        raise ValueError(
            f"mask {tuple(mask.shape)} does not fit maps {tuple(maps.shape)}: it must be (N, H, W)"
        )
    return mask.detach().to(maps.dtype)

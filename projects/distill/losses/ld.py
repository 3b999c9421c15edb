"""LD (Zheng et al., "Localization distillation for dense object detection")."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .boxes import atss_candidates, box_centres, pairwise_iou, pairwise_overlap
from .kd import categorical_kl


def ld(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Localization distillation: weighted KL of the distributions of the box sides (Eq. 3).

    L = Σ_p w_p T² 1/bins Σ_bin q (log q − log p), q the teacher's softmax and p the student's at T

    The mean over the bins, and the sum over the rows instead of a mean, follow the released code.

    Args:
        student, teacher: (P, bins) logits of the sides of boxes, or of classes. No gradient
            reaches the teacher.
        weight: (P,) w >= 0; no gradient reaches it.
        temperature: T > 0.

    Returns:
        A scalar >= 0; a connected zero without rows.

    Raises:
        ValueError: if shapes differ.
    """
    divergence = categorical_kl(student, teacher.detach(), temperature)
    if weight.shape != divergence.shape:
        raise ValueError(
            f"weight {tuple(weight.shape)} does not fit logits {tuple(student.shape)}: it must be "
            "(P,)"
        )
    return (weight.detach() * divergence).sum() / max(student.shape[1], 1)


@torch.no_grad()
def ld_region(
    anchors: Sequence[Tensor], gt: Tensor, candidates: int = 9, released: bool = False
) -> Tensor:
    """Return the valuable localization region of each box (Sec. 3.4).

    It holds the anchors around the positives of ATSS. Their DIoU with the box is at least a quarter
    of the threshold of :func:`distill.losses.boxes.atss_candidates`, and below it. Positives may be
    among them.

    Args:
        anchors: one (Ri, 4) XYXY tensor per level; R is their sum.
        gt: (M, 4) XYXY.
        candidates: number of candidates of ATSS per level.
        released: divide the overlap in DIoU by the anchor's area instead of the union, as the
            authors' code does, which makes the region larger.

    Returns:
        (M, R): the IoU of the boxes with the anchors of their regions, 0 with all others.
    """
    boxes = torch.cat(list(anchors))
    gt = gt.to(boxes.dtype)
    if len(gt) == 0:
        return boxes.new_zeros(0, len(boxes))
    iou = pairwise_iou(gt, boxes)
    _, threshold = atss_candidates(anchors, gt, iou, candidates)
    overlap = _overlap_of_anchors(gt, boxes) if released else iou
    gap = box_centres(gt)[:, None] - box_centres(boxes)
    lower = torch.minimum(gt[:, None, :2], boxes[:, :2])
    diagonal = torch.maximum(gt[:, None, 2:], boxes[:, 2:]) - lower
    closeness = overlap - gap.square().sum(2) / diagonal.square().sum(2)
    inside = (closeness >= threshold / 4) & (closeness < threshold)
    return torch.where(inside, iou, 0)


def _overlap_of_anchors(gt: Tensor, anchors: Tensor) -> Tensor:
    """Return the (M, R) shares of the anchors' areas that lie in the boxes."""
    overlap = pairwise_overlap(gt, anchors)
    area = (anchors[:, 2] - anchors[:, 0]) * (anchors[:, 3] - anchors[:, 1])
    return torch.where(overlap > 0, overlap / area, 0)

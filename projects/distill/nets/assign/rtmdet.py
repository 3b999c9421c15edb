"""Assignment and losses of RTMDet (Lyu et al., "RTMDet: An empirical study of designing real-time
object detectors").
"""

import torch
from torch import Tensor

from ...losses.boxes import box_centres, pairwise_iou
from ...losses.reduce import full_precision
from ..quality_focal import quality_focal, soft_labels
from .dynamic import EXCLUDED, dynamic_k, inside
from .overlaps import generalized_iou, matched_boxes

TOPK = 13  # number of IoUs whose sum gives the number of points of a box
IOU_EPS = 1e-7  # added to the IoU before its logarithm
IOU_WEIGHT = 3.0  # factor of −log IoU in the cost
CENTRE_BASE, CENTRE_RADIUS = 10.0, 3.0  # the centre cost is base^(distance in strides − radius)


@torch.no_grad()
def dynamic_soft_labels(
    logits: Tensor,
    boxes: Tensor,
    points: Tensor,
    strides: Tensor,
    gt_boxes: Tensor,
    gt_classes: Tensor,
    gt_centers: Tensor | None = None,
    topk: int = TOPK,
) -> tuple[Tensor, Tensor]:
    """Assign points to the boxes of one image with RTMDet's dynamic soft labels (Sec. 3.3).

    The cost of a pair of box and point is the sum of three terms (Eq. 1-4)::

        y = one_hot(class) · IoU(predicted box, box)
        class: Σ BCE(logits, y) · (y − σ(logits))²      (over the K classes)
        IoU: −3 log(IoU + 1e-7)
        centre: 10^(|point − centre| / stride − 3)

    Points that lie strictly inside any box of the image are candidates of all its boxes.
    :func:`~distill.nets.assign.dynamic_k` selects among them. A box without a point inside (smaller
    than a cell) is not lost: it competes for the candidates of the others.

    The paper leaves open which points are candidates; these are the released code's. In float32
    the centre cost is infinite beyond 41 strides, and such candidates rank by their index.

    Args:
        logits: (P, K) of the classes, on all levels.
        boxes: (P, 4) XYXY, predicted, in pixels. An inverted box has IoU 0.
        points: (P, 2) x, y in pixels: the top left corners of the cells in RTMDet.
        strides: (P,) stride of each point's level in pixels.
        gt_boxes: (M, 4) XYXY in pixels.
        gt_classes: (M,) int64 in [0, K).
        gt_centers: (M, 2) x, y in pixels that replace the boxes' centres: the centres of mass of
            the masks in RTMDet-Ins. None means the boxes' centres.
        topk: number of IoUs whose sum gives the number of points of a box, at least 1.

    Returns:
        matched: (P,) int64 row of the box, or -1.
        quality: (P,) in [0, 1], IoU of predicted and matched box, 0 without a match. Computed in
        float32 at least, as everything here; no gradient.
    """
    logits, boxes, points, strides, gt_boxes = (
        full_precision(x) for x in (logits, boxes, points, strides, gt_boxes)
    )
    centres = box_centres(gt_boxes) if gt_centers is None else full_precision(gt_centers)
    iou = pairwise_iou(gt_boxes, boxes)
    distance = (points - centres[:, None]).norm(dim=2) / strides
    cost = soft_class_cost(logits, gt_classes, iou) - IOU_WEIGHT * (iou + IOU_EPS).log()
    cost = cost + CENTRE_BASE ** (distance - CENTRE_RADIUS)
    excluded = ~inside(points, gt_boxes).any(0)
    return dynamic_k(cost, iou, (excluded.int() * EXCLUDED).expand_as(cost), topk)


def soft_class_cost(logits: Tensor, classes: Tensor, iou: Tensor) -> Tensor:
    """Return the (M, P) quality focal losses of all points, if each box were their target.

    The literal form makes a tensor (M, P, K)::

        soft = F.one_hot(classes, K)[:, None] * iou[..., None]
        quality_focal(logits.expand_as(soft), soft).sum(2)

    Only the term of the box's class depends on the box, so the others are summed once.

    Args:
        logits: (P, K).
        classes: (M,) int64 in [0, K).
        iou: (M, P) in [0, 1].
    """
    background = quality_focal(logits, torch.zeros_like(logits)).T
    own = quality_focal(logits.T[classes], iou)
    return own - background[classes] + background.sum(0)


def rtmdet_loss(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    gt: Tensor,
    quality: Tensor,
    number: Tensor | float,
    box_weight: float = 2.0,
) -> dict[str, Tensor]:
    """RTMDet's losses (Sec. 3.3): QFL of all points, and GIoU of the matched ones.

    With q the quality at the class of a matched point, and 0 elsewhere::

        loss_cls = Σ BCE(logits, q) · |q − σ(logits)|² / number
        loss_box_reg = box_weight · Σ quality · (1 − GIoU) / number

    The paper names no regression loss besides the IoU; GIoU and its weight 2 are the released
    code's. Its ``number`` is the sum of all qualities, a mean over processes, and then at least 1.

    Args:
        logits: (..., K), any number of points, images and levels.
        boxes: (..., 4) XYXY, predicted.
        labels: (...) int64; points whose label is not in [0, K) are background.
        gt: (..., 4) XYXY of the matched objects; undefined for background.
        quality: (...) in [0, 1]; undefined for background. No gradient reaches it.
        number: > 0.
        box_weight: factor of the box loss.

    Returns:
        Two scalars >= 0, connected zeros without points.
    """
    logits, boxes, gt, quality = (full_precision(x) for x in (logits, boxes, gt, quality.detach()))
    positive = (labels >= 0) & (labels < logits.shape[-1])
    quality = quality.where(positive, 0)
    soft = soft_labels(logits, labels, quality)
    box = 1 - generalized_iou(*matched_boxes(boxes, gt, positive))
    return {
        "loss_cls": quality_focal(logits, soft).sum() / number,
        "loss_box_reg": box_weight * (quality * box).sum() / number,
    }

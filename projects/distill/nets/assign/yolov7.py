"""Assignment of YOLOv7 (Wang et al., "YOLOv7: trainable bag-of-freebies", as released)."""

import torch
from torch import Tensor

from ...losses.boxes import pairwise_iou
from ...losses.reduce import full_precision
from .dynamic import CANDIDATE, EXCLUDED, dynamic_k
from .yolox import IOU_WEIGHT, joint_class_cost

IOU_EPS = 1e-8


@torch.no_grad()
def ota_assign(
    logits: Tensor,
    objectness: Tensor,
    boxes: Tensor,
    places: Tensor,
    keep: Tensor,
    gt_boxes: Tensor,
    gt_classes: Tensor,
    topk: int = 10,
) -> Tensor:
    """Select predictions for the boxes of one image among the candidates of YOLOv5's targets.

    Every candidate may go to every box of the image, also to one that did not propose it. The cost
    is that of SimOTA, and :func:`~distill.nets.assign.dynamic_k` selects::

        Σ BCE(√(σ(logits) · σ(objectness)), one_hot(class)) − 3 log(IoU + 1e-8)

    Several boxes may propose one prediction. In the authors' code these are candidates of equal
    costs, of which an undefined one is selected, or several for different boxes. Here a prediction
    is one candidate. Both agree where no prediction is proposed twice.

    Args:
        logits: (P, K) of the classes, on all levels.
        objectness: (P,) logits.
        boxes: (P, 4) XYXY, predicted, in pixels.
        places: (P,) int64, equal for equal predictions.
        keep: (P,) bool, True for the candidates.
        gt_boxes: (M, 4) XYXY in pixels.
        gt_classes: (M,) int64 in [0, K).
        topk: number of IoUs whose sum gives the number of predictions of a box, at least 1.

    Returns:
        (P,) int64 row of the box that a prediction trains, or -1. Everything is computed in
        float32 at least.
    """
    logits, objectness, boxes, gt_boxes = map(full_precision, (logits, objectness, boxes, gt_boxes))
    iou = pairwise_iou(gt_boxes, boxes)
    cost = joint_class_cost(logits, objectness, gt_classes) - IOU_WEIGHT * (iou + IOU_EPS).log()
    tier = torch.where(_first(places, keep), CANDIDATE, EXCLUDED).expand(iou.shape)
    return dynamic_k(cost, iou, tier, topk)[0]


def _first(places: Tensor, keep: Tensor) -> Tensor:
    """Return (P,) bool, True for the first of the kept entries of each place."""
    ordered, order = places.where(keep, -1).sort(stable=True)
    new = ordered.diff(prepend=ordered.new_full((1,), -1)) != 0
    return torch.zeros_like(keep).scatter(0, order, new)

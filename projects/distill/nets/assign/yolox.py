"""Assignment and losses of YOLOX (Ge et al., "YOLOX: Exceeding YOLO series in 2021")."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...losses.boxes import box_centres, pairwise_iou
from ...losses.reduce import full_precision
from ..quality_focal import soft_labels
from .dynamic import EXCLUDED, PENALISED, dynamic_k, inside
from .overlaps import matched_boxes, paired_overlap

IOU_WEIGHT = 3.0  # factor of −log IoU in the cost
MAX_ENTROPY = 100.0  # largest −log of a probability
UNION_EPS, SIZE_EPS = 1e-16, 1e-8


class _Variant(NamedTuple):
    radius: float  # half a side of the centre's square, in strides
    boxes: bool  # the inside of a box counts, too
    iou_eps: float  # added to the IoU before its logarithm


VARIANTS = {"paper": _Variant(2.5, True, 1e-7), "repository": _Variant(1.5, False, 1e-8)}
"""The paper's SimOTA, and that of the authors' repository since January 2023."""


@torch.no_grad()
def sim_ota(
    logits: Tensor,
    objectness: Tensor,
    boxes: Tensor,
    centers: Tensor,
    strides: Tensor,
    gt_boxes: Tensor,
    gt_classes: Tensor,
    topk: int = 10,
    variant: str = "paper",
) -> tuple[Tensor, Tensor]:
    """Assign cells to the boxes of one image with SimOTA (Sec. 2.1).

    The square of a box reaches 2.5 strides from its centre, in x and in y. In the variant
    ``paper``, cells whose centre lies strictly inside any box or its square are candidates of all
    boxes. A pair is penalised unless the cell lies inside both this box and its square. In
    ``repository`` the square reaches 1.5 strides, and only squares are considered. The cost is::

        Σ BCE(√(σ(logits) · σ(objectness)), one_hot(class)) − 3 log(IoU + eps)

    :func:`~distill.nets.assign.dynamic_k` selects cells. The authors' code adds 1e5 (1e6) to the
    cost of a penalised pair, which the paper does not mention. In float32 this rounds away small
    differences, and equal sums leave the choice open. Here penalised pairs come after all others,
    and rank by their exact cost. A box may select penalised cells, so a box without cells of its
    own competes for those of others. Without a candidate all cells are background; the repository
    fails.

    Args:
        logits: (P, K) of the classes, on all levels.
        objectness: (P,) logits.
        boxes: (P, 4) XYXY, predicted, in pixels.
        centers: (P, 2) x, y of the cells' centres in pixels.
        strides: (P,) stride of each cell's level in pixels.
        gt_boxes: (M, 4) XYXY in pixels.
        gt_classes: (M,) int64 in [0, K).
        topk: number of IoUs whose sum gives the number of cells of a box, at least 1.
        variant: ``"paper"`` or ``"repository"``.

    Returns:
        matched: (P,) int64 row of the box, or -1.
        quality: (P,) in [0, 1], IoU of predicted and matched box, 0 without a match. Computed in
        float32 at least, as everything here; no gradient.

    Raises:
        ValueError: if the variant is unknown.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown: use {' or '.join(map(repr, VARIANTS))}")
    radius, in_boxes, eps = VARIANTS[variant]
    logits, objectness, boxes, centers, strides, gt_boxes = (
        full_precision(x) for x in (logits, objectness, boxes, centers, strides, gt_boxes)
    )
    distance = (centers - box_centres(gt_boxes)[:, None]).abs().amax(2)
    near = distance < radius * strides
    in_box = inside(centers, gt_boxes) if in_boxes else near
    tier = (~(near & in_box)).int() * PENALISED
    tier = tier.masked_fill(~(near | in_box).any(0), EXCLUDED)
    iou = pairwise_iou(gt_boxes, boxes)
    cost = joint_class_cost(logits, objectness, gt_classes) - IOU_WEIGHT * (iou + eps).log()
    return dynamic_k(cost, iou, tier, topk)


def joint_class_cost(logits: Tensor, objectness: Tensor, classes: Tensor) -> Tensor:
    """Return the (M, P) binary cross entropies of √(σ(logits) · σ(objectness)) with the classes.

    Logarithms are at least −100. Only the term of the box's class depends on the box, so the others
    are summed once and no tensor (M, P, K) is made.

    Args:
        logits: (P, K).
        objectness: (P,) logits.
        classes: (M,) int64 in [0, K).
    """
    joint = (logits.sigmoid() * objectness.sigmoid()[:, None]).sqrt().T
    present, absent = (-x.clamp(min=-MAX_ENTROPY) for x in (joint.log(), (-joint).log1p()))
    return (present - absent)[classes] + absent.sum(0)


def yolox_loss(
    logits: Tensor,
    objectness: Tensor,
    boxes: Tensor,
    labels: Tensor,
    gt: Tensor,
    quality: Tensor,
    number: Tensor | float,
    box_weight: float = 5.0,
) -> dict[str, Tensor]:
    """YOLOX's losses (Sec. 2.1): classes and boxes of the matched cells, objectness of all.

    ::

        loss_cls = Σ BCE(logits, one_hot(class) · quality) / number      (matched cells)
        loss_box_reg = box_weight · Σ (1 − IoU²) / number                (matched cells)
        loss_obj = Σ BCE(objectness, 1 if matched else 0) / number       (all cells)

    The paper leaves weights and the square open; these are the authors' code's. Its ``number`` is
    the number of matched cells in the batch, at least 1: per process in the authors' code, a mean
    over processes in mmdetection.

    Args:
        logits: (..., K), any number of cells, images and levels.
        objectness: (...) logits.
        boxes: (..., 4) XYXY, predicted.
        labels: (...) int64; cells whose label is not in [0, K) are background.
        gt: (..., 4) XYXY of the matched objects; undefined for background.
        quality: (...) in [0, 1]; undefined for background. No gradient reaches it.
        number: > 0.
        box_weight: factor of the box loss.

    Returns:
        Three scalars >= 0, connected zeros without cells.
    """
    logits, objectness, boxes, gt, quality = (
        full_precision(x) for x in (logits, objectness, boxes, gt, quality.detach())
    )
    positive = (labels >= 0) & (labels < logits.shape[-1])
    soft = soft_labels(logits, labels, quality.where(positive, 0))
    entropy = F.binary_cross_entropy_with_logits(logits, soft, reduction="none").sum(-1)
    overlap, union = paired_overlap(*matched_boxes(boxes, gt, positive))
    box = 1 - (overlap / (union + UNION_EPS)).square()
    exists = F.binary_cross_entropy_with_logits(
        objectness, positive.to(objectness.dtype), reduction="sum"
    )
    return {
        "loss_cls": entropy.where(positive, 0).sum() / number,
        "loss_box_reg": box_weight * box.where(positive, 0).sum() / number,
        "loss_obj": exists / number,
    }


def yolox_l1(
    regression: Tensor,
    centers: Tensor,
    strides: Tensor,
    positive: Tensor,
    gt: Tensor,
    number: Tensor | float,
) -> Tensor:
    """L1 loss of the last epochs of YOLOX, on the undecoded regression of the matched cells.

    The target is the centre of the box relative to the top left corner of the cell, in strides,
    and log(side / stride + 1e-8). The paper names the loss only.

    Args:
        regression: (..., P, 4) x, y, log width, log height, in strides.
        centers: (P, 2) x, y of the cells' centres in pixels.
        strides: (P,) in pixels.
        positive: (..., P) bool, True for the matched cells.
        gt: (..., P, 4) XYXY of the matched objects in pixels; undefined for background.
        number: > 0, number of matched cells.

    Returns:
        A scalar >= 0, a connected zero without cells.
    """
    regression, centers, gt = (full_precision(x) for x in (regression, centers, gt.detach()))
    stride = full_precision(strides)[:, None]
    middle = (gt[..., :2] + gt[..., 2:]) / 2
    place = (middle - centers) / stride + 0.5
    size = ((gt[..., 2:] - gt[..., :2]) / stride + SIZE_EPS).log()
    target = torch.cat([place, size], -1).where(positive[..., None], regression.detach())
    return (regression - target).abs().sum() / number

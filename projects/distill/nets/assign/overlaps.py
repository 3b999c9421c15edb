"""Overlaps of pairs of boxes, for losses: areas, generalised and complete IoU.

fvcore's and torchvision's losses wait for the device: one asserts that boxes are not inverted, the
other selects the pairs that overlap. RTMDet's regression can predict inverted boxes.
"""

import math

import torch
from torch import Tensor


def matched_boxes(boxes: Tensor, gt: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Replace both boxes of unmatched points by zeros, which have no gradient.

    Selecting the matched ones would wait for the device, and an overflow of an unmatched box would
    otherwise become NaN.

    Args:
        boxes, gt: (..., 4).
        positive: (...) bool, True for the matched points.
    """
    mask = positive[..., None]
    return boxes.where(mask, 0), gt.detach().where(mask, 0)


def paired_overlap(boxes: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return the areas of the intersection and of the union of pairs of boxes.

    The area of a box is w · h, which is negative if one side is inverted. An inverted box has no
    intersection with any other.

    Args:
        boxes, truth: (..., 4) XYXY.

    Returns:
        Two tensors (...); the first is >= 0.
    """
    sides = torch.minimum(boxes[..., 2:], truth[..., 2:]) - torch.maximum(
        boxes[..., :2], truth[..., :2]
    )
    overlap = sides.clamp(min=0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (boxes, truth)]
    return overlap, areas[0] + areas[1] - overlap


def hull_sides(boxes: Tensor, truth: Tensor) -> Tensor:
    """Return (..., 2) width and height of the smallest box around each pair of (..., 4) boxes."""
    return torch.maximum(boxes[..., 2:], truth[..., 2:]) - torch.minimum(
        boxes[..., :2], truth[..., :2]
    )


def generalized_iou(boxes: Tensor, truth: Tensor, eps: float = 1e-6) -> Tensor:
    """Generalised IoU (Rezatofighi et al., Algorithm 1): IoU − |C \\ (A ∪ B)| / |C|.

    C is the smallest box around both. Union and |C| are at least ``eps``. An empty or inverted box
    has a value and a gradient; this is the released code's, while the paper assumes valid boxes.

    Args:
        boxes, truth: (..., 4) XYXY.
        eps: smallest area, in units of the boxes' squared.

    Returns:
        (...) in [−1, 1] for valid boxes.
    """
    overlap, union = paired_overlap(boxes, truth)
    hull = hull_sides(boxes, truth).prod(-1).clamp(min=eps)
    return overlap / union.clamp(min=eps) - (hull - union) / hull


def complete_iou(boxes: Tensor, truth: Tensor, eps: float = 1e-7) -> Tensor:
    """Complete IoU (Zheng et al., "Distance-IoU loss", Eq. 10-11): IoU − ρ² / c² − αv.

    ρ is the distance of the centres and c the diagonal of the smallest box around both.
    v = 4/π² (arctan(w/h) − arctan(w'/h'))² compares the aspect ratios. α = v / (1 − IoU + v) has
    no gradient. ``eps`` is added to the union, to c² and to α's denominator, and is the smallest
    height. This is YOLOv5's form; the paper leaves the constants open.

    Args:
        boxes, truth: (..., 4) XYXY of sides >= 0.
        eps: > 0.

    Returns:
        (...) at most 1; below −1 only where aspect ratios differ.
    """
    overlap, union = paired_overlap(boxes, truth)
    iou = overlap / (union + eps)
    diagonal = hull_sides(boxes, truth).square().sum(-1) + eps
    between = (boxes[..., :2] + boxes[..., 2:] - truth[..., :2] - truth[..., 2:]) / 2
    angles = [_aspect(x, eps) for x in (boxes, truth)]
    v = 4 / math.pi**2 * (angles[0] - angles[1]).square()
    alpha = (v / (v - iou + 1 + eps)).detach()
    return iou - between.square().sum(-1) / diagonal - alpha * v


def _aspect(boxes: Tensor, eps: float) -> Tensor:
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    return (width / height.clamp(min=eps)).atan()

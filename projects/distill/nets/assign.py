"""Which prior is trained on which box: the assigners of dense detectors, without loops over boxes.

M counts the ground-truth boxes of one picture, R its priors (anchors or points) of all levels,
Ri those of one level. Every function returns, for each prior, the index of its box, or -1.
"""

from collections.abc import Sequence

import torch
from detectron2.structures import (
    Boxes,
    pairwise_ioa,
    pairwise_iou,
    pairwise_point_box_distance,
)
from torch import Tensor

NO_BOX = -1


@torch.no_grad()
def atss_assign(anchors: Sequence[Tensor], gt: Tensor, candidates: int = 9) -> Tensor:
    """Adaptive training sample selection (ATSS, Algorithm 1).

    The candidates of a box are, on each level, the anchors whose centres are nearest to its own.
    Of them those are positive whose IoU with it reaches the mean plus the standard deviation
    (unbiased) of all its candidates' IoUs, and whose centre lies inside it by more than 0.01
    pixels. An anchor that is positive for several boxes goes to the one of the highest IoU. The
    paper leaves open which of equally distant anchors are candidates, and so does this.

    Args:
        anchors: (Ri, 4) XYXY a level.
        gt: (M, 4) XYXY.
        candidates: of a box on a level, at least 1.

    Returns:
        (R,) int64.
    """
    boxes = torch.cat(list(anchors))
    if len(gt) == 0:
        return boxes.new_full((len(boxes),), NO_BOX, dtype=torch.long)
    centres = Boxes(boxes).get_centers()
    iou = pairwise_iou(Boxes(gt), Boxes(boxes))
    index, threshold = _atss_candidates(anchors, gt, iou, candidates)
    iou = iou.gather(1, index)
    depth = pairwise_point_box_distance(centres, Boxes(gt)).amin(2).T.gather(1, index)
    quality = torch.where((iou >= threshold) & (depth > 0.01), iou, -1.0)
    return _best(boxes.new_full((len(gt), len(boxes)), -1.0).scatter_(1, index, quality))


@torch.no_grad()
def valuable_region(
    anchors: Sequence[Tensor], gt: Tensor, candidates: int = 9, released: bool = False
) -> Tensor:
    """The anchors around the positives of ATSS from which localization is learned, too.

    The valuable localization region (LD; Zheng et al., "Localization distillation for dense object
    detection", Sec. 3.4) of a box holds the anchors whose DIoU with it is at least a quarter of
    the threshold of :func:`atss_assign`, and below it; positives may be among them.

    Args:
        anchors, gt, candidates: as of :func:`atss_assign`.
        released: as in the authors' code, where the overlap in DIoU is divided by the anchor's
            area instead of the union, which makes the region larger.

    Returns:
        (M, R): the IoU of the boxes with the anchors of their regions, 0 with all others.
    """
    boxes = torch.cat(list(anchors))
    if len(gt) == 0:
        return boxes.new_zeros(0, len(boxes))
    iou = pairwise_iou(Boxes(gt), Boxes(boxes))
    _, threshold = _atss_candidates(anchors, gt, iou, candidates)
    overlap = pairwise_ioa(Boxes(gt), Boxes(boxes)) if released else iou
    gap = Boxes(gt).get_centers()[:, None] - Boxes(boxes).get_centers()
    lower = torch.minimum(gt[:, None, :2], boxes[:, :2])
    diagonal = torch.maximum(gt[:, None, 2:], boxes[:, 2:]) - lower
    closeness = overlap - gap.square().sum(2) / diagonal.square().sum(2)
    inside = (closeness >= threshold / 4) & (closeness < threshold)
    return torch.where(inside, iou, 0)


def _atss_candidates(
    anchors: Sequence[Tensor], gt: Tensor, iou: Tensor, candidates: int
) -> tuple[Tensor, Tensor]:
    """(M, C) indices of each box's candidates among all anchors, and (M, 1) thresholds."""
    centres = Boxes(torch.cat(list(anchors))).get_centers()
    middle = Boxes(gt).get_centers()
    distance = torch.cdist(middle, centres, compute_mode="donot_use_mm_for_euclid_dist")
    chosen = []  # (M, up to candidates) a level
    for level, first in zip(distance.split([len(x) for x in anchors], 1), _starts(anchors)):
        nearest = level.topk(min(candidates, level.shape[1]), dim=1, largest=False).indices
        chosen.append(nearest + first)
    index = torch.cat(chosen, 1)
    own = iou.gather(1, index)
    threshold = own.mean(1, keepdim=True)
    if own.shape[1] > 1:
        threshold = threshold + own.std(1, keepdim=True)
    return index, threshold


@torch.no_grad()
def nearest_point_assign(
    points: Tensor, strides: Tensor, gt: Tensor, scale: float = 4.0, number: int = 1
) -> Tensor:
    """The points of a box's level that are nearest to its centre (RepPoints, Sec. 4).

    A box belongs to the level of stride 2^l with l = ⌊½ (log₂(w / scale) + log₂(h / scale))⌋,
    clamped to the levels there are. Distances are measured in units of the box: by its width in x
    and its height in y. A point that is the nearest of several boxes goes to the nearest of them.

    Args:
        points: (R, 2) x, y.
        strides: (R,) of each point's level, powers of 2.
        gt: (M, 4) XYXY.
        scale: side of a box in units of the stride of its level.
        number: of the points of a box, at least 1.

    Returns:
        (R,) int64.
    """
    if len(gt) == 0:
        return points.new_full((len(points),), NO_BOX, dtype=torch.long)
    size = (gt[:, 2:] - gt[:, :2]).clamp(min=1e-6)
    level = strides.log2().round()
    own = (size / scale).log2().mean(1).floor().clamp(level.min(), level.max())
    centres = Boxes(gt).get_centers()[:, None]
    distance = ((points - centres) / size[:, None]).norm(dim=2)
    distance = distance.masked_fill(level != own[:, None], torch.inf)
    nearest = distance.topk(min(number, len(points)), dim=1, largest=False)
    closeness = torch.full_like(distance, -torch.inf).scatter_(1, nearest.indices, -nearest.values)
    return _best(closeness, -torch.inf)


def _best(quality: Tensor, none: float = -1.0) -> Tensor:
    """(R,): of the (M, R) ``quality`` the box with the highest; NO_BOX where all are ``none``."""
    best, index = quality.max(0)
    return index.where(best > none, NO_BOX)


def _starts(levels: Sequence[Tensor]) -> list[int]:
    """Index of the first prior of each level among those of all."""
    starts = [0]
    for level in levels:
        starts.append(starts[-1] + len(level))
    return starts[:-1]

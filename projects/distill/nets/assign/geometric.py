"""Assignment of priors to ground-truth boxes in dense detectors, without loops over boxes.

M is the number of ground-truth boxes of one image. R is the number of its priors (anchors or
points) on all levels, Ri that of one level. Assigners return the index of a box for each prior,
or -1 for background.
"""

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, pairwise_iou, pairwise_point_box_distance
from torch import Tensor

from ...losses.boxes import atss_candidates

NO_BOX = -1


@torch.no_grad()
def atss_assign(anchors: Sequence[Tensor], gt: Tensor, candidates: int = 9) -> Tensor:
    """Assign anchors to boxes by adaptive training sample selection (ATSS, Algorithm 1).

    The candidates of a box are, on each level, the anchors whose centres are nearest to its centre.
    Their threshold is the mean plus the (unbiased) standard deviation of all candidates' IoUs with
    the box. A candidate is positive if its IoU reaches the threshold and its centre lies inside the
    box by more than 0.01 pixels. An anchor that is positive for several boxes goes to the one with
    the highest IoU. The paper leaves open which of several equally distant anchors are candidates,
    and so does this function.

    Args:
        anchors: one (Ri, 4) XYXY tensor per level.
        gt: (M, 4) XYXY.
        candidates: number of candidates per box and level, at least 1.

    Returns:
        (R,) int64 indices of boxes, or -1.
    """
    boxes = torch.cat(list(anchors))
    if len(gt) == 0:
        return boxes.new_full((len(boxes),), NO_BOX, dtype=torch.long)
    centres = Boxes(boxes).get_centers()
    iou = pairwise_iou(Boxes(gt), Boxes(boxes))
    index, threshold = atss_candidates(anchors, gt, iou, candidates)
    iou = iou.gather(1, index)
    depth = pairwise_point_box_distance(centres, Boxes(gt)).amin(2).T.gather(1, index)
    quality = torch.where((iou >= threshold) & (depth > 0.01), iou, -1.0)
    return _best(boxes.new_full((len(gt), len(boxes)), -1.0).scatter_(1, index, quality))


@torch.no_grad()
def nearest_point_assign(
    points: Tensor, strides: Tensor, gt: Tensor, scale: float = 4.0, number: int = 1
) -> Tensor:
    """Assign to each box the points of its level that are nearest to its centre.

    This is RepPoints' assignment (Sec. 4). A box belongs to the level of stride 2^l with
    l = ⌊½ (log₂(w / scale) + log₂(h / scale))⌋, clamped to the existing levels. Distances in x are
    divided by the width of the box, those in y by its height. A point that several boxes select
    goes to the nearest of them.

    Args:
        points: (R, 2) x, y in pixels.
        strides: (R,) stride of each point's level, a power of 2.
        gt: (M, 4) XYXY in pixels.
        scale: side of a box in units of the stride of its level.
        number: points per box, at least 1.

    Returns:
        (R,) int64 indices of boxes, or -1.
    """
    if len(gt) == 0:
        return points.new_full((len(points),), NO_BOX, dtype=torch.long)
    size = (gt[:, 2:] - gt[:, :2]).clamp(min=1e-6)
    level = strides.log2().round()
    box_level = (size / scale).log2().mean(1).floor().clamp(level.min(), level.max())
    centres = Boxes(gt).get_centers()[:, None]
    distance = ((points - centres) / size[:, None]).norm(dim=2)
    distance = distance.masked_fill(level != box_level[:, None], torch.inf)
    nearest = distance.topk(min(number, len(points)), dim=1, largest=False)
    closeness = torch.full_like(distance, -torch.inf).scatter_(1, nearest.indices, -nearest.values)
    return _best(closeness, -torch.inf)


def _best(quality: Tensor, none: float = -1.0) -> Tensor:
    """Return the (R,) index of the box with the highest (M, R) quality.

    It is ``NO_BOX`` where no quality is above ``none``.
    """
    best, index = quality.max(0)
    return index.where(best > none, NO_BOX)

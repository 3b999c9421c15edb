"""Which prior is trained on which box: the assigners of dense detectors, without loops over boxes.

M counts the ground-truth boxes of one picture, R its priors (anchors or points) of all levels,
Ri those of one level. Every function returns, for each prior, the index of its box, or -1.
"""

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, pairwise_iou, pairwise_point_box_distance
from torch import Tensor

from ..losses.boxes import atss_candidates

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
    index, threshold = atss_candidates(anchors, gt, iou, candidates)
    iou = iou.gather(1, index)
    depth = pairwise_point_box_distance(centres, Boxes(gt)).amin(2).T.gather(1, index)
    quality = torch.where((iou >= threshold) & (depth > 0.01), iou, -1.0)
    return _best(boxes.new_full((len(gt), len(boxes)), -1.0).scatter_(1, index, quality))


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

"""Assignment in which the predictions decide how many priors a box gets, and which ones.

M is the number of ground-truth boxes of one image and P the number of its points on all levels.
"""

import torch
from torch import Tensor

from .geometric import NO_BOX

CANDIDATE, PENALISED, EXCLUDED = 0, 1, 2
"""Tiers of a pair of box and point. A point of a lower tier always comes first."""


@torch.no_grad()
def dynamic_k(cost: Tensor, iou: Tensor, tier: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Assign to each box its k cheapest points, where k follows from the best IoUs of the box.

    This is SimOTA (Ge et al., "YOLOX", Sec. 2.1), which RTMDet and YOLOv7 share::

        k[j] = max(1, int(sum of the topk largest iou[j]))
        box j selects its k[j] cheapest points, by tier first and by cost second
        a point that several boxes select goes to its cheapest box

    The cheapest box of such a point may be one that did not select it, as in the authors' code. The
    paper does not say. Points that are excluded count neither in k nor as a match.

    Equal costs and tiers leave the choice open in the authors' code. Here the point, or box, of the
    lower index wins, on every device. k is a truncated sum, so a rounding error can change it where
    the sum is close to an integer.

    Nothing waits for the device, and every tensor has a shape that is known in advance.

    Args:
        cost: (M, P), no NaN. ``inf`` is allowed.
        iou: (M, P) in [0, 1].
        tier: (M, P) integers, ``CANDIDATE``, ``PENALISED`` or ``EXCLUDED``. A point is excluded
            for all boxes or for none.
        topk: number of IoUs that are summed, at least 1. k is at most this number.

    Returns:
        matched: (P,) int64 row of the matched box, or -1.
        quality: (P,) IoU with the matched box, 0 without one.
    """
    number = min(topk, cost.shape[1])
    if 0 in cost.shape:
        return _no_match(iou)
    usable = iou.masked_fill(tier == EXCLUDED, 0)
    k = usable.topk(number, 1).values.sum(1, keepdim=True).long().clamp(1)
    order = cost.argsort(dim=1, stable=True)
    order = order.gather(1, tier.gather(1, order).argsort(dim=1, stable=True))[:, :number]
    taken = torch.arange(number, device=cost.device) < k
    chosen = torch.zeros_like(tier, dtype=torch.int32).scatter_(1, order, taken.int())
    chosen = chosen.masked_fill(tier == EXCLUDED, 0)
    cheapest = cost.masked_fill(tier > tier.amin(0), torch.inf).argmin(0)
    selections = chosen.sum(0)
    matched = chosen.argmax(0).where(selections < 2, cheapest).where(selections > 0, NO_BOX)
    return matched, iou.gather(0, matched.clamp(0)[None])[0].where(matched >= 0, 0)


def _no_match(iou: Tensor) -> tuple[Tensor, Tensor]:
    points = iou.shape[1]
    return iou.new_full((points,), NO_BOX, dtype=torch.long), iou.new_zeros(points)


def inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Return (M, P) bool, True where a (P, 2) point lies strictly inside a (M, 4) XYXY box."""
    after = (points > boxes[:, None, :2]).all(2)
    return after & (points < boxes[:, None, 2:]).all(2)

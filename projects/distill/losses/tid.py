"""Task integration distillation (TID, Sec. 3).

DIEM scores how well a network does both tasks at each point. LDAM selects areas by the scores of
both networks. SFDM weighs the feature error by the areas.

P is the number of feature points of one image, all levels together. A is the number of boxes
that are decoded at a point. Only the two maps of :func:`tid` carry a gradient.
"""

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from .reduce import full_precision, same_shape
from .squares import weighted_squares

CHUNK = 8  # ground-truth boxes compared with all points at once; bounds the memory
MAX_WEAK = 2000  # maximum number of candidates of the weak area before NMS
TID_SCORES = ("both", "cls", "reg")
TID_AREAS = ("both", "key", "weak")
TID_OUTSIDE_KEY = ("keep", "zero")


@torch.no_grad()
def matched_iou(boxes: Tensor, gt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return IOU_max of every point: the largest IoU of its boxes with the ground truth (DIEM).

    The literal form, which would hold P·A × K numbers::

        iou = torchvision.ops.box_iou(boxes.flatten(0, 1), gt).view(P, A, K)
        best, index = iou.flatten(1).max(1)
        gt_index, anchor_index = index % K, index // K

    Args:
        boxes: (P, A, 4) XYXY, decoded at each point.
        gt: (K, 4) XYXY.

    Returns:
        iou: (P,) float32 in [0, 1], 0 without ground truth.
        gt_index: (P,) index of the matched ground-truth box, 0 where ``iou`` is 0.
        anchor_index: (P,) index of the point's box that matches.
    """
    points, anchors = boxes.shape[:2]
    flat = boxes.detach().float().flatten(0, 1).T.contiguous()
    corners = F.pad(gt.detach().float(), (0, 0, 0, -len(gt) % CHUNK))  # empty boxes overlap nothing
    chunks = corners.view(-1, CHUNK, 4)
    best, chunk = flat.new_zeros(flat.shape[1]), flat.new_zeros(flat.shape[1], dtype=torch.long)
    # Finding the index of each maximum would double the cost. Therefore it is found at the end,
    # only for the best chunk of the best box of each point.
    for k in range(len(chunks)):
        iou = _iou(flat, chunks[k].T[:, :, None]).amax(0)
        chunk.masked_fill_(iou > best, k)
        best = torch.maximum(best, iou)
    iou, anchor_index = best.view(points, anchors).max(1)
    if len(chunks) == 0:
        return iou, anchor_index, anchor_index
    nearest = chunk.view(points, anchors).gather(1, anchor_index[:, None])[:, 0]
    rows = torch.arange(points, device=boxes.device)
    chosen = flat[:, rows * anchors + anchor_index]
    within = _iou(chosen, chunks.permute(2, 1, 0)[:, :, nearest]).argmax(0)
    return iou, torch.where(iou > 0, nearest * CHUNK + within, 0), anchor_index


def _iou(boxes: Tensor, gt: Tensor) -> Tensor:
    """Return the IoU of boxes (4, P) with ground truth (4, K, 1 or P).

    Boxes that do not overlap may get a value below 0. torchvision's ``box_iou`` takes several times
    as long and as much memory.
    """
    (x1, y1, x2, y2), (gx1, gy1, gx2, gy2) = boxes, gt
    area, gt_area = (x2 - x1) * (y2 - y1), ((gx2 - gx1) * (gy2 - gy1)).clamp(min=1e-6)
    overlap = torch.minimum(x2, gx2).sub_(torch.maximum(x1, gx1)).clamp_(min=0)
    overlap.mul_(torch.minimum(y2, gy2).sub_(torch.maximum(y1, gy1)))
    return overlap.div_((area + gt_area).sub_(overlap))


@torch.no_grad()
def tid_score(
    iou: Tensor,
    prob: Tensor,
    positive: float,
    negative: float,
    top: float = 0.025,
    parts: str = "both",
    raw_iou: bool = False,
) -> Tensor:
    """Return TID's score of each point: how well one network does both tasks there (DIEM).

    Score = Score_c · Score_r. Score_r is 2 where IOU_max >= positive, 0.4 where IOU_max <=
    negative, 1.5 between. Score_c is 1.5 at the ⌈top · P⌉ points with the highest probabilities,
    else 1. Equal probabilities go by IOU_max, then by position. The paper leaves open ties, and a
    probability of 0; here it never belongs to the top.

    Args:
        iou: (P,) IOU_max of the points of one image.
        prob: (P,) probability of the matched box's class; 0 where ``iou`` is 0.
        positive, negative: IoU thresholds of the detector's own assignment.
        top: share of the points, in (0, 1].
        parts: "both", or the ablations "cls" (only Score_c) and "reg" (only Score_r).
        raw_iou: True for the ablation with Score_r = IOU_max.

    Returns:
        (P,) float32; in [0.4, 3] without ``raw_iou``.

    Raises:
        ValueError: if ``parts``, ``top`` or the thresholds are invalid.
    """
    if parts not in TID_SCORES:
        raise ValueError(f"parts must be one of {', '.join(TID_SCORES)}, got {parts!r}")
    if not 0 < top <= 1:
        raise ValueError(f"top must be in (0, 1], got {top}")
    if positive < negative:
        raise ValueError(f"positive {positive} is below negative {negative}")
    iou, prob = same_shape(iou, prob)
    if len(prob) == 0:
        return iou
    best = _ranked(prob, iou)[: _share(top, len(prob))]
    score_c = torch.ones_like(prob)
    score_c[best] = torch.where(prob[best] > 0, 1.5, 1.0)
    score_r = torch.where(iou >= positive, 2.0, torch.where(iou <= negative, 0.4, 1.5))
    score_r = iou if raw_iou else score_r
    return {"both": score_c * score_r, "cls": score_c, "reg": score_r}[parts]


@torch.no_grad()
def tid_value(
    score_teacher: Tensor,
    score_student: Tensor,
    tie: Tensor,
    boxes: Tensor,
    gamma: float = 0.05,
    nms_iou: float = 0.6,
    area: str = "both",
    outside_key: str = "keep",
) -> Tensor:
    """Return TID's Value_output = Score_key · Score_weak of each point of one image (LDAM).

    With k = ⌈γP⌉, Score_key is Score_T at the k points of the highest Score_T, min(Score_T, 1)
    elsewhere. The paper leaves open the second. With 0 there, more than half of the points inside
    objects would not be compared, though the text has the areas cover most of the objects.

    Score_weak is 1.5 in the weak area, 1 elsewhere. The candidates of the weak area are the points
    where Score_T − Score_S > 0, at most 2 000 by descending difference. A class-agnostic NMS of the
    teacher's boxes keeps one object from taking the whole area. The first k survivors are the area.

    Scores take few values, so that ranks must be exact: ties go by ``tie``, then by position. The
    paper leaves open γ, the limits and the IoU of the NMS.

    Args:
        score_teacher, score_student: (P,) from :func:`tid_score`.
        tie: (P,) the teacher's IOU_max · p.
        boxes: (P, 4) XYXY, the teacher's matching box of each point.
        gamma: γ in (0, 1].
        nms_iou: IoU threshold of the NMS, in [0, 1].
        area: "both", or the ablations "key" (Score_weak = 1) and "weak" (Score_key = 1).
        outside_key: "keep", or "zero" for Score_key = 0 outside the key area.

    Returns:
        (P,) float32.

    Raises:
        ValueError: if ``area``, ``outside_key`` or ``gamma`` is invalid, or shapes differ.
    """
    options = (gamma, nms_iou, area, outside_key)
    key, weak = tid_areas(score_teacher, score_student, tie, boxes, *options)
    return key.mul_(weak)


@torch.no_grad()
def tid_areas(
    score_teacher: Tensor,
    score_student: Tensor,
    tie: Tensor,
    boxes: Tensor,
    gamma: float = 0.05,
    nms_iou: float = 0.6,
    area: str = "both",
    outside_key: str = "keep",
) -> tuple[Tensor, Tensor]:
    """Return Score_key and Score_weak, (P,) float32 each; see :func:`tid_value`."""
    if area not in TID_AREAS:
        raise ValueError(f"area must be one of {', '.join(TID_AREAS)}, got {area!r}")
    if outside_key not in TID_OUTSIDE_KEY:
        raise ValueError(f"outside_key must be keep or zero, got {outside_key!r}")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must be in (0, 1], got {gamma}")
    score_teacher, score_student = same_shape(score_teacher, score_student)
    count = _share(gamma, len(score_teacher))
    score_key, score_weak = torch.ones_like(score_teacher), torch.ones_like(score_teacher)
    if area != "weak":
        key = _ranked(score_teacher, tie)[:count]
        score_key = score_teacher.clamp(max=1) * (outside_key == "keep")
        score_key[key] = score_teacher[key]
    if area != "key" and len(score_weak):
        lead = score_teacher - score_student
        order = _ranked(lead, tie)[:MAX_WEAK]
        # Points without a lead come last in this order and cannot suppress the others.
        rank = torch.arange(len(order), 0, -1, device=lead.device, dtype=torch.float32)
        weak = order[nms(boxes[order].float(), rank, nms_iou)[:count]]
        score_weak[weak] = torch.where(lead[weak] > 0, 1.5, 1.0)
    return score_key, score_weak


def _share(share: float, points: int) -> int:
    """Return ⌈share · P⌉. Without the rounding, 0.05 · 140 would count as 8."""
    return ceil(round(share * points, 6))


def _ranked(primary: Tensor, secondary: Tensor) -> Tensor:
    """Return indices by descending ``primary``; ties go by ``secondary``, then by position."""
    order = secondary.argsort(descending=True, stable=True)
    return order[primary[order].argsort(descending=True, stable=True)]


@torch.no_grad()
def tid_information(points: Tensor, boxes: Tensor) -> Tensor:
    """Return TID's V_information: 1 inside a ground-truth box, fading to 0 around it (SFDM).

    Outside it is max(0, 1 − hypot(dx/(w/2), dy/(h/2))), dx and dy the distances to the border. The
    value falls linearly over a band of half the box's side. With several boxes the maximum counts.

    The text says that the value decreases outwards; the printed fraction is the complement. The
    paper leaves open the width of the band. Sides are at least one pixel.

    Args:
        points: (P, 2) x, y in pixels.
        boxes: (K, 4) XYXY in pixels.

    Returns:
        (P,) float32 in [0, 1]; 0 without boxes.
    """
    x, y = (v.contiguous() for v in points.float().unbind(1))
    value = torch.zeros_like(x)
    for start in range(0, len(boxes), CHUNK):
        x1, y1, x2, y2 = boxes[start : start + CHUNK].float().unsqueeze(2).unbind(1)
        dx = torch.maximum(x1 - x, x - x2).clamp_(min=0).div_((x2 - x1).clamp(min=1) / 2)
        dy = torch.maximum(y1 - y, y - y2).clamp_(min=0).div_((y2 - y1).clamp(min=1) / 2)
        value = torch.maximum(value, (1 - torch.hypot(dx, dy)).amax(0))
    return value


def tid_mask(value: Tensor) -> Tensor:
    """Return TID's mask M of V = Value_output · V_information (SFDM), without gradient.

    M = V where V >= 1, 0.7 V where 0.01 <= V < 1, 0.05 V where V < 0.01. Any shape is possible.
    """
    return full_precision(value.detach()) * tid_by_value(value, 1.0, 0.7, 0.05)


def tid_by_value(value: Tensor, high: float, medium: float, low: float) -> Tensor:
    """Return ``high`` where V >= 1, ``medium`` where 0.01 <= V < 1, ``low`` below (SFDM)."""
    return torch.where(value >= 1, high, torch.where(value >= 0.01, medium, low))


def tid(
    student: Tensor, teacher: Tensor, mask: Tensor, alpha: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of TID's feature loss L_fea of one level (SFDM).

    L_fea = Σ α M (T − S)² / (C·Σ M), both sums over the batch and all levels

    The paper leaves open the normalization. The mean weighted by M is independent of the image
    size.

    Args:
        student, teacher: (N, C, H, W). No gradient reaches the teacher.
        mask: (N, H, W) M >= 0 from :func:`tid_mask`; no gradient reaches it.
        alpha: (N, H, W) α of the area of each cell. None means 1.

    Returns:
        Σ α M (T − S)² / C and Σ M, scalars.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher)
    if mask.shape != (len(student), *student.shape[2:]):
        raise ValueError(
            f"mask {tuple(mask.shape)} does not fit maps {tuple(student.shape)}: it must be "
            "(N, H, W)"
        )
    mask = full_precision(mask.detach())
    weight = mask if alpha is None else mask * alpha
    error = weighted_squares(student, teacher, weight[None])[0]
    return error / max(student.shape[1], 1), mask.sum()

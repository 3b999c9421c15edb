"""Targets and loss of YOLOv5 (Jocher et al., releases 6.0 to 7.0; there is no paper)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...losses.boxes import box_centres
from ...losses.reduce import full_precision
from .geometric import NO_BOX
from .overlaps import complete_iou


class _Candidates(NamedTuple):
    """The cells that may predict the boxes, up to five per anchor and box.

    Attributes:
        keep: (A, M, 5) bool, True for those that do.
        y, x: (M, 5) int64, inside the map.
        centres, sides: (M, 2) of the boxes, in cells.
    """

    keep: Tensor
    y: Tensor
    x: Tensor
    centres: Tensor
    sides: Tensor


def yolov5_targets(
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_classes: Tensor,
    ratio: float = 4.0,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return the predictions that YOLOv5 trains on each box of one image.

    An anchor fits a box if neither side differs by a factor of ``ratio`` or more; it never fits an
    empty box. A box trains all anchors that fit, on all levels, or no anchor. It does so in the
    cell that holds its centre, and in the nearest neighbours in x and in y, where these exist. With
    the centre (x, y) in cells, the cells are those that hold::

        (x, y)
        (x − ½, y) if frac(x) < ½ and x > 1,   (x + ½, y) if frac(W − x) < ½ and W − x > 1
        (x, y − ½) if frac(y) < ½ and y > 1,   (x, y + ½) if frac(H − y) < ½ and H − y > 1

    All are clamped to the map. A centre exactly between two cells, such as x = 3, adds the left
    neighbour and its own cell a second time. An exact ½ adds no neighbour. Several boxes may train
    the same prediction, see :func:`yolov5_loss`.

    The number of targets is not known in advance, so this waits once per level for the device. The
    loss does not use this function and does not wait.

    Args:
        sizes: (H, W) of the map of each level, in cells.
        strides: stride of each level in pixels.
        anchors: (L, A, 2) width and height in pixels.
        gt_boxes: (M, 4) XYXY in pixels.
        gt_classes: (M,) int64. Classes do not influence the targets.
        ratio: > 1.

    Returns:
        For each level four (T,) int64 tensors: anchor in [0, A), y, x and row of the box. They are
        ordered by anchor, then by box.

    Raises:
        ValueError: if sizes, strides and anchors have different numbers of levels, or if boxes and
            classes have different numbers.
    """
    _check_levels(len(anchors), sizes=sizes, strides=strides)
    if len(gt_boxes) != len(gt_classes):
        raise ValueError(f"{len(gt_boxes)} boxes have {len(gt_classes)} classes")
    gt_boxes, anchors = full_precision(gt_boxes), full_precision(anchors)
    levels = []
    for size, stride, level_anchors in zip(sizes, strides, anchors):
        found = _candidates(size, gt_boxes / stride, level_anchors / stride, ratio)
        anchor, box, which = found.keep.nonzero(as_tuple=True)
        levels.append((anchor, found.y[box, which], found.x[box, which], box))
    return levels


@torch.no_grad()
def _candidates(size: tuple[int, int], gt: Tensor, anchors: Tensor, ratio: float) -> _Candidates:
    """Return the cells around the centres of (M, 4) boxes, for (A, 2) anchors, both in cells."""
    height, width = size
    centres, sides = box_centres(gt), (gt[:, 2:] - gt[:, :2]).clamp(min=0)
    factor = sides / anchors[:, None]
    fits = torch.maximum(factor, 1 / factor).amax(2) < ratio
    x, y = centres.unbind(1)
    near = [(v % 1 < 0.5) & (v > 1) for v in (x, y, width - x, height - y)]
    keep = fits[..., None] & torch.stack([torch.ones_like(near[0]), *near], 1)
    return _Candidates(
        keep,
        torch.stack([y, y, y - 0.5, y, y + 0.5], 1).long().clamp(0, height - 1),
        torch.stack([x, x - 0.5, x, x + 0.5, x], 1).long().clamp(0, width - 1),
        centres,
        sides,
    )


def yolov5_loss(
    maps: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    anchors: Tensor,
    strides: Sequence[int],
    gains: tuple[float, float, float] = (0.05, 1.0, 0.5),
    balance: Sequence[float] = (4.0, 1.0, 0.4),
    ratio: float = 4.0,
) -> dict[str, Tensor]:
    """YOLOv5's loss of a batch.

    A prediction t decodes to the centre 2σ(t) − ½ relative to its cell and the side
    anchor · (2σ(t))². With T targets on a level (:func:`yolov5_targets`)::

        box = Σ over levels of (1 / T) Σ (1 − CIoU)
        cls = Σ over levels of (1 / (T · K)) Σ BCE(logits, one_hot(class)); 0 if K = 1
        obj = Σ over levels of balance · mean of BCE(objectness, max(CIoU, 0) or 0 without a target)
        total = N · (gain_box · box + gain_obj · obj + gain_cls · cls)

    So the gradient is that of a sum over images. A level without targets has only ``obj``.
    If several targets share a prediction, all of them count in ``box`` and ``cls``, and the largest
    CIoU is the target of the objectness. This is the authors' option that orders by IoU. By
    default their last target wins, which is undefined on a GPU.

    Gains are used as they are. The authors scale them for each data set: all three by 3 / L, the
    one of ``cls`` by K / 80, and the one of ``obj`` by (input size / 640)².

    Args:
        maps: (N, A, Hi, Wi, 5 + K) per level, N and K at least 1: x, y, w, h, objectness and class
            logits.
        targets: for each image ``gt_boxes``, (M, 4) XYXY in pixels, and ``gt_classes``, (M,) int64
            in [0, K).
        anchors: (L, A, 2) width and height in pixels.
        strides: stride of each level in pixels.
        gains: factors of ``box``, ``obj`` and ``cls``, in this order.
        balance: weight of the objectness of each level.
        ratio: as in :func:`yolov5_targets`.

    Returns:
        Scalars: ``box``, ``obj`` and ``cls`` times their gains, and ``total``. All >= 0, connected
        zeros where there is nothing to compare. In float32 at least.

    Raises:
        ValueError: if maps, strides, anchors and balance have different numbers of levels, or if
            targets and images have different numbers.
    """
    _check_levels(len(anchors), maps=maps, strides=strides, balance=balance)
    batch = _joined(maps, targets)
    levels = [
        _level_losses(x, batch.gt / s, batch.image, batch.labels, a.to(x.dtype) / s, ratio)
        for x, s, a in zip(batch.maps, strides, anchors)
    ]
    box, obj, classes = zip(*levels)
    losses = {
        "box": gains[0] * sum(box),
        "obj": gains[1] * sum(weight * x for weight, x in zip(balance, obj)),
        "cls": gains[2] * sum(classes),
    }
    return {**losses, "total": len(targets) * sum(losses.values())}


@torch.no_grad()
def yolov5_boxes(
    maps: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    anchors: Tensor,
    strides: Sequence[int],
    ratio: float = 4.0,
) -> list[Tensor]:
    """Return the box whose overlap is the target of each prediction's objectness.

    It is the box with the largest CIoU among those that train a prediction, and of equal ones that
    of the lowest row. The arguments are those of :func:`yolov5_loss`.

    Returns:
        (N, A, Hi, Wi) int64 per level: row among the boxes of all images, or -1.
    """
    batch = _joined(maps, targets)
    levels = []
    for x, s, a in zip(batch.maps, strides, anchors):
        found = _overlaps(x, batch.gt / s, batch.image, a.to(x.dtype) / s, ratio)
        index, rows = found.places.flatten(), torch.arange(len(batch.gt), device=x.device)
        iou = found.iou.where(found.candidates.keep, -torch.inf).flatten()
        empty = x[..., 0].flatten()
        best = torch.full_like(empty, -torch.inf).scatter_reduce(0, index, iou, "amax")
        wins = (iou >= best[index]) & (iou > -torch.inf)
        row = rows[:, None].expand(found.iou.shape).flatten().where(wins, len(rows))
        first = torch.full_like(empty, len(rows), dtype=torch.long)
        first = first.scatter_reduce(0, index, row, "amin")
        levels.append(first.where(first < len(rows), NO_BOX).view(x.shape[:4]))
    return levels


class _Joined(NamedTuple):
    """Maps of all levels in float32 at least, and the boxes of all images.

    Attributes:
        maps: (N, A, Hi, Wi, 5 + K) per level.
        gt: (M, 4) XYXY in pixels.
        labels, image: (M,) int64.
    """

    maps: list[Tensor]
    gt: Tensor
    labels: Tensor
    image: Tensor


def _joined(maps: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> _Joined:
    batch = len(maps[0])
    if len(targets) != batch:
        raise ValueError(f"targets of {len(targets)} images do not fit maps of {batch} images")
    full = [full_precision(x) for x in maps]
    gt = torch.cat([x["gt_boxes"].to(full[0].dtype) for x in targets])
    labels = [x["gt_classes"] for x in targets]
    image = torch.cat([torch.full_like(x, i) for i, x in enumerate(labels)])
    return _Joined(full, gt, torch.cat(labels), image)


class _Overlaps(NamedTuple):
    """The candidates of a level and what the network predicts for them.

    Attributes:
        candidates: cells of the boxes.
        places: (A, M, 5) int64 into the N · A · H · W predictions.
        rows: (A, M, 5, 5 + K) predictions.
        iou: (A, M, 5) CIoU of predicted and true box.
    """

    candidates: _Candidates
    places: Tensor
    rows: Tensor
    iou: Tensor


def _overlaps(
    predicted: Tensor, gt: Tensor, image: Tensor, anchors: Tensor, ratio: float
) -> _Overlaps:
    """Return all candidates of a level; the arguments are those of :func:`_level_losses`."""
    number, height, width = predicted.shape[1:4]
    found = _candidates((height, width), gt, anchors, ratio)
    anchor = torch.arange(number, device=gt.device)[:, None, None]
    index = ((image[:, None] * number + anchor) * height + found.y) * width + found.x
    rows = predicted.flatten(0, 3)[index]
    return _Overlaps(found, index, rows, complete_iou(*_boxes(rows, found, anchors)))


def _level_losses(
    predicted: Tensor, gt: Tensor, image: Tensor, labels: Tensor, anchors: Tensor, ratio: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return box, objectness and class loss of one level.

    All candidates are computed, at most 15 per box with three anchors, and those that do not count
    are masked. To select them would wait for the device.

    Args:
        predicted: (N, A, H, W, 5 + K).
        gt: (M, 4) XYXY in cells, of all images.
        image, labels: (M,) int64.
        anchors: (A, 2) in cells.
        ratio: as in :func:`yolov5_targets`.
    """
    found, index, rows, iou = _overlaps(predicted, gt, image, anchors, ratio)
    total = found.keep.sum().clamp(min=1)
    box = (1 - iou).where(found.keep, 0).sum() / total

    logits = rows[..., 5:]
    one_hot = labels[:, None] == torch.arange(logits.shape[-1], device=gt.device)
    target = one_hot.to(logits.dtype)[:, None].expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
    classes = entropy.where(found.keep, 0).sum() / (total * logits.shape[-1])
    classes = classes * (logits.shape[-1] > 1)

    best = iou.detach().clamp(min=0).where(found.keep, 0).flatten()
    objectness = predicted[..., 4].flatten()
    target = torch.zeros_like(objectness).scatter_reduce(0, index.flatten(), best, "amax")
    exists = F.binary_cross_entropy_with_logits(objectness, target)
    return box, exists, classes


def _boxes(rows: Tensor, found: _Candidates, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Return predicted and true boxes, (A, M, 5, 4) XYXY in cells, relative to the cell.

    Args:
        rows: (A, M, 5, 5 + K), the candidates' predictions.
        found: the candidates.
        anchors: (A, 2) in cells.
    """
    twice = 2 * rows[..., :4].sigmoid()
    middle, side = twice[..., :2] - 0.5, twice[..., 2:].square() * anchors[:, None, None]
    cells = torch.stack([found.x, found.y], -1)
    centre, half = found.centres[:, None] - cells, found.sides[:, None] / 2
    truth = torch.cat([centre - half, centre + half], -1).expand(len(anchors), -1, -1, -1)
    return torch.cat([middle - side / 2, middle + side / 2], -1), truth


def _check_levels(number: int, **others: Sequence[object]) -> None:
    for name, values in others.items():
        if len(values) != number:
            raise ValueError(f"{name} of {len(values)} levels do not fit anchors of {number}")

"""Targets and loss of YOLOv5 (Jocher et al., releases 6.0 to 7.0; there is no paper)."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...losses.boxes import box_centres
from ...losses.reduce import full_precision
from .geometric import NO_BOX
from .overlaps import complete_iou
from .yolov7 import ota_assign


class _Candidates(NamedTuple):
    """The cells that may predict the boxes, up to five per anchor and box.

    Attributes:
        keep: (A, M, 5) bool, True for those that do.
        y, x: (M, 5) int64, inside the map.
    """

    keep: Tensor
    y: Tensor
    x: Tensor


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
    factor = (gt[:, 2:] - gt[:, :2]).clamp(min=0) / anchors[:, None]
    fits = torch.maximum(factor, 1 / factor).amax(2) < ratio
    x, y = box_centres(gt).unbind(1)
    near = [(v % 1 < 0.5) & (v > 1) for v in (x, y, width - x, height - y)]
    keep = fits[..., None] & torch.stack([torch.ones_like(near[0]), *near], 1)
    return _Candidates(
        keep,
        torch.stack([y, y, y - 0.5, y, y + 0.5], 1).long().clamp(0, height - 1),
        torch.stack([x, x - 0.5, x, x + 0.5, x], 1).long().clamp(0, width - 1),
    )


def yolov5_loss(
    maps: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    anchors: Tensor,
    strides: Sequence[int],
    gains: tuple[float, float, float] = (0.05, 1.0, 0.5),
    balance: Sequence[float] = (4.0, 1.0, 0.4),
    ratio: float = 4.0,
    ota: bool = False,
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
        ota: True to select among these targets by :func:`~distill.nets.assign.ota_assign`, as
            YOLOv7 does.

    Returns:
        Scalars: ``box``, ``obj`` and ``cls`` times their gains, and ``total``. All >= 0, connected
        zeros where there is nothing to compare. In float32 at least.

    Raises:
        ValueError: if maps, strides, anchors and balance have different numbers of levels, or if
            targets and images have different numbers.
    """
    _check_levels(len(anchors), maps=maps, strides=strides, balance=balance)
    batch = _joined(maps, targets)
    matches = _matches(batch, anchors, strides, ratio, ota)
    levels = [
        _level_losses(x, found, batch.gt / s, batch.labels)
        for x, found, s in zip(batch.maps, matches, strides)
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
    ota: bool = False,
) -> list[Tensor]:
    """Return the box whose overlap is the target of each prediction's objectness.

    It is the box with the largest CIoU among those that train a prediction, and of equal ones that
    of the lowest row. The arguments are those of :func:`yolov5_loss`.

    Returns:
        (N, A, Hi, Wi) int64 per level: row among the boxes of all images, or -1.
    """
    batch = _joined(maps, targets)
    levels, most = [], len(batch.gt)
    for x, found, s in zip(batch.maps, _matches(batch, anchors, strides, ratio, ota), strides):
        index, empty = found.places.flatten(), x[..., 0].flatten()
        iou = found.overlaps(batch.gt / s).where(found.keep, -torch.inf).flatten()
        best = torch.full_like(empty, -torch.inf).scatter_reduce(0, index, iou, "amax")
        wins = (iou >= best[index]) & (iou > -torch.inf)
        row = found.box.flatten().where(wins, most)
        first = torch.full_like(empty, most, dtype=torch.long)
        first = first.scatter_reduce(0, index, row, "amin")
        levels.append(first.where(first < most, NO_BOX).view(x.shape[:4]))
    return levels


class _Joined(NamedTuple):
    """Maps of all levels in float32 at least, and the boxes of all images.

    Attributes:
        maps: (N, A, Hi, Wi, 5 + K) per level.
        gt: (M, 4) XYXY in pixels.
        labels, image: (M,) int64.
        numbers: number of boxes of each image.
    """

    maps: list[Tensor]
    gt: Tensor
    labels: Tensor
    image: Tensor
    numbers: list[int]


def _joined(maps: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> _Joined:
    batch = len(maps[0])
    if len(targets) != batch:
        raise ValueError(f"targets of {len(targets)} images do not fit maps of {batch} images")
    full = [full_precision(x) for x in maps]
    gt = torch.cat([x["gt_boxes"].to(full[0].dtype) for x in targets])
    labels = [x["gt_classes"] for x in targets]
    image = torch.cat([torch.full_like(x, i) for i, x in enumerate(labels)])
    return _Joined(full, gt, torch.cat(labels), image, [len(x) for x in labels])


class _Matches(NamedTuple):
    """The predictions of a level that may train boxes. Only those in ``keep`` do.

    Attributes:
        keep: (A, M, 5) bool.
        box: (A, M, 5) int64 row of the box that each prediction trains.
        places: (A, M, 5) int64 into the N · A · H · W predictions.
        rows: (A, M, 5, 5 + K) predictions.
        cells: (M, 5, 2) x and y of the cells.
        anchors: (A, 2) in cells.
    """

    keep: Tensor
    box: Tensor
    places: Tensor
    rows: Tensor
    cells: Tensor
    anchors: Tensor

    def boxes(self) -> Tensor:
        """Return the predicted boxes, (A, M, 5, 4) XYXY in cells, relative to the cell."""
        twice = 2 * self.rows[..., :4].sigmoid()
        middle, side = twice[..., :2] - 0.5, twice[..., 2:].square() * self.anchors[:, None, None]
        return torch.cat([middle - side / 2, middle + side / 2], -1)

    def overlaps(self, gt: Tensor) -> Tensor:
        """Return (A, M, 5) CIoU of the predicted boxes with their true ones, (M, 4) in cells."""
        centres, sides = box_centres(gt)[self.box], (gt[:, 2:] - gt[:, :2]).clamp(min=0)[self.box]
        centre, half = centres - self.cells, sides / 2
        return complete_iou(self.boxes(), torch.cat([centre - half, centre + half], -1))


def _matches(
    batch: _Joined, anchors: Tensor, strides: Sequence[int], ratio: float, ota: bool
) -> list[_Matches]:
    """Return the matches of each level; the arguments are those of :func:`yolov5_loss`."""
    levels = [
        _proposed(x, batch.gt / s, batch.image, a.to(x.dtype) / s, ratio)
        for x, s, a in zip(batch.maps, strides, anchors)
    ]
    return _selected(levels, batch, strides) if ota else levels


def _proposed(
    predicted: Tensor, gt: Tensor, image: Tensor, anchors: Tensor, ratio: float
) -> _Matches:
    """Return all candidates of a level, each for the box that proposes it.

    At most 15 per box count with three anchors. To select them would wait for the device.

    Args:
        predicted: (N, A, H, W, 5 + K).
        gt: (M, 4) XYXY in cells, of all images.
        image: (M,) int64.
        anchors: (A, 2) in cells.
        ratio: as in :func:`yolov5_targets`.
    """
    number, height, width = predicted.shape[1:4]
    found = _candidates((height, width), gt, anchors, ratio)
    anchor = torch.arange(number, device=gt.device)[:, None, None]
    index = ((image[:, None] * number + anchor) * height + found.y) * width + found.x
    box = torch.arange(len(gt), device=gt.device)[:, None].expand(found.keep.shape)
    cells = torch.stack([found.x, found.y], -1)
    return _Matches(found.keep, box, index, predicted.flatten(0, 3)[index], cells, anchors)


@torch.no_grad()
def _selected(levels: list[_Matches], batch: _Joined, strides: Sequence[int]) -> list[_Matches]:
    """Return the matches by :func:`~distill.nets.assign.ota_assign` among all candidates."""
    offsets = accumulate((x[..., 0].numel() for x in batch.maps), initial=0)
    candidates = [
        (x.rows, (x.boxes() + x.cells.repeat(1, 1, 2)) * s, x.places + offset, x.keep)
        for x, s, offset in zip(levels, strides, offsets)
    ]
    found, first = [], 0
    for number in batch.numbers:
        own = slice(first, first + number)
        parts = [[x[:, own] for x in level] for level in candidates]
        rows, boxes, places, keep = (
            torch.cat([x.flatten(0, 2) for x in kind]) for kind in zip(*parts)
        )
        truth = batch.gt[own], batch.labels[own]
        matched = ota_assign(rows[:, 5:], rows[:, 4], boxes, places, keep, *truth)
        matched = matched.where(matched < 0, matched + first)
        keeps = [level[-1] for level in parts]
        shares = matched.split([x.numel() for x in keeps])
        found.append([row.view(x.shape) for row, x in zip(shares, keeps)])
        first += number
    joint = [torch.cat(images, 1) for images in zip(*found)]
    return [x._replace(keep=box >= 0, box=box.clamp(min=0)) for x, box in zip(levels, joint)]


def _level_losses(
    predicted: Tensor, found: _Matches, gt: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return box, objectness and class loss of one level.

    Args:
        predicted: (N, A, H, W, 5 + K).
        found: the matches.
        gt: (M, 4) XYXY in cells, of all images.
        labels: (M,) int64.
    """
    iou, total = found.overlaps(gt), found.keep.sum().clamp(min=1)
    box = (1 - iou).where(found.keep, 0).sum() / total

    logits = found.rows[..., 5:]
    one_hot = labels[found.box][..., None] == torch.arange(logits.shape[-1], device=gt.device)
    target = one_hot.to(logits.dtype)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
    classes = entropy.where(found.keep, 0).sum() / (total * logits.shape[-1])
    classes = classes * (logits.shape[-1] > 1)

    best = iou.detach().clamp(min=0).where(found.keep, 0).flatten()
    objectness = predicted[..., 4].flatten()
    target = torch.zeros_like(objectness).scatter_reduce(0, found.places.flatten(), best, "amax")
    exists = F.binary_cross_entropy_with_logits(objectness, target)
    return box, exists, classes


def _check_levels(number: int, **others: Sequence[object]) -> None:
    for name, values in others.items():
        if len(values) != number:
            raise ValueError(f"{name} of {len(values)} levels do not fit anchors of {number}")

"""Boxes: their overlaps, the anchors of a level, and boxes on the cells of a map."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .reduce import full_precision


def padded(boxes: Sequence[Tensor]) -> Tensor:
    """Stack the boxes of each image into one tensor, padded with NaN.

    Args:
        boxes: one (Ki, 4) tensor per image.

    Returns:
        (N, K, 4) in full precision, without gradient; K is the largest Ki. Missing boxes are NaN.
        Without images (0, 0, 4).
    """
    if not boxes:
        return torch.zeros(0, 0, 4)
    return pad_sequence(
        [full_precision(x.detach()) for x in boxes], batch_first=True, padding_value=torch.nan
    )


@torch.no_grad()
def painted(
    first: Tensor, last: Tensor, value: Tensor, height: int, width: int, at_once: int = 64
) -> Tensor:
    """Return the largest value of the boxes that cover each cell, 0 where no box does.

    The literal form for one image, x and y the indices of the cells::

        for (x1, y1), (x2, y2), v in zip(first, last, value):
            inside = (x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)
            drawn[inside] = drawn[inside].clamp(min=v)

    Args:
        first, last: (N, K, 2) x, y of the first and the last cell of each box. They may lie outside
            the map. A box with NaN covers no cell.
        value: (N, K) > 0.
        height, width: size of the map in cells.
        at_once: number of boxes per image that are painted together, which bounds the memory.

    Returns:
        (N, height, width).
    """
    drawn = value.new_zeros(len(value), height, width)
    for start in range(0, value.shape[1], at_once):
        part = slice(start, start + at_once)
        inside = covered(first[:, part], last[:, part], height, width)
        part_value = value[:, part, None, None]
        drawn = torch.maximum(drawn, torch.where(inside, part_value, 0).amax(1))
    return drawn


@torch.no_grad()
def covered(first: Tensor, last: Tensor, height: int, width: int) -> Tensor:
    """Return which cells each box covers.

    Args:
        first, last: (N, K, 2) x, y as in :func:`painted`.
        height, width: size of the map in cells.

    Returns:
        (N, K, height, width) bool.
    """
    columns, rows = (torch.arange(n, device=first.device) for n in (width, height))
    a, b = first[..., None], last[..., None]
    in_x = (a[:, :, 0] <= columns) & (columns <= b[:, :, 0])
    in_y = (a[:, :, 1] <= rows) & (rows <= b[:, :, 1])
    return in_y[..., None] & in_x[:, :, None]


def box_centres(boxes: Tensor) -> Tensor:
    """Return the (K, 2) centres of (K, 4) XYXY boxes."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def pairwise_overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the (M, R) areas in which (M, 4) and (R, 4) XYXY boxes overlap."""
    corner = torch.maximum(boxes[:, None, :2], others[:, :2])
    return (torch.minimum(boxes[:, None, 2:], others[:, 2:]) - corner).clamp(min=0).prod(2)


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the (M, R) IoU of (M, 4) and (R, 4) XYXY boxes, to the bit as detectron2 does.

    detectron2's own takes its ``Boxes``; torchvision's is NaN for two boxes without area. Three
    methods have an IoU of their own, for a reason:

    - :func:`distill.losses.fgfi.pixel_iou` is of boxes of whole pixels, as the authors' is.
    - :func:`distill.losses.crosskd.paired_iou` is of pairs and has a gradient.
    - :func:`distill.losses.matched_iou` compares all points of an image at once, faster.
    """
    overlap = pairwise_overlap(boxes, others)
    area, other = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (boxes, others))
    return torch.where(overlap > 0, overlap / (area[:, None] + other - overlap), 0)


def expected_distances(sides: Tensor) -> Tensor:
    """Return the expected distances of the sides of boxes in strides (GFL, Eq. 5).

    Args:
        sides: (..., 4 · bins) logits of the distances 0, 1, ..., bins − 1 of each side.

    Returns:
        (..., 4) >= 0.
    """
    sides = sides.unflatten(-1, (4, -1))
    bins = torch.arange(sides.shape[-1], device=sides.device, dtype=sides.dtype)
    return (sides.softmax(-1) * bins).sum(-1)


def box_centerness(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Return the centerness of the anchors' centres in boxes that hold them (FCOS, Eq. 3).

    √(min(l, r) / max(l, r) · min(t, b) / max(t, b)), with the distances l, t, r, b to the sides.

    Args:
        anchors, boxes: (P, 4) XYXY.

    Returns:
        (P,) in [0, 1].
    """
    centres = box_centres(anchors)
    sides = torch.stack([centres - boxes[:, :2], boxes[:, 2:] - centres]).clamp(min=0)
    ratio = sides.amin(0) / sides.amax(0).clamp(min=1e-6)
    return ratio.prod(1).sqrt()


def anchor_grid(anchors: Tensor, stride: float, offset: float, height: int, width: int) -> Tensor:
    """Return the anchors of one level, placed at each of its cells.

    detectron2's own generator makes them on the CPU and waits for the copy to the device.

    Args:
        anchors: (A, 4) XYXY, relative to the cell's origin.
        stride: size of a cell in pixels.
        offset: distance of the cells' origins from the image's, in strides.
        height, width: size of the level in cells.

    Returns:
        (height, width, A, 4) XYXY in pixels.
    """
    x, y = ((torch.arange(n, device=anchors.device) + offset) * stride for n in (width, height))
    corner = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).repeat(1, 1, 2)
    return corner[:, :, None] + anchors


def atss_candidates(
    anchors: Sequence[Tensor], gt: Tensor, iou: Tensor, candidates: int
) -> tuple[Tensor, Tensor]:
    """Return the candidates of each box in the assignment of ATSS, and its IoU threshold.

    The candidates are, on each level, the anchors whose centres are nearest to the box's. The
    threshold is the mean plus the standard deviation (unbiased) of their IoUs with the box.

    Args:
        anchors: one (Ri, 4) XYXY tensor per level; R is their sum.
        gt: (M, 4) XYXY.
        iou: (M, R) of both.
        candidates: per level, at least 1.

    Returns:
        (M, C) indices among all anchors, and (M, 1) thresholds.
    """
    centres = box_centres(torch.cat(list(anchors)))
    distance = torch.cdist(box_centres(gt), centres, compute_mode="donot_use_mm_for_euclid_dist")
    chosen, first = [], 0  # (M, up to candidates) per level
    for level in distance.split([len(x) for x in anchors], 1):
        nearest = level.topk(min(candidates, level.shape[1]), dim=1, largest=False).indices
        chosen.append(nearest + first)
        first += level.shape[1]
    index = torch.cat(chosen, 1)
    own = iou.gather(1, index)
    threshold = own.mean(1, keepdim=True)
    if own.shape[1] > 1:
        threshold = threshold + own.std(1, keepdim=True)
    return index, threshold

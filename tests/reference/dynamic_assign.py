"""Loops over boxes, points, classes and cells, for the assigners that read predictions."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from tests.reference.assign import iou

Box = Sequence[float]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def entropy(probability: float, target: float) -> float:
    return -target * math.log(probability) - (1 - target) * math.log(1 - probability)


def within(x: float, y: float, box: Box) -> bool:
    return box[0] < x < box[2] and box[1] < y < box[3]


def middle(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def select(
    candidates: Sequence[int],
    cost: Callable[[int, int], tuple[float, ...]],
    ious: np.ndarray,
    topk: int,
) -> tuple[list[int], list[float]]:
    """Return box and IoU of each point; ``cost(box, point)`` is compared as a tuple."""
    number, points = ious.shape
    selected_by: dict[int, list[int]] = {}
    for j in range(number):
        best = sorted((ious[j, p] for p in candidates), reverse=True)[:topk]
        k = max(1, int(sum(best)))
        for p in sorted(candidates, key=lambda p: (cost(j, p), p))[:k]:
            selected_by.setdefault(p, []).append(j)
    matched, quality = [-1] * points, [0.0] * points
    for p, boxes in selected_by.items():
        j = boxes[0] if len(boxes) == 1 else min(range(number), key=lambda j: cost(j, p))
        matched[p], quality[p] = j, float(ious[j, p])
    return matched, quality


def slow_soft_labels(
    logits: np.ndarray,
    boxes: np.ndarray,
    points: np.ndarray,
    strides: np.ndarray,
    gt: np.ndarray,
    classes: np.ndarray,
    centres: np.ndarray | None = None,
    topk: int = 13,
) -> tuple[list[int], list[float]]:
    ious = np.array([[iou(b, g) for b in boxes] for g in gt]).reshape(len(gt), len(boxes))

    def cost(j: int, p: int) -> tuple[float]:
        total = -3 * math.log(ious[j, p] + 1e-7)
        for k, z in enumerate(logits[p]):
            soft = ious[j, p] if k == classes[j] else 0.0
            total += entropy(sigmoid(z), soft) * (soft - sigmoid(z)) ** 2
        centre = middle(gt[j]) if centres is None else centres[j]
        return (total + 10 ** (math.dist(points[p], centre) / strides[p] - 3),)

    inside = [p for p, (x, y) in enumerate(points) if any(within(x, y, g) for g in gt)]
    return select(inside, cost, ious, topk)


def slow_sim_ota(
    logits: np.ndarray,
    objectness: np.ndarray,
    boxes: np.ndarray,
    centers: np.ndarray,
    strides: np.ndarray,
    gt: np.ndarray,
    classes: np.ndarray,
    topk: int = 10,
    variant: str = "paper",
) -> tuple[list[int], list[float]]:
    ious = np.array([[iou(b, g) for b in boxes] for g in gt]).reshape(len(gt), len(boxes))
    paper = variant == "paper"

    def near(j: int, p: int) -> bool:
        reach = (2.5 if paper else 1.5) * strides[p]
        return all(abs(a - b) < reach for a, b in zip(centers[p], middle(gt[j])))

    def in_box(j: int, p: int) -> bool:
        return within(*centers[p], gt[j])

    def cost(j: int, p: int) -> tuple[bool, float]:
        total = -3 * math.log(ious[j, p] + (1e-7 if paper else 1e-8))
        for k, z in enumerate(logits[p]):
            joint = math.sqrt(sigmoid(z) * sigmoid(objectness[p]))
            total += entropy(joint, float(k == classes[j]))
        return not (near(j, p) and (in_box(j, p) or not paper)), total

    everyone = range(len(gt))
    candidates = [
        p
        for p in range(len(centers))
        if any(near(j, p) or (paper and in_box(j, p)) for j in everyone)
    ]
    return select(candidates, cost, ious, topk)


def slow_yolov5_targets(
    size: tuple[int, int], stride: int, anchors: np.ndarray, gt: np.ndarray, ratio: float = 4.0
) -> list[tuple[int, int, int, int]]:
    """Return the (anchor, y, x, box) of one level in any order; anchors (A, 2) in pixels."""
    height, width = size
    found = []
    for j, box in enumerate(gt):
        x, y = (v / stride for v in middle(box))
        w, h = box[2] - box[0], box[3] - box[1]
        places = [(x, y)]
        if x > 1 and x - math.floor(x) < 0.5:
            places.append((x - 0.5, y))
        if y > 1 and y - math.floor(y) < 0.5:
            places.append((x, y - 0.5))
        if width - x > 1 and (width - x) - math.floor(width - x) < 0.5:
            places.append((x + 0.5, y))
        if height - y > 1 and (height - y) - math.floor(height - y) < 0.5:
            places.append((x, y + 0.5))
        for a, (aw, ah) in enumerate(anchors):
            if max(w / aw, aw / w, h / ah, ah / h) < ratio:
                for px, py in places:
                    row, column = min(max(int(py), 0), height - 1), min(max(int(px), 0), width - 1)
                    found.append((a, row, column, j))
    return found


def complete_iou(a: Box, b: Box) -> float:
    overlap = iou(a, b)
    (ax, ay), (bx, by) = middle(a), middle(b)
    diagonal = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    angle_a, angle_b = (math.atan((x[2] - x[0]) / (x[3] - x[1])) for x in (a, b))
    v = 4 / math.pi**2 * (angle_a - angle_b) ** 2
    aspect = v * v / (1 - overlap + v) if v else 0.0
    return overlap - ((ax - bx) ** 2 + (ay - by) ** 2) / diagonal - aspect


def decoded(row: np.ndarray, x: int, y: int, stride: int, anchor: Sequence[float]) -> Box:
    """Return the box that YOLOv5 predicts in a cell."""
    cx, cy = ((2 * sigmoid(v) - 0.5 + c) * stride for v, c in zip(row[:2], (x, y)))
    w, h = ((2 * sigmoid(v)) ** 2 * s for v, s in zip(row[2:4], anchor))
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def slow_ota(
    maps: Sequence[np.ndarray],
    gt: np.ndarray,
    labels: np.ndarray,
    anchors: np.ndarray,
    strides: Sequence[int],
) -> list[tuple[int, int, int, int, int]]:
    """Return YOLOv7's (level, anchor, y, x, box) of one image; ``maps`` are (A, H, W, 5 + K)."""
    places = sorted(
        {
            (level, a, y, x)
            for level, (own, stride) in enumerate(zip(maps, strides))
            for a, y, x, _ in slow_yolov5_targets(own.shape[1:3], stride, anchors[level], gt)
        }
    )
    rows = [maps[level][a, y, x] for level, a, y, x in places]
    boxes = [
        decoded(row, x, y, strides[level], anchors[level][a])
        for row, (level, a, y, x) in zip(rows, places)
    ]
    ious = np.array([[iou(b, g) for b in boxes] for g in gt]).reshape(len(gt), len(boxes))

    def cost(j: int, p: int) -> tuple[float]:
        total = -3 * math.log(ious[j, p] + 1e-8)
        for k, z in enumerate(rows[p][5:]):
            joint = math.sqrt(sigmoid(z) * sigmoid(rows[p][4]))
            total += entropy(joint, float(k == labels[j]))
        return (total,)

    matched, _ = select(range(len(places)), cost, ious, 10)
    return [(*place, j) for place, j in zip(places, matched) if j >= 0]


def slow_yolov5_loss(
    maps: Sequence[np.ndarray],
    targets: Sequence[tuple[np.ndarray, np.ndarray]],
    anchors: np.ndarray,
    strides: Sequence[int],
    gains: Sequence[float],
    balance: Sequence[float],
    ota: bool = False,
) -> dict[str, float]:
    """Return the loss of a batch; ``targets`` are (M, 4) boxes and (M,) classes per image."""
    sums = {"box": 0.0, "obj": 0.0, "cls": 0.0}
    chosen = [
        slow_ota([x[n] for x in maps], *own, anchors, strides) if ota else []
        for n, own in enumerate(targets)
    ]
    for index, (level, stride, level_anchors, weight) in enumerate(
        zip(maps, strides, anchors, balance)
    ):
        batch, _, height, width, channels = level.shape
        wanted = np.zeros(level.shape[:4])
        box, classes, number = 0.0, 0.0, 0
        for n in range(batch):
            gt, labels = targets[n]
            matches = slow_yolov5_targets((height, width), stride, level_anchors, gt)
            if ota:
                matches = [match[1:] for match in chosen[n] if match[0] == index]
            for a, y, x, j in matches:
                row = level[n, a, y, x]
                overlap = complete_iou(decoded(row, x, y, stride, level_anchors[a]), gt[j])
                wanted[n, a, y, x] = max(wanted[n, a, y, x], overlap)
                box += 1 - overlap
                for k in range(channels - 5):
                    classes += entropy(sigmoid(row[5 + k]), float(k == labels[j]))
                number += 1
        if number:
            sums["box"] += box / number
            sums["cls"] += classes / number / (channels - 5) if channels > 6 else 0
        cells = [entropy(sigmoid(z), t) for z, t in zip(level[..., 4].flat, wanted.flat)]
        sums["obj"] += weight * sum(cells) / len(cells)
    losses = {name: gain * sums[name] for name, gain in zip(("box", "obj", "cls"), gains)}
    return {**losses, "total": len(targets) * sum(losses.values())}

"""Loops over boxes and priors, for the assigners."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def random_boxes(number: int, generator: torch.Generator) -> Tensor:
    corner = torch.rand(number, 2, generator=generator) * 100
    size = torch.rand(number, 2, generator=generator) ** 2 * 100 + 3
    return torch.cat([corner, corner + size], 1)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area - width * height)


def slow_atss(levels: list[Tensor], gt: Tensor, candidates: int) -> list[int]:
    anchors = torch.cat(levels).double().tolist()
    middle = [((a[0] + a[2]) / 2, (a[1] + a[3]) / 2) for a in anchors]
    assigned, best = [-1] * len(anchors), [-1.0] * len(anchors)
    for number, box in enumerate(gt.double().tolist()):
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        chosen, first = [], 0
        for level in levels:
            indices = range(first, first + len(level))
            chosen += sorted(indices, key=lambda i: math.dist(middle[i], (x, y)))[:candidates]
            first += len(level)
        ious = [iou(anchors[i], box) for i in chosen]
        threshold = np.mean(ious) + np.std(ious, ddof=1)
        for i, overlap in zip(chosen, ious):
            depth = min(
                *(middle[i][0] - box[0], middle[i][1] - box[1]),
                *(box[2] - middle[i][0], box[3] - middle[i][1]),
            )
            if overlap >= threshold and depth > 0.01 and overlap > best[i]:
                assigned[i], best[i] = number, overlap
    return assigned


def slow_nearest(points: Tensor, strides: Tensor, gt: Tensor, scale: float) -> list[int]:
    levels = sorted({int(math.log2(s)) for s in strides.tolist()})
    assigned, best = [-1] * len(points), [math.inf] * len(points)
    for number, (x1, y1, x2, y2) in enumerate(gt.double().tolist()):
        width, height = x2 - x1, y2 - y1
        level = math.floor((math.log2(width / scale) + math.log2(height / scale)) / 2)
        level = min(max(level, levels[0]), levels[-1])
        nearest, nearest_distance = -1, math.inf
        for i, ((x, y), stride) in enumerate(zip(points.double().tolist(), strides.tolist())):
            away = ((x - (x1 + x2) / 2) / width, (y - (y1 + y2) / 2) / height)
            if stride == 2**level and math.hypot(*away) < nearest_distance:
                nearest, nearest_distance = i, math.hypot(*away)
        if nearest_distance < best[nearest]:
            assigned[nearest], best[nearest] = number, nearest_distance
    return assigned

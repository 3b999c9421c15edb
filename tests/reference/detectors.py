"""Inputs and reference outputs of RTMDet, RTMDet-Ins, YOLOX, YOLOv5 and YOLOv7.

The outputs in ``detectors.json`` are those of the authors' code. Its inputs are rebuilt here from
``torch.rand`` of a CPU generator in float64, always in the same order. Two images of 160x160 pixels
have 6 and 3 objects of 5 classes; ``crowded`` doubles them. The levels have strides 8, 16 and 32.
"Guided" predictions aim at a random box of the image, with noise.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SIZE, STRIDES, CLASSES, COUNTS = 160, (8, 16, 32), 5, (6, 3)
ANCHORS = torch.tensor(
    [
        [[10.0, 13], [16, 30], [33, 23]],
        [[30, 61], [62, 45], [59, 119]],
        [[116, 90], [156, 198], [373, 326]],
    ]
)
REFERENCE: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
TOLERANCE = 2e-5  # relative; the reference has six digits


class Scene(NamedTuple):
    """Ground truth of one image: (M, 4) XYXY in pixels and (M,) classes."""

    boxes: Tensor
    classes: Tensor


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def scenes(seed: int) -> tuple[torch.Generator, list[Scene]]:
    """Return the ground truth of both images, and the generator that draws the predictions."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for number in COUNTS:
        u = draw(generator, number, 5)
        centre = SIZE * (0.1 + 0.8 * u[:, :2])
        side = SIZE * (0.05 + 0.55 * u[:, 2:4] ** 2)
        boxes = torch.cat([centre - side / 2, centre + side / 2], 1).clamp(0, SIZE)
        images.append(Scene(boxes, (u[:, 4] * CLASSES).floor().long()))
    return generator, images


def crowded(images: list[Scene]) -> list[Scene]:
    """Add to each object another, two pixels to the lower right, of the next class."""
    return [
        Scene(
            torch.cat([x.boxes, (x.boxes + 2).clamp(0, SIZE)]),
            torch.cat([x.classes, (x.classes + 1) % CLASSES]),
        )
        for x in images
    ]


def emptied(images: list[Scene], which: str) -> list[Scene]:
    """Remove the objects of the ``second`` image, or of ``both``."""
    empty = [Scene(x.boxes[:0], x.classes[:0]) for x in images]
    return empty if which == "both" else [images[0], empty[1]]


def maps(generator: torch.Generator, channels: int, low: float, high: float) -> list[Tensor]:
    """Return one (2, channels, H, W) map per level, uniform in [low, high)."""
    return [
        low + (high - low) * draw(generator, len(COUNTS), channels, SIZE // s, SIZE // s)
        for s in STRIDES
    ]


def aims(generator: torch.Generator, images: list[Scene]) -> list[Tensor]:
    """Return a random box of the image for each cell, one (2, 4, H, W) map per level."""
    levels = []
    for s in STRIDES:
        u = draw(generator, len(COUNTS), SIZE // s, SIZE // s)
        boxes = [x.boxes[(v * len(x.boxes)).floor().long()] for x, v in zip(images, u)]
        levels.append(torch.stack(boxes).permute(0, 3, 1, 2))
    return levels


def corners(stride: int) -> Tensor:
    """Return the (2, H, W) x, y of the top left corners of the cells of a level."""
    at = torch.arange(0, SIZE, stride, dtype=torch.float64)
    return torch.stack(torch.meshgrid(at, at, indexing="xy"))


def flat(levels: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Concatenate (2, C, H, W) maps to (2, P, C)."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in levels], 1).to(dtype)


def points(offset: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return (P, 2) points, ``offset`` strides after the corner of their cells, and strides."""
    at = torch.cat([(corners(s) + offset * s).flatten(1).T for s in STRIDES])
    strides = torch.cat([torch.full(((SIZE // s) ** 2,), float(s)) for s in STRIDES])
    return at.to(dtype), strides.to(dtype)


class RTMDetInputs(NamedTuple):
    """Predictions of RTMDet on all levels, and the parts that only RTMDet-Ins has.

    Attributes:
        images: ground truth.
        logits: (2, P, 5).
        distances: (2, P, 4) left, top, right and bottom in pixels.
        kernels: (2, P, 169).
        prototypes: (2, 8, 20, 20).
    """

    images: list[Scene]
    logits: Tensor
    distances: Tensor
    kernels: Tensor
    prototypes: Tensor

    def boxes(self) -> Tensor:
        """Return the (2, P, 4) XYXY boxes."""
        at, _ = points(0, self.distances.dtype)
        return torch.cat([at - self.distances[..., :2], at + self.distances[..., 2:]], 2)

    def masks(self, image: int) -> Tensor:
        """Return (M, 160, 160) bool: the upper left triangle of each box of an image."""
        at = torch.arange(SIZE, dtype=torch.float64) + 0.5
        x1, y1, x2, y2 = self.images[image].boxes[..., None, None].unbind(1)
        x, y = at[None], at[:, None]
        return (x > x1) & (y > y1) & ((x - x1) / (x2 - x1) + (y - y1) / (y2 - y1) < 1)


def rtmdet_inputs(seed: int, guided: bool, dtype: torch.dtype = torch.float32) -> RTMDetInputs:
    generator, images = scenes(seed)
    logits = maps(generator, CLASSES, -5, 1)
    if guided:
        distances = []
        aimed, noise = aims(generator, images), maps(generator, 4, -0.15, 0.15)
        for box, error, s in zip(aimed, noise, STRIDES):
            exact = torch.cat([corners(s) - box[:, :2], box[:, 2:] - corners(s)], 1)
            distances.append(exact + error * (box[:, 2:] - box[:, :2]).repeat(1, 2, 1, 1))
    else:
        distances = [x * s for x, s in zip(maps(generator, 4, 0, 3), STRIDES)]
    kernels = maps(generator, 169, -0.5, 0.5)
    prototypes = -1 + 2 * draw(generator, len(COUNTS), 8, SIZE // 8, SIZE // 8)
    flattened = [flat(x, dtype) for x in (logits, distances, kernels)]
    return RTMDetInputs(images, *flattened, prototypes.to(dtype))


class YOLOXInputs(NamedTuple):
    """Predictions of YOLOX on all levels.

    Attributes:
        images: ground truth.
        logits: (2, P, 5).
        regression: (2, P, 4) x, y from the cells' corners, log width and height, in strides.
        objectness: (2, P) logits.
    """

    images: list[Scene]
    logits: Tensor
    regression: Tensor
    objectness: Tensor

    def boxes(self) -> Tensor:
        """Return the (2, P, 4) XYXY boxes."""
        at, strides = points(0, self.regression.dtype)
        centre = at + self.regression[..., :2] * strides[:, None]
        half = self.regression[..., 2:].exp() * strides[:, None] / 2
        return torch.cat([centre - half, centre + half], 2)


def yolox_inputs(seed: int, guided: bool, dtype: torch.dtype = torch.float32) -> YOLOXInputs:
    generator, images = scenes(seed)
    logits = maps(generator, CLASSES, -3, 1)
    if guided:
        regression = []
        aimed, noise = aims(generator, images), maps(generator, 4, -0.2, 0.2)
        for box, error, s in zip(aimed, noise, STRIDES):
            side = box[:, 2:] - box[:, :2]
            centre = (box[:, :2] + box[:, 2:]) / 2 + error[:, :2] * side
            place = (centre - corners(s)) / s
            regression.append(torch.cat([place, (side / s).log() + error[:, 2:]], 1))
    else:
        regression = maps(generator, 4, -1, 1.5)
    objectness = flat(maps(generator, 1, -3, 1), dtype)[..., 0]
    return YOLOXInputs(images, flat(logits, dtype), flat(regression, dtype), objectness)


class YOLOv5Inputs(NamedTuple):
    """Predictions of YOLOv5 or YOLOv7, one (2, 3, H, W, 5 + 5) map per level, and the truth."""

    images: list[Scene]
    maps: list[Tensor]

    def targets(self) -> list[dict[str, Tensor]]:
        return [{"gt_boxes": b.to(self.maps[0].dtype), "gt_classes": c} for b, c in self.images]


def yolov5_inputs(seed: int, crowd: bool, dtype: torch.dtype = torch.float32) -> YOLOv5Inputs:
    generator, images = scenes(seed)
    levels = [
        -2 + 4 * draw(generator, len(COUNTS), 3, SIZE // s, SIZE // s, 5 + CLASSES) for s in STRIDES
    ]
    return YOLOv5Inputs(crowded(images) if crowd else images, [x.to(dtype) for x in levels])

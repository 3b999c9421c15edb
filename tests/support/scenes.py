"""Random predictions and ground truth of one image, for assigners and losses of detectors."""

from typing import NamedTuple

import torch
from torch import Tensor

from tests.reference.assign import random_boxes

CANVAS, STRIDES = 96, (8, 16, 32)


class Image(NamedTuple):
    """Predictions and ground truth of one image.

    Attributes:
        logits: (P, K).
        objectness: (P,) logits.
        boxes: (P, 4) XYXY.
        points: (P, 2) centres of the cells.
        strides: (P,).
        gt: (M, 4) XYXY.
        classes: (M,).
    """

    logits: Tensor
    objectness: Tensor
    boxes: Tensor
    points: Tensor
    strides: Tensor
    gt: Tensor
    classes: Tensor


def random_image(seed: int, number: int, classes: int = 3) -> Image:
    """Return ``number`` objects in float64, at which the predictions aim with noise."""
    generator = torch.Generator().manual_seed(seed)
    points, strides = [], []
    for stride in STRIDES:
        at = torch.arange(0, CANVAS, stride) + stride / 2
        points.append(torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).flatten(0, 1))
        strides.append(torch.full((len(at) ** 2,), float(stride)))
    count = sum(len(x) for x in points)
    gt = random_boxes(number, generator)
    aimed = random_boxes(count, generator)
    if number:
        aimed = gt[torch.randint(number, (count,), generator=generator)]
    noise = torch.rand(count, 4, generator=generator, dtype=torch.float64) * 16 - 8
    boxes = aimed + noise
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:].maximum(boxes[:, :2] + 1)], 1)
    return Image(
        torch.randn(count, classes, generator=generator, dtype=torch.float64),
        torch.randn(count, generator=generator, dtype=torch.float64),
        boxes,
        torch.cat(points).double(),
        torch.cat(strides).double(),
        gt.double(),
        torch.randint(classes, (number,), generator=generator),
    )

"""Test that the inputs of the authors' numbers are rebuilt, on any version of torch."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.detectors import (
    REFERENCE,
    SIZE,
    STRIDES,
    TOLERANCE,
    rtmdet_inputs,
    scenes,
    yolov5_inputs,
    yolox_inputs,
)
from tests.support.cases import for_each

approx = partial(pytest.approx, rel=TOLERANCE, abs=1e-3)


def sums(flattened: Tensor) -> list[float]:
    """Return the sum of each level of (2, P, ...) predictions."""
    return [x.sum().item() for x in flattened.split([(SIZE // s) ** 2 for s in STRIDES], 1)]


@for_each("seed", REFERENCE["boxes"])
def test_ground_truth(seed: str) -> None:
    _, images = scenes(int(seed))
    assert [x.classes.tolist() for x in images] == REFERENCE["labels"][seed]
    for found, expected in zip(images, REFERENCE["boxes"][seed]):
        assert torch.allclose(found.boxes, torch.tensor(expected).double(), atol=1e-3)


@for_each("case", REFERENCE["sums"]["rtmdet"])
def test_rtmdet(case: Any) -> None:
    x = rtmdet_inputs(case["seed"], case["guided"], torch.float64)
    for name, values in (("cls", x.logits), ("distance", x.distances), ("kernels", x.kernels)):
        assert sums(values) == approx(case[name]), name
    assert x.prototypes.sum().item() == approx(case["mask_features"])


@for_each("case", REFERENCE["sums"]["yolox"])
def test_yolox(case: Any) -> None:
    x = yolox_inputs(case["seed"], case["guided"], torch.float64)
    for name, values in (("cls", x.logits), ("reg", x.regression), ("obj", x.objectness)):
        assert sums(values) == approx(case[name]), name


@for_each("case", REFERENCE["sums"]["yolov5"])
def test_yolov5(case: Any) -> None:
    x = yolov5_inputs(case["seed"], case["crowded"], torch.float64)
    assert [level.sum().item() for level in x.maps] == approx(case["p"])
    assert sum(len(image.boxes) for image in x.images) == case["targets_rows"]

"""Compare an INT8 file with its network before quantization, and with the rounded network."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..utils.text import shortened
from .graphs import Graph, Values
from .parity import (
    SHOWN,
    ParityError,
    extreme_shapes,
    ious,
    labels_of,
    network_pixels,
    reference,
)
from .runner import Array, Prediction, Size, network_input, postprocessed
from .writer import Exported

SURE = 0.3  # score of the detections that are looked for in the file
SAME_OBJECT = 0.5  # least IoU of a detection and its partner
ALLOWED = 0.02  # deviation from the rounded network, if rounding itself deviates less


@dataclass
class Int8Report:
    """Differences between an INT8 file and its network.

    A deviation is the root mean square of the differences of an output of a layer, divided by that
    of the output of the network. The largest one of all outputs and images is kept.

    Attributes:
        ranges: "training", or the method and the number of images.
        weights: number of weights of layers that are integers in the file.
        images: number of compared images.
        deviation: deviation of the file from the network.
        rounding: deviation of the file from the network that rounds as the file does.
        detections: number of detections of the network with a score of at least :data:`SURE`.
        found: number of those whose object the file has found, too, as the same class.
        score: largest difference of their scores.
        pixels: smallest share of pixels with the same class.
        faults: sentences about outputs that are not explained by rounding.
    """

    ranges: str
    weights: int
    images: int = 0
    deviation: float = 0.0
    rounding: float = 0.0
    detections: int = 0
    found: int = 0
    score: float = 0.0
    pixels: float = 1.0
    faults: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise a ParityError if there are faults."""
        if self.faults:
            raise ParityError(
                "The INT8 file does not compute what its rounded network does, so it is not kept: "
                f"{shortened(self.faults, SHOWN, '; ')}. Sums of 8-bit integers overflow on x86 "
                "CPUs without VNNI; use another CPU, or the file without --int8."
            )


def compare_int8(
    network: Graph,
    rounded: Graph,
    full: Exported,
    kept: Exported,
    images: Iterable[Image.Image],
    report: Int8Report,
) -> None:
    """Compare an INT8 file with its network on some images, and on images of extreme shapes.

    Args:
        network: graph of the network, with raw outputs only.
        rounded: the same graph of the rounded network.
        full: file with all outputs.
        kept: file with the outputs that are kept.
        images: RGB images.
        report: receives the result.
    """
    for image in images:
        report.images += 1
        pixels = network_pixels(image, full.info)
        compare_outputs(network, rounded, full, pixels, report)
        if kept.info["postprocessing"] == "inside":
            size, image_size = (image.height, image.width), image_size_of(pixels)
            truth = reference(network.model, pixels, size, full.info)
            outputs = kept(network_input(pixels, full.info), image_size)
            found = postprocessed(outputs, image_size, size, kept.info)
            compare_detections(truth, found, report)
    for pixels in () if full.info["size"] else extreme_shapes(full.info):
        compare_outputs(network, rounded, full, pixels, report)


@torch.no_grad()
def compare_outputs(
    network: Graph, rounded: Graph, full: Exported, pixels: Array, report: Int8Report
) -> None:
    """Compare the outputs of layers on (3, h, w) pixels; arguments as :func:`compare_int8`."""
    image, size = network_input(pixels, full.info), image_size_of(pixels)
    found = full(image, size)
    inputs = torch.from_numpy(image), torch.tensor(size)
    given: Values = {k: torch.from_numpy(v) for k, v in found.items()}
    exact, expected = (x.raw_values(*inputs, given) for x in (network, rounded))
    for name, value in exact.items():
        scale = root_mean_square(value.numpy())
        if name == "proposals" or not scale:
            continue
        own, from_rounded, noise = (
            root_mean_square(a - b) / scale
            for a, b in (
                (found[name], value.numpy()),
                (found[name], expected[name].numpy()),
                (value.numpy(), expected[name].numpy()),
            )
        )
        report.deviation = max(report.deviation, own)
        report.rounding = max(report.rounding, from_rounded)
        if not from_rounded <= max(ALLOWED, noise):  # also true for NaN
            report.faults.append(
                f"{name} deviates by {from_rounded:.1%} (rounding itself by {noise:.1%})"
            )


def image_size_of(pixels: Array) -> Size:
    """Return the height and width of (3, h, w) pixels."""
    return pixels.shape[1], pixels.shape[2]


def root_mean_square(x: Any) -> float:
    """Return the root mean square of an array, 0 for an empty one."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) if x.size else 0.0


def compare_detections(truth: Prediction, found: Prediction, report: Int8Report) -> None:
    """Look for the sure detections of the network, ``truth``, among those of the file."""
    free = np.ones(len(found.scores), bool)
    for box, score, label in zip(truth.boxes, truth.scores, truth.classes):
        if score < SURE:
            continue
        report.detections += 1
        overlap = ious(box, found.boxes) * (free & (found.classes == label))
        if overlap.size and overlap.max() >= SAME_OBJECT:
            k = int(overlap.argmax())
            free[k] = False
            report.found += 1
            report.score = max(report.score, abs(float(score - found.scores[k])))
    a, b = labels_of(truth), labels_of(found)
    if a is not None and b is not None:
        report.pixels = min(report.pixels, float((a == b).mean()))

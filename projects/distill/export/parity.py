"""Compare an exported file with the network that it was exported from."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import Tensor, nn

from ..errors import DistillError
from ..utils.text import clause, shortened
from .graphs import Graph
from .runner import (
    MASK_THRESHOLD,
    Array,
    Prediction,
    Size,
    network_input,
    postprocessed,
    resized,
)
from .writer import Exported, Info

RELATIVE = 1e-4  # largest :func:`disagreement` of a raw output
BOX_PIXELS = 0.1
SCORE = 1e-4
MASK_IOU = 0.999
PIXELS = 0.999  # smallest share of pixels with the same class or segment
NEAR = 1e-4  # a detection so near to a threshold may be found by only one of the two
ROUNDING_STEPS = 4  # change of an IoU by a rounding step of all coordinates, in steps / side
EXTREMES = ((1, 4), (4, 1))  # rows and columns of the coarsest level
SHOWN = 3  # differences in a message


class ParityError(DistillError):
    """An exported file that does not predict what its network predicts."""


@dataclass
class Parity:
    """Differences between an exported file and its network.

    Attributes:
        images: number of compared images.
        detections: number of pairs of detections.
        excused: detections near a threshold that only one of the two has.
        raw: largest :func:`disagreement` of a raw output.
        box, score: largest difference of a pair, in pixels and as a probability.
        mask_iou: smallest IoU of the masks of a pair.
        pixels: smallest share of pixels with the same class or segment.
        faults: sentences about the differences that are too large.
    """

    images: int = 0
    detections: int = 0
    excused: int = 0
    raw: float = 0.0
    box: float = 0.0
    score: float = 0.0
    mask_iou: float = 1.0
    pixels: float = 1.0
    faults: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise a ParityError if there are faults."""
        if self.faults:
            raise ParityError(
                "The exported file differs from its network, so it is not kept: "
                f"{shortened(self.faults, SHOWN, '; ')}. Use the other --format, or report it."
            )


def compare(
    model: nn.Module,
    graph: Graph,
    full: Exported,
    kept: Exported,
    images: Iterable[Image.Image],
) -> Parity:
    """Compare a file with its network on some images.

    Raw outputs are compared element by element. The detections of the network's own inference are
    compared with those of the file one to one, in the size of the original image.

    The second stage of an R-CNN is compared for the proposals of the file. A proposal may be as
    near to a threshold as a detection.

    A file for any size is also compared on images of extreme shapes. An exporter may have taken a
    number of rows or columns for a constant.

    Args:
        model: the network.
        graph: its graph, with raw outputs only.
        full: file with all outputs.
        kept: file with the outputs that are kept.
        images: RGB images.
    """
    parity = Parity()
    for number, image in enumerate(images, 1):
        parity.images = number
        pixels = network_pixels(image, full.info)
        compare_image(model, graph, full, kept, pixels, (image.height, image.width), parity)
    for pixels in () if full.info["size"] else extreme_shapes(full.info):
        size = pixels.shape[1], pixels.shape[2]
        compare_image(model, graph, full, kept, pixels, size, parity)
    return parity


def compare_image(
    model: nn.Module,
    graph: Graph,
    full: Exported,
    kept: Exported,
    pixels: Array,
    size: Size,
    parity: Parity,
) -> None:
    """Compare a file with its network on one image.

    Args:
        model, graph, full, kept: as in :func:`compare`.
        pixels: (3, h, w) resized image in the network's channel order.
        size: height and width of the original image.
        parity: receives the result.
    """
    inputs = network_input(pixels, full.info)
    image_size = pixels.shape[1], pixels.shape[2]
    try:
        outputs, final = full(inputs, image_size), kept(inputs, image_size)
    except Exception as e:  # onnxruntime has a type for each of its faults
        shape = " x ".join(map(str, inputs.shape[2:]))
        parity.faults.append(f"the file fails for an input of {shape} pixels: {clause(e)}")
        return
    compare_raw(graph, outputs, inputs, image_size, parity)
    if kept.info["postprocessing"] == "inside":
        truth = reference(model, pixels, size, full.info, outputs.get("proposals"))
        found = postprocessed(final, image_size, size, kept.info)
        undecided = undecided_pixels(final, image_size, size, kept.info)
        compare_predictions(truth, found, full.info, image_size, parity, undecided)


def extreme_shapes(info: Info) -> Iterator[Array]:
    """Yield (3, h, w) images of noise with one and with several cells of the coarsest level."""
    stride = info["coarsest_stride"]
    for seed, (rows, columns) in enumerate(EXTREMES):
        shape = 3, rows * stride - 1, columns * stride - 1
        yield np.random.default_rng(seed).random(shape, np.float32) * 255


def undecided_pixels(outputs: Any, image_size: Size, size: Size, info: Info) -> Array | None:
    """Return (D, height, width) bool, True where a mask is near its threshold; None without masks.

    The arguments are those of :func:`~distill.export.runner.postprocessed`.
    """
    lower, upper = (
        postprocessed(outputs, image_size, size, info, MASK_THRESHOLD + x).masks
        for x in (-NEAR, NEAR)
    )
    return None if lower is None or upper is None else lower & ~upper


def network_pixels(image: Image.Image, info: Info) -> Array:
    """Return the (3, h, w) pixels of the resized image in the network's channel order."""
    pixels = np.asarray(resized(image, info), np.float32).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels[::-1] if info["input_format"] == "BGR" else pixels)


# ---- The network's own inference.


@torch.no_grad()
def reference(
    model: nn.Module, pixels: Array, size: Size, info: Info, proposals: Array | None = None
) -> Prediction:
    """Return the prediction of the network's own inference.

    Args:
        model: the network.
        pixels: (3, h, w) resized image.
        size: height and width of the original image.
        info: metadata, whose fixed size the network gets, too.
        proposals: (P, 4) XYXY for the second stage of an R-CNN; None: its own.
    """
    entry = {"image": torch.from_numpy(pixels), "height": size[0], "width": size[1]}
    with padded_to(model, info), proposing(model, proposals):
        (output,) = model([entry])
    return as_prediction(output, size)


def as_prediction(output: dict[str, Any], size: Size) -> Prediction:
    """Convert the output of a detectron2 network for one image."""
    found = output.get("instances", Instances(size)).to("cpu")
    boxes, scores, classes = np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64)
    if found.has("pred_boxes"):
        boxes, scores = found.pred_boxes.tensor.numpy(), found.scores.numpy()
        classes = found.pred_classes.numpy()
    prediction = Prediction(size, boxes, scores, classes)
    if found.has("pred_masks"):
        prediction.masks = found.pred_masks.numpy()
    if "sem_seg" in output:
        prediction.sem_seg = output["sem_seg"].cpu().numpy()
    if "panoptic_seg" in output:
        segments, prediction.segments_info = output["panoptic_seg"]
        prediction.segments = segments.cpu().numpy()
    return prediction


@contextmanager
def padded_to(model: Any, info: Info) -> Iterator[None]:
    """Pad images to the fixed size of a file, if it has one, before the backbone."""
    if not info["size"]:
        yield
        return
    height, width = info["size"]
    pad_value = getattr(model, "pad_value", None)
    own = model.backbone.forward

    def forward(x: Tensor) -> Any:
        old = x.shape[-2:]
        padded = F.pad(x, (0, width - old[1], 0, height - old[0]))
        if pad_value is not None:
            value = ((pad_value - model.pixel_mean) / model.pixel_std)[None]
            padded[..., old[0] :, :] = value
            padded[..., old[1] :] = value
        return own(padded)

    with patch.object(model.backbone, "forward", forward):
        yield


@contextmanager
def proposing(model: Any, proposals: Array | None) -> Iterator[None]:
    """Give the second stage of an R-CNN these (P, 4) proposals."""
    if proposals is None or not isinstance(model, GeneralizedRCNN):
        yield
        return

    def forward(images: Any, features: Any, targets: Any = None) -> Any:
        boxes = Boxes(torch.from_numpy(proposals))
        return [Instances(images.image_sizes[0], proposal_boxes=boxes)], {}

    with patch.object(model.proposal_generator, "forward", forward):
        yield


# ---- Comparisons.


@torch.no_grad()
def compare_raw(
    graph: Graph, found: dict[str, Array], image: Array, size: Size, parity: Parity
) -> None:
    """Compare the raw outputs of a file, ``found``, with those of a graph."""
    inputs = torch.from_numpy(image), torch.tensor(size)
    values = graph.raw_values(*inputs, {k: torch.from_numpy(v) for k, v in found.items()})
    for name, value in values.items():
        expected, actual = value.numpy(), found[name]
        if name == "proposals":
            compare_proposals(expected, actual, graph, parity)
            continue
        difference = disagreement(actual, expected)
        parity.raw = max(parity.raw, difference)
        if not difference <= RELATIVE:  # also true for NaN
            parity.faults.append(f"{name} differs by {difference:.1e} (at most {RELATIVE:.0e})")


def disagreement(actual: Array, expected: Array) -> float:
    """Return the largest relative difference of two maps.

    A difference is divided by the size of the element, or by the root mean square of the map if
    that is larger. So elements near 0 count as rounding errors of the map. Maps of different shapes
    differ infinitely.
    """
    if actual.shape != expected.shape:
        return float("inf")
    if not actual.size:
        return 0.0
    scale = np.maximum(np.abs(expected), np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    difference = np.abs(actual - expected)
    with np.errstate(divide="ignore"):  # a map of zeros
        ratio = np.divide(difference, scale, out=np.zeros(scale.shape), where=difference != 0)
    return float(ratio.max())


def compare_predictions(
    truth: Prediction,
    found: Prediction,
    info: Info,
    image_size: Size,
    parity: Parity,
    undecided: Array | None = None,
) -> None:
    """Compare the prediction of a file, ``found``, with that of its network, ``truth``.

    Pixels of masks that are ``undecided`` are not compared.
    """
    pairs = matched(truth, found)
    for i, j in pairs:
        parity.box = max(parity.box, float(np.abs(truth.boxes[i] - found.boxes[j]).max()))
        parity.score = max(parity.score, abs(float(truth.scores[i] - found.scores[j])))
        if truth.masks is not None and found.masks is not None:
            decided = True if undecided is None else ~undecided[j]
            iou = mask_iou(truth.masks[i] & decided, found.masks[j] & decided)
            parity.mask_iou = min(parity.mask_iou, iou)
            if iou < MASK_IOU:
                parity.faults.append(f"a mask has an IoU of {iou:.4f} (at least {MASK_IOU})")
    parity.detections += len(pairs)
    zoom = max(truth.size[0] / image_size[0], truth.size[1] / image_size[1])
    limits = Limits.from_info(info, zoom)
    compare_unmatched(truth, found, pairs, limits, "detection", parity)
    for name, a, b in (
        ("classes", labels_of(truth), labels_of(found)),
        ("segments", categories_of(truth), categories_of(found)),
    ):
        if a is None or b is None:
            continue
        share = float((a == b).mean())
        parity.pixels = min(parity.pixels, share)
        if share < PIXELS:
            parity.faults.append(f"only {share:.2%} of the pixels have the same {name}")


def matched(truth: Prediction, found: Prediction) -> list[tuple[int, int]]:
    """Return pairs of detections of the same class, with boxes and scores as near as required.

    Each detection is in one pair at most; the nearest boxes are paired first.
    """
    distance = np.abs(truth.boxes[:, None] - found.boxes[None]).max(2, initial=0)
    near = (
        (distance <= BOX_PIXELS)
        & (np.abs(truth.scores[:, None] - found.scores[None]) <= SCORE)
        & (truth.classes[:, None] == found.classes[None])
    )
    rows, columns = near.nonzero()
    pairs: dict[int, int] = {}
    for k in distance[rows, columns].argsort(kind="stable"):
        if rows[k] not in pairs and columns[k] not in pairs.values():
            pairs[int(rows[k])] = int(columns[k])
    return list(pairs.items())


class Limits(NamedTuple):
    """Thresholds by which detections are selected.

    Attributes:
        score: a detection has a larger score.
        iou: NMS removes a box with a larger IoU.
        most: number of detections that are kept at most; below 0: all.
        zoom: pixels of the boxes per pixel of the network's input.
    """

    score: float
    iou: float
    most: int
    zoom: float = 1.0

    @classmethod
    def from_info(cls, info: Info, zoom: float) -> "Limits":
        if "nms_threshold" not in info:  # a semantic segmenter, which has no detections
            return cls(0, 1, 0)
        return cls(info["score_threshold"], info["nms_threshold"], info["max_detections"], zoom)

    def full(self, prediction: Prediction) -> bool:
        return 0 <= self.most <= len(prediction.scores)

    def iou_margin(self, prediction: Prediction, k: int) -> float:
        """Return the distance from the IoU threshold at which either result is right.

        NMS moves the boxes of each class apart, so it rounds their coordinates in pixels of the
        network's input. A shift of all sides by d changes an IoU by about 4 d / side.
        """
        box = prediction.boxes[k]
        side = max(float((box[2:] - box[:2]).min()), 1e-6)
        farthest = (prediction.boxes.max() / self.zoom + 1) * (prediction.classes[k] + 1)
        step = self.zoom * float(np.spacing(np.float32(farthest)))
        return NEAR + ROUNDING_STEPS * step / side


def compare_unmatched(
    truth: Prediction,
    found: Prediction,
    pairs: Sequence[tuple[int, int]],
    limits: Limits,
    kind: str,
    parity: Parity,
) -> None:
    """Count the detections without a partner; those that no threshold excuses are faults."""
    single = [
        sorted(set(range(len(x.scores))) - {pair[side] for pair in pairs})
        for side, x in enumerate((truth, found))
    ]
    others = Prediction(
        truth.size,
        *(
            np.concatenate([getattr(x, name)[rows] for x, rows in zip((truth, found), single)])
            for name in ("boxes", "scores", "classes")
        ),
    )
    for own, other, rows, owner in (
        (truth, found, single[0], "network"),
        (found, truth, single[1], "file"),
    ):
        for k in rows:
            if is_excused(own, k, other, others, limits):
                parity.excused += 1
                continue
            box = ", ".join(f"{x:.1f}" for x in own.boxes[k])
            parity.faults.append(
                f"only the {owner} has a {kind} of class {own.classes[k]} with score "
                f"{own.scores[k]:.4f} at ({box})"
            )


def is_excused(
    own: Prediction, k: int, other: Prediction, unmatched: Prediction, limits: Limits
) -> bool:
    """Return True if rounding errors may decide whether detection ``k`` is kept.

    Its score is near the threshold or the smallest one of a full list. Or its IoU with a better box
    of its class is near the threshold of NMS. Or a better box, which only one of the two has,
    removes it.

    Args:
        own: prediction with the detection.
        k: its row.
        other: prediction without it.
        unmatched: all detections that only one of the two has.
        limits: the thresholds.
    """
    score = own.scores[k]
    if score <= limits.score + SCORE:
        return True
    if limits.full(other) and score <= other.scores.min() + SCORE:
        return True
    margin = limits.iou_margin(own, k)
    for x in (own, other):
        better = (x.classes == own.classes[k]) & (x.scores >= score - SCORE)
        if (np.abs(ious(own.boxes[k], x.boxes[better]) - limits.iou) <= margin).any():
            return True
    better = (unmatched.classes == own.classes[k]) & (unmatched.scores > score + SCORE)
    return bool((ious(own.boxes[k], unmatched.boxes[better]) > limits.iou - margin).any())


def compare_proposals(expected: Array, actual: Array, graph: Graph, parity: Parity) -> None:
    """Compare the proposals of an R-CNN, (P, 4) XYXY by descending objectness.

    The rank takes the place of the score. Ten ranks are as much as scores may differ.
    """
    rpn = graph.model.proposal_generator
    truth, found = (
        Prediction((1, 1), x, np.arange(len(x)) * -SCORE / 10, np.zeros(len(x), np.int64))
        for x in (expected, actual)
    )
    limits = Limits(-np.inf, rpn.nms_thresh, rpn.post_nms_topk[False])
    compare_unmatched(truth, found, matched(truth, found), limits, "proposal", parity)


def ious(box: Array, boxes: Array) -> Array:
    """Return the (P,) IoU of an XYXY box (4,) with boxes (P, 4)."""
    shared = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    overlap = shared.clip(0).prod(1)
    union = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - overlap
    return overlap / np.maximum(union, 1e-12)


def mask_iou(a: Array, b: Array) -> float:
    """Return the IoU of two bool masks; 1 if both are empty."""
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def labels_of(prediction: Prediction) -> Array | None:
    """Return the (height, width) classes of the pixels, or None."""
    return None if prediction.sem_seg is None else prediction.sem_seg.argmax(0)


def categories_of(prediction: Prediction) -> Array | None:
    """Return the (height, width) categories of the panoptic segments, or None.

    A category of things is even and one of stuff is odd; -1 is no segment. Ids of segments depend
    on the order of objects with equal scores.
    """
    if prediction.segments is None:
        return None
    table = np.full(len(prediction.segments_info) + 1, -1)
    for x in prediction.segments_info:
        table[x["id"]] = 2 * x["category_id"] + (not x["isthing"])
    return table[prediction.segments]

"""Run an exported network with onnxruntime, NumPy and Pillow only.

This file imports nothing else of the package. It may be copied next to an exported network::

    predictor = Predictor.from_onnx("model.onnx")
    prediction = predictor(read_image("image.jpg"))
    draw(image, prediction, predictor.classes).save("drawn.png")
"""

import colorsys
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

METADATA = "distill"  # key of the metadata, as JSON, in an exported file
MASK_THRESHOLD = 0.5
OPACITY = 0.45  # drawn masks in [0, 1]
GOLDEN = 0.618034  # hues at multiples of it are far from each other

Array = NDArray[Any]
Size = tuple[int, int]
"""Height and width in pixels."""
Run = Callable[[dict[str, Array]], dict[str, Array]]
"""Maps inputs by name to outputs by name."""


class ExportError(ValueError):
    """A file that is no network that :func:`Predictor.from_onnx` can run."""


@dataclass
class Prediction:
    """Result for one image, in its own size.

    Attributes:
        size: height and width of the image in pixels.
        boxes: (D, 4) XYXY in pixels, by descending score.
        scores: (D,) in [0, 1].
        classes: (D,) int64 indices of the class names.
        masks: (D, height, width) bool, or None if the network predicts no masks.
        sem_seg: (K, height, width) logits, or None if the network segments no classes.
        segments: (height, width) ids of panoptic segments, 0 for no segment; or None.
        segments_info: "id", "category_id", "isthing" and "score" or "area" of each segment.
    """

    size: Size
    boxes: Array
    scores: Array
    classes: Array
    masks: Array | None = None
    sem_seg: Array | None = None
    segments: Array | None = None
    segments_info: Sequence[dict[str, Any]] = ()

    def above(self, score: float) -> "Prediction":
        """Return this prediction without the objects of smaller scores."""
        kept = self.scores >= score
        masks = None if self.masks is None else self.masks[kept]
        found = self.boxes[kept], self.scores[kept], self.classes[kept], masks
        return Prediction(self.size, *found, self.sem_seg, self.segments, self.segments_info)


class Predictor:
    """An exported network with what has to be done before and after it.

    Args:
        run: the network.
        inputs: names of its inputs.
        info: its metadata.

    Raises:
        ExportError: if the file has no detections to read.
    """

    def __init__(self, run: Run, inputs: Sequence[str], info: Mapping[str, Any]):
        if info.get("postprocessing") != "inside":
            raise ExportError(
                "the file returns the outputs of the layers, without detections; export it with "
                "--postprocessing inside"
            )
        self.run = run
        self.inputs = inputs
        self.info = info

    @classmethod
    def from_onnx(cls, path: str, threads: int = 0) -> "Predictor":
        """Load an ONNX file.

        Args:
            path: file that ``distill export`` wrote.
            threads: threads of onnxruntime; 0: one per core.

        Raises:
            ExportError: if the file cannot be read, or ``distill export`` did not write it.
        """
        return cls(*onnx_network(path, threads))

    @property
    def classes(self) -> list[str]:
        """Names of the classes of objects."""
        return self.info["thing_classes"]

    @property
    def sem_seg_classes(self) -> list[str]:
        """Names of the classes of ``sem_seg``."""
        return self.info["stuff_classes"]

    def __call__(self, image: Image.Image) -> Prediction:
        """Return the prediction for an RGB image."""
        pixels = np.asarray(resized(image, self.info), dtype=np.float32).transpose(2, 0, 1)
        if self.info["input_format"] == "BGR":
            pixels = pixels[::-1]
        return self.predict(pixels, (image.height, image.width))

    def predict(self, pixels: Array, size: Size) -> Prediction:
        """Return the prediction for an image that is resized already.

        Args:
            pixels: (3, h, w) in the network's channel order, 0 ... 255.
            size: height and width of the original image, for which the result is.
        """
        image_size = pixels.shape[1], pixels.shape[2]
        feed = {
            "image": network_input(pixels, self.info),
            "image_size": np.array(image_size, np.int64),
        }
        outputs = self.run({name: feed[name] for name in self.inputs})
        return postprocessed(outputs, image_size, size, self.info)


def onnx_network(path: str, threads: int = 0) -> tuple[Run, list[str], dict[str, Any]]:
    """Return an ONNX file as a function, with the names of its inputs and its metadata.

    Args:
        path: file that ``distill export`` wrote.
        threads: threads of onnxruntime; 0: one per core.

    Raises:
        ExportError: if the file cannot be read, or ``distill export`` did not write it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        info = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    except KeyError:
        raise ExportError(f"'{path}' was not written by `distill export`") from None
    except Exception as e:  # onnxruntime has a type for each of its faults
        reason = " ".join(str(e).split())[:200]
        raise ExportError(f"'{path}' cannot be read by onnxruntime: {reason}") from e
    names = [x.name for x in session.get_outputs()]
    inputs = [x.name for x in session.get_inputs()]
    return lambda feed: dict(zip(names, session.run(names, feed))), inputs, info


# ---- Before the network.


def read_image(path: Any) -> Image.Image:
    """Read an image as RGB, turned as its EXIF data say."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def resized(image: Image.Image, info: Mapping[str, Any]) -> Image.Image:
    """Resize an image as detectron2's ``ResizeShortestEdge``, bilinearly.

    For a file of a fixed size, the image is smaller if it would not fit.
    """
    old = np.array([image.height, image.width])
    new = old.astype(np.float64)
    if info["min_size"]:
        new *= info["min_size"] / old.min()
        new *= min(info["max_size"] / new.max(), 1.0)
    if info["size"]:
        new *= min((np.array(info["size"]) / new).min(), 1.0)
    height, width = np.maximum((new + 0.5).astype(int), 1).tolist()
    shape = width, height
    return image if shape == image.size else image.resize(shape, Image.Resampling.BILINEAR)


def network_input(pixels: Array, info: Mapping[str, Any]) -> Array:
    """Pad (3, h, w) pixels at the bottom and right, and normalize them if the file does not.

    Returns:
        (1, 3, H, W) float32.

    Raises:
        ExportError: if the image is larger than the file's fixed size.
    """
    height, width = pixels.shape[1:]
    target = padded_size((height, width), info)
    if height > target[0] or width > target[1]:
        raise ExportError(
            f"the image has {height} x {width} pixels, but the file takes at most "
            f"{target[0]} x {target[1]}"
        )
    mean, std, padding = (
        np.array(info[key], np.float32)[:, None, None]
        for key in ("pixel_mean", "pixel_std", "pad_value")
    )
    padded = np.broadcast_to(padding, (3, *target)).copy()
    padded[:, :height, :width] = pixels
    if info["preprocessing"] == "outside":
        padded = (padded - mean) / std
    return padded[None]


def padded_size(size: Size, info: Mapping[str, Any]) -> Size:
    """Return the height and width of the network's input for an image."""
    if info["size"]:
        return tuple(info["size"])
    step = info["size_divisibility"]
    height, width = (math.ceil(n / step) * step for n in size)
    return height, width


# ---- After the network.


def postprocessed(
    outputs: Mapping[str, Array],
    image_size: Size,
    size: Size,
    info: Mapping[str, Any],
    threshold: float = MASK_THRESHOLD,
) -> Prediction:
    """Return the prediction in the size of the original image.

    Args:
        outputs: outputs of the network by name.
        image_size: height and width of the resized image, without padding.
        size: height and width of the original image.
        info: metadata of the file.
        threshold: probability from which a pixel is in a mask.
    """
    boxes = outputs.get("boxes", np.zeros((0, 4), np.float32))
    factors = np.array([size[1] / image_size[1], size[0] / image_size[0]] * 2, np.float32)
    boxes = (boxes * factors).clip(0, np.array([size[1], size[0]] * 2, np.float32))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    scores, classes = (outputs.get(k, np.zeros(0, np.int64))[kept] for k in ("scores", "classes"))
    prediction = Prediction(size, boxes[kept], scores, classes)
    if "roi_masks" in outputs:
        masks = outputs["roi_masks"][kept]
        prediction.masks = pasted(masks, prediction.boxes, size, threshold)
    if "image_masks" in outputs:
        logits = outputs["image_masks"][kept] - math.log(threshold / (1 - threshold))
        prediction.masks = enlarged_masks(logits, info["mask_stride"], image_size, size)
    if "sem_seg" in outputs:
        logits = outputs["sem_seg"][:, : image_size[0], : image_size[1]]
        prediction.sem_seg = resized_maps(logits, size)
    if "panoptic" in info:
        prediction.segments, prediction.segments_info = combined(prediction, **info["panoptic"])
    return prediction


def sampled(x: Array, positions: Array, axis: int) -> Array:
    """Interpolate linearly along an axis.

    Args:
        x: (..., n, ...).
        positions: (m,) indices, which may be fractions; they are clipped to [0, n − 1].
        axis: axis of n.

    Returns:
        (..., m, ...).
    """
    positions = positions.clip(0, x.shape[axis] - 1)
    low = positions.astype(np.int64)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    shape = [1] * x.ndim
    shape[axis] = len(positions)
    weight = (positions - low).astype(x.dtype).reshape(shape)
    return x.take(low, axis) * (1 - weight) + x.take(high, axis) * weight


def resized_maps(x: Array, size: Size) -> Array:
    """Resize (..., h, w) maps bilinearly, as torch does with ``align_corners`` False."""
    for axis, (old, new) in enumerate(zip(x.shape[-2:], size), x.ndim - 2):
        if old != new:
            x = sampled(x, (np.arange(new) + 0.5) * (old / new) - 0.5, axis)
    return x


def pasted(masks: Array, boxes: Array, size: Size, threshold: float = MASK_THRESHOLD) -> Array:
    """Paste masks on grids over their boxes into an image.

    Args:
        masks: (D, M, M) probabilities, 0 outside of the box.
        boxes: (D, 4) XYXY in pixels.
        size: height and width of the image.
        threshold: probability from which a pixel is in a mask.

    Returns:
        (D, height, width) bool.
    """
    result = np.zeros((len(masks), *size), bool)
    framed = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    for mask, box, target in zip(framed, boxes, result):
        region = []
        for axis, length in enumerate(size):
            start, end = box[1 - axis], box[3 - axis]
            first, last = max(math.floor(start) - 1, 0), min(math.ceil(end) + 1, length)
            share = (np.arange(first, last) + 0.5 - start) / (end - start)
            mask = sampled(mask, share * masks.shape[1 + axis] + 0.5, axis)
            region.append(slice(first, last))
        target[tuple(region)] = mask >= threshold
    return result


def enlarged_masks(logits: Array, stride: int, image_size: Size, size: Size) -> Array:
    """Return the masks of logits of the padded image.

    Logits are resized to the padded image, cut to the image, and resized to the original image.

    Args:
        logits: (D, h, w).
        stride: stride of the logits in pixels.
        image_size, size: as in :func:`postprocessed`.

    Returns:
        (D, height, width) bool.
    """
    result = np.zeros((len(logits), *size), bool)
    for x, target in zip(logits, result):
        pixels = resized_maps(x, (x.shape[0] * stride, x.shape[1] * stride))
        target[:] = resized_maps(pixels[: image_size[0], : image_size[1]], size) > 0
    return result


def combined(
    prediction: Prediction, overlap: float, stuff_area: float, score: float
) -> tuple[Array, list[dict[str, Any]]]:
    """Combine objects and semantic classes to panoptic segments, as detectron2's Panoptic FPN.

    Objects are placed by descending score. Semantic classes except 0, which stands for all things,
    fill the rest.

    Args:
        prediction: with masks and logits of semantic classes.
        overlap: an object is left out if a larger share of it is covered.
        stuff_area: smallest number of pixels of a segment without objects.
        score: smallest score of an object.

    Returns:
        ``segments`` and ``segments_info`` of a :class:`Prediction`.
    """
    assert prediction.masks is not None and prediction.sem_seg is not None
    segments = np.zeros(prediction.size, np.int32)
    info: list[dict[str, Any]] = []
    for k in np.argsort(-prediction.scores, kind="stable"):
        mask = prediction.masks[k]
        free = mask & (segments == 0)
        area = int(mask.sum())
        if prediction.scores[k] < score or area == 0 or (area - free.sum()) / area > overlap:
            continue
        segments[free] = len(info) + 1
        label, confidence = int(prediction.classes[k]), float(prediction.scores[k])
        info.append(
            {"id": len(info) + 1, "isthing": True, "category_id": label, "score": confidence}
        )
    labels = prediction.sem_seg.argmax(0)
    for label in np.unique(labels[segments == 0]).tolist():
        free = (labels == label) & (segments == 0)
        area = int(free.sum())
        if label == 0 or area < stuff_area:
            continue
        segments[free] = len(info) + 1
        info.append({"id": len(info) + 1, "isthing": False, "category_id": label, "area": area})
    return segments, info


# ---- Files for people and for programs.


def color(index: int) -> tuple[int, int, int]:
    """Return the RGB color of a class."""
    red, green, blue = colorsys.hsv_to_rgb(index * GOLDEN % 1, 0.75, 1.0)
    return int(255 * red), int(255 * green), int(255 * blue)


def draw(image: Image.Image, prediction: Prediction, classes: Sequence[str]) -> Image.Image:
    """Return an RGB image with the masks, boxes, class names and scores drawn on it.

    Without objects, semantic classes or segments are drawn.
    """
    pixels = np.array(image.convert("RGB"))
    for mask, index in drawn_masks(prediction):
        tint = np.array(color(index), np.float32) * OPACITY
        pixels[mask] = (pixels[mask] * (1 - OPACITY) + tint).astype(np.uint8)
    drawn = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(drawn)
    side = max(min(prediction.size), 1)
    font = ImageFont.load_default(max(side // 40, 10))
    found = zip(prediction.boxes.tolist(), prediction.scores, prediction.classes.tolist())
    for (left, top, right, bottom), score, index in found:
        canvas.rectangle((left, top, right, bottom), outline=color(index), width=1 + side // 400)
        text = f"{one_line(classes[index])} {score:.2f}"
        area = canvas.textbbox((left, top), text, font)
        canvas.rectangle(area, fill=color(index))
        canvas.text((left, top), text, (0, 0, 0), font)
    return drawn


def drawn_masks(prediction: Prediction) -> list[tuple[Array, int]]:
    """Return the masks to draw, and the index of the color of each."""
    if prediction.segments is not None:
        rows = prediction.segments_info
        return [(prediction.segments == x["id"], x["id"]) for x in rows]
    if prediction.masks is not None:
        return list(zip(prediction.masks, prediction.classes.tolist()))
    if prediction.sem_seg is not None:
        labels = prediction.sem_seg.argmax(0)
        return [(labels == index, index) for index in np.unique(labels).tolist()]
    return []


def one_line(text: str) -> str:
    """Replace every run of white space, and characters that cannot be printed, by one space."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def coco_annotations(prediction: Prediction, image_id: int) -> list[dict[str, Any]]:
    """Return the objects of an image as annotations in COCO's format, with a ``score``.

    ``category_id`` is the index of the class plus 1.
    """
    annotations = []
    for k, (left, top, right, bottom) in enumerate(prediction.boxes.tolist()):
        annotation: dict[str, Any] = {
            "image_id": image_id,
            "category_id": int(prediction.classes[k]) + 1,
            "bbox": [left, top, right - left, bottom - top],
            "area": (right - left) * (bottom - top),
            "iscrowd": 0,
            "score": float(prediction.scores[k]),
        }
        if prediction.masks is not None:
            annotation["segmentation"] = run_lengths(prediction.masks[k])
            annotation["area"] = int(prediction.masks[k].sum())
        annotations.append(annotation)
    return annotations


def run_lengths(mask: Array) -> dict[str, Any]:
    """Return COCO's uncompressed run-length encoding of an (H, W) bool mask.

    Counts alternate between 0 and 1, from 0 on, column by column.
    """
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(edges).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[:1].any() else counts}

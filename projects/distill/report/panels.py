"""Images with the detections of several models side by side."""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from pycocotools.coco import COCO

from ..errors import DataError
from ..evaluation.coco_errors import Judged

# Colour and line of a box by its kind, distinct for the colour-blind.
STYLES = {
    "object": ("#f0e442", "solid"),
    "right": ("#56b4e9", "solid"),
    "wrong": ("#ff5a36", "dotted"),
    "missed": ("#f0e442", "dashed"),
}
LONGEST_SIDE, QUALITY = 480, 82  # pixels of a shown image; JPEG quality
LETTERS = 25  # heights of a letter in the width of an image


class DrawnBox(NamedTuple):
    """Object or detection in an image.

    Attributes:
        box: x, y, width and height in pixels.
        label: text at the box.
        kind: a key of :data:`STYLES`.
        outline: the contours of its mask as an SVG path in pixels; "" for a box.
    """

    box: tuple[float, ...]
    label: str
    kind: str
    outline: str = ""

    def text_place(self, width: int, height: int) -> dict[str, Any]:
        """Return the SVG attributes of the label, which stays in an image of this size.

        The label of a missed object is below it, because the label of a wrong box would hide it.
        """
        x, y, w, h = self.box
        size = width / LETTERS
        bottom = y + h + size if self.kind == "missed" else y - 0.25 * size
        at_right = x > 0.6 * width
        return {
            "x": round(min(x + w, width) if at_right else max(x, 0), 1),
            "y": round(min(max(bottom, 1.3 * size), height - 0.25 * size), 1),
            "text-anchor": "end" if at_right else "start",
        }


class Panel(NamedTuple):
    """The image with the boxes of one model, or with the ground truth."""

    title: str
    summary: str
    boxes: list[DrawnBox]


class ComparedImage(NamedTuple):
    """An image with its panels; width and height are those of the boxes, not of the JPEG."""

    file_name: str
    width: int
    height: int
    jpeg: bytes
    panels: list[Panel]

    @property
    def font_size(self) -> float:
        """Height of the letters in pixels of the image, so that they grow with it."""
        return round(self.width / LETTERS, 2)


class JudgedModel(NamedTuple):
    """Detections of a model.

    Attributes:
        name: title of its panels.
        shown: the detections to draw, by id.
        judged: detections and missed objects, by the id of each image.
    """

    name: str
    shown: Mapping[int, dict[str, Any]]
    judged: Mapping[Any, Judged]


def most_different(models: Sequence[Mapping[Any, Judged]], number: int) -> list[Any]:
    """Return ids of the images with the largest difference between the highest and lowest F1.

    Among equal ones, those with more objects come first, then those of lower id. Images on which
    all models are equal are left out.

    Args:
        models: results of each model by the id of the image, for the same images.
        number: largest number of ids.
    """
    ranks = {}
    for image, (right, _, missed) in models[0].items():
        scores = [x[image].f1 for x in models]
        gap = round(max(scores) - min(scores), 9)
        if gap:
            ranks[image] = (-gap, -len(right) - len(missed))
    return sorted(ranks, key=lambda image: ranks[image])[:number]


def least_right(model: Mapping[Any, Judged], number: int) -> list[Any]:
    """Return ids of the images with the lowest F1, in the order of :func:`most_different`."""
    perfect = {image: Judged([*x.right, *x.missed], [], []) for image, x in model.items()}
    return most_different((model, perfect), number)


def compared_image(
    truth: COCO, image_root: str, image: Any, models: Iterable[JudgedModel], masks: bool = False
) -> ComparedImage:
    """Return an image with the ground truth and with the detections of each model.

    Args:
        truth: annotations.
        image_root: folder of the images.
        image: id of the image.
        models: the models in the order of their panels.
        masks: draw masks instead of boxes.

    Raises:
        DataError: the image cannot be read.
    """
    entry = truth.imgs[image]
    path = os.path.join(image_root, entry["file_name"])
    try:
        pixels = read_image(path, "BGR")
    except (OSError, ValueError) as e:
        raise DataError(f"'{path}' cannot be read as an image: {e}.") from e
    height, width = pixels.shape[:2]
    draw = partial(_drawn, truth, masks)
    objects = [x for x in truth.imgToAnns[image] if not x["iscrowd"]]
    panels = [
        Panel(
            "ground truth",
            f"{len(objects)} object{'s' * (len(objects) != 1)}",
            draw(objects, "object"),
        )
    ]
    for model in models:
        right, wrong, missed = judged = model.judged[image]
        boxes = [
            *draw((truth.anns[i] for i in missed), "missed"),
            *draw((model.shown[i] for i in wrong), "wrong"),
            *draw((model.shown[i] for i in right), "right"),
        ]
        counts = f"{len(right)} right, {len(wrong)} wrong, {len(missed)} missed"
        panels.append(Panel(model.name, f"F1 {judged.f1:.2f}: {counts}", boxes))
    return ComparedImage(entry["file_name"], width, height, _jpeg(pixels), panels)


def _drawn(
    truth: COCO, masks: bool, annotations: Iterable[dict[str, Any]], kind: str
) -> list[DrawnBox]:
    boxes = []
    for x in annotations:
        name = truth.cats[x["category_id"]]["name"]
        label = f"{name} {x['score']:.2f}" if "score" in x else name
        box = tuple(round(float(k), 1) for k in x["bbox"])
        boxes.append(DrawnBox(box, label, kind, _outline(truth, x) if masks else ""))
    return boxes


def _outline(truth: COCO, annotation: dict[str, Any]) -> str:
    """Return the contours of a mask as an SVG path, to about a pixel."""
    mask = truth.annToMask(annotation)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_TC89_KCOS)
    paths = (" ".join(f"{x},{y}" for x, y in c.reshape(-1, 2)) for c in contours)
    return "".join(f"M{points}Z" for points in paths)


def _jpeg(pixels: np.ndarray) -> bytes:
    """Return a BGR image as a JPEG, at most :data:`LONGEST_SIDE` wide and high."""
    scale = min(LONGEST_SIDE / max(pixels.shape[:2]), 1)
    if scale < 1:
        pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()

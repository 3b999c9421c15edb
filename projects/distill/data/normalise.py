"""Annotation files in COCO's format as annotation tools write them, made as COCO's own are.

Only the files of ``DATASETS.COCO_FORMAT`` are normalised. Every reader of such a file uses the
normalised content: training, evaluation, ``distill check-data`` and ``distill analyze``.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from pycocotools.coco import COCO

from ..utils.text import quoted
from .checks.issues import BOX_TOLERANCE, Issue, image_size, is_box, is_id, is_number
from .checks.keypoints import keypoint_names

GROUPS = "group categories"
MOST_OUTSIDE = 0.5  # share of a box's area outside its image from which the box is wrong

Entries = list[dict[str, Any]]


class Rules(NamedTuple):
    """Choices of the config.

    Attributes:
        clip_boxes: ``DATALOADER.CLIP_BOXES``.
        keep_groups: ``DATASETS.KEEP_GROUP_CATEGORIES``.
        keypoints: ``MODEL.KEYPOINT_ON``.
    """

    clip_boxes: bool = True
    keep_groups: bool = False
    keypoints: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Rules":
        return cls(
            cfg.DATALOADER.CLIP_BOXES, cfg.DATASETS.KEEP_GROUP_CATEGORIES, cfg.MODEL.KEYPOINT_ON
        )


def normalise(content: dict[str, Any], path: str, image_root: str, rules: Rules) -> list[Issue]:
    """Normalise the content of an annotation file, which may be wrong in any way, in place.

    Args:
        content: content of the file.
        path: path of the file.
        image_root: folder of the images.
        rules: choices of the config.

    Returns:
        A remark for each kind of change, and one for crowds, which are not changed.
    """
    images, annotations = _entries(content, "images"), _entries(content, "annotations")
    changes = {
        "file names with backslashes": _replace_backslashes(images, image_root),
        "annotation with id 0": _replace_id_0(annotations),
        "annotations without area or iscrowd": _fill_in(annotations),
    }
    if not rules.keep_groups:
        changes[GROUPS] = leave_out_groups(content)
    if rules.keypoints:
        changes["annotations without keypoints"] = _fill_in_keypoints(content, annotations)
    if rules.clip_boxes:
        changes["boxes partly outside their image"] = _clip_boxes(images, annotations)
    if crowds := sum(x.get("iscrowd") == 1 for x in annotations):
        changes["crowds"] = (
            f"annotations that are crowds (iscrowd 1): {crowds} of {len(annotations)}; training "
            "and evaluation ignore their regions"
        )
    return [Issue(kind, path, detail, False) for kind, detail in changes.items() if detail]


def _entries(content: Mapping[str, Any], key: str) -> Entries:
    entries = content.get(key)
    return [x for x in entries if isinstance(x, dict)] if isinstance(entries, list) else []


def _replace_backslashes(images: Entries, image_root: str) -> str:
    """Read backslashes in file names as separators, if all these files then exist.

    Label Studio's names begin with folders of its own, which are left out up to the first part that
    exists below ``image_root``.
    """
    named = [x for x in images if isinstance(x.get("file_name"), str) and "\\" in x["file_name"]]
    names = [_existing(image_root, x["file_name"]) for x in named]
    if not named or "" in names or len(set(names)) < len(names):
        return ""
    example = f"'{named[0]['file_name']}' is read as '{names[0]}'"
    for image, name in zip(named, names):
        image["file_name"] = name
    return f"file names with backslashes: {len(named)} (the first, {example})"


def _existing(image_root: str, name: str) -> str:
    """Return the longest end of a path that is a file below ``image_root``, or ""."""
    parts = name.replace("\\", "/").lstrip("/").split("/")
    ends = ("/".join(parts[k:]) for k in range(len(parts)) if ".." not in parts[k:])
    return next((x for x in ends if os.path.isfile(os.path.join(image_root, x))), "")


def _replace_id_0(annotations: Entries) -> str:
    """Give the annotation with id 0 the next free id: to pycocotools, 0 means no match."""
    numbered = [x for x in annotations if is_number(x.get("id"))]
    zero = [x for x in numbered if x["id"] == 0]
    if len(zero) != 1:  # the same id twice is an issue
        return ""
    zero[0]["id"] = int(max(x["id"] for x in numbered)) + 1
    return f"the annotation with id 0, which COCO's evaluation cannot match, is {zero[0]['id']} now"


def _fill_in(annotations: Entries) -> str:
    """Supply ``iscrowd`` and ``area``, which COCO's evaluation needs and a training does not."""
    number = 0
    for annotation in annotations:
        lacking = [key for key in ("area", "iscrowd") if key not in annotation]
        annotation.setdefault("iscrowd", 0)
        if "area" in lacking and is_box(box := annotation.get("bbox")):
            annotation["area"] = box[2] * box[3]
        number += bool(lacking)
    if not number:
        return ""
    return f"annotations without area or iscrowd: {number}; area is that of the box, iscrowd is 0"


def _fill_in_keypoints(content: dict[str, Any], annotations: Entries) -> str:
    """Supply keypoints that are not visible, and their number, which COCO's evaluation needs."""
    number, lacking = len(keypoint_names(content)), 0
    for annotation in annotations if number else ():
        if not annotation.get("keypoints"):
            lacking += "keypoints" not in annotation
            annotation["keypoints"] = [0, 0, 0] * number
        points = annotation["keypoints"]
        if isinstance(points, list) and all(map(is_number, points)):
            annotation.setdefault("num_keypoints", sum(x > 0 for x in points[2::3]))
    return f"annotations without keypoints: {lacking}; they get invisible ones" if lacking else ""


def leave_out_groups(content: dict[str, Any]) -> str:
    """Leave out each category without objects that is the supercategory of one with objects.

    Roboflow adds such a category to every data set. An ordinary class without objects stays.
    """
    categories = [
        x
        for x in _entries(content, "categories")
        if isinstance(x.get("name"), str) and is_id(x.get("id"))
    ]
    annotations = _entries(content, "annotations")
    used = {x["category_id"] for x in annotations if is_id(x.get("category_id"))}
    parents = [x.get("supercategory") for x in categories if x["id"] in used]
    groups = [x for x in categories if x["id"] not in used and x["name"] in parents]
    if not groups:
        return ""
    content["categories"] = [x for x in content["categories"] if x not in groups]
    return (
        f"left out {quoted([x['name'] for x in groups])} without objects, the supercategory of "
        "others; DATASETS.KEEP_GROUP_CATEGORIES True makes it a class"
    )


def _clip_boxes(images: Entries, annotations: Entries) -> str:
    """Clip the boxes that are partly outside their image, as detectron2 does in training."""
    sizes = {x["id"]: image_size(x)[0] for x in images if is_id(x.get("id"))}
    clipped = []
    for annotation in annotations:
        image, box = annotation.get("image_id"), annotation.get("bbox")
        size = sizes.get(image) if is_id(image) else None
        if size and is_box(box) and (inside := _clipped(box, *size)):
            annotation["bbox"] = inside
            clipped.append(annotation.get("id"))
    if not clipped:
        return ""
    return (
        f"clipped boxes that are partly outside their image: {len(clipped)} (the first is that of "
        f"annotation {clipped[0]!r:.99}); DATALOADER.CLIP_BOXES False refuses them"
    )


def _clipped(box: Sequence[float], width: int, height: int) -> list[float] | None:
    """Return a box (x, y, width, height) clipped to its image; None if it is inside, or wrong."""
    x1, y1, x2, y2 = box[0], box[1], box[0] + box[2], box[1] + box[3]
    low, right, bottom = -BOX_TOLERANCE, width + BOX_TOLERANCE, height + BOX_TOLERANCE
    if x1 >= low and y1 >= low and x2 <= right and y2 <= bottom:
        return None
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if min(*box[2:], x2 - x1, y2 - y1) <= 0:
        return None
    outside = 1 - (x2 - x1) * (y2 - y1) / (box[2] * box[3])
    return [x1, y1, x2 - x1, y2 - y1] if outside <= MOST_OUTSIDE else None


# ----------------------------------------------------------------------- readers of annotations


@contextmanager
def in_place_of_files(content: Mapping[str, Any]) -> Iterator[None]:
    """Let pycocotools' ``COCO`` hold a content instead of that of the file that it is to read.

    detectron2's reader and evaluator only take the path of a file.
    """
    stock = COCO.__init__

    def hold(coco: COCO, annotation_file: str | None = None) -> None:
        stock(coco)
        if annotation_file is not None:
            coco.dataset = content
            coco.createIndex()

    COCO.__init__ = hold
    try:
        yield
    finally:
        COCO.__init__ = stock

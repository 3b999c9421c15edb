"""Annotation files in COCO's instances format, before detectron2 reads them."""

import json
import os
import reprlib
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ...utils.text import clause
from ..normalise import Rules, in_place_of_files, normalise
from .issues import (
    WRONG_TYPE,
    Issue,
    Problem,
    annotation_problems,
    as_root,
    image_size,
    is_box,
    is_evaluable_mask,
    is_id,
    is_number,
    path_issues,
)
from .keypoints import keypoint_metadata

NOT_EVALUABLE = "annotation that cannot be evaluated"
FRACTIONS = "boxes in fractions of the image"


class CocoFile:
    """Annotation file on disk, which may be wrong in any way.

    Args:
        path: path of the annotation file.
        image_root: folder of the images.
        rules: how to normalise the content; None: leave it as it is.

    Attributes:
        path, image_root, rules: as given.
        roots: folders in which images must be, see :func:`path_issues`.
        content: content of the file; empty if it cannot be read.
        problem: why the file cannot be read, or "".
        remarks: changes by :func:`normalise`.
    """

    def __init__(self, path: str, image_root: str, rules: Rules | None = None):
        self.path = path
        self.image_root = image_root
        self.rules = rules
        self.roots = [as_root(image_root)]
        self.content: dict[str, Any] = {}
        self.problem = self._read()
        self.remarks = normalise(self.content, path, image_root, rules) if rules else []

    def _read(self) -> str:
        if not PathManager.isfile(self.path):
            return (
                "there is no such file (the environment variable DETECTRON2_DATASETS names the "
                "folder of detectron2's own data sets)"
            )
        try:
            with PathManager.open(self.path) as f:
                content = json.load(f)
        except OSError as e:
            return f"it cannot be opened ({clause(e)})"
        except (ValueError, RecursionError) as e:
            return f"it is not valid JSON ({clause(e)})"
        if not isinstance(content, dict):
            return f"it holds a JSON {type(content).__name__}, not COCO's instances"
        self.content = content
        return ""

    def dataset_dicts(self, name: str) -> list[dict[str, Any]]:
        """Return detectron2's dataset dicts, whose crowds have ``"ignored": True``.

        The names of classes and keypoints are set in the metadata. Any error is raised for a wrong
        content.

        Args:
            name: name of the data set.
        """
        with in_place_of_files(self.content):
            dicts: list[dict[str, Any]] = load_coco_json(self.path, self.image_root, name)
        if self.rules and self.rules.keypoints:
            MetadataCatalog.get(name).set(**keypoint_metadata(self.content))
        for annotation in (x for entry in dicts for x in entry["annotations"]):
            if annotation.get("iscrowd"):
                annotation["ignored"] = True
        return dicts

    def images(self) -> list[dict[str, Any]]:
        """Return the images that can be opened, as dataset dicts without annotations."""
        images = self.content.get("images")
        entries = []
        for image in images if isinstance(images, list) else []:
            if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
                continue
            entry = self._entry(image)
            if not any(path_issues(entry, self.roots)):
                entries.append(entry)
        return entries

    def _entry(self, image: Mapping[str, Any]) -> dict[str, Any]:
        size, _ = image_size(image)
        path = os.path.join(self.image_root, image["file_name"])
        return {"file_name": path, **(dict(zip(("width", "height"), size)) if size else {})}

    def issues(self, masks: bool = True) -> Iterator[Issue]:
        """Yield every issue of the file.

        Issues that stop detectron2's reader have no ``image``: dropping an image does not help.

        Args:
            masks: True if masks are trained.
        """
        if self.problem:
            yield Issue("unreadable annotation file", self.path, self.problem, True)
            return
        yield from self.remarks
        categories = yield from self._entries("categories", {"name": str})
        images = yield from self._entries(
            "images", {"file_name": str, "height": object, "width": object}
        )
        annotations = yield from self._entries(
            "annotations", {"image_id": object, "category_id": object}
        )
        if not self.content.get("categories"):
            detail = (
                "it is not in COCO's instances format, which has images, annotations, categories"
            )
            yield Issue("missing list", self.path, detail, True)
        for key in ("images", "annotations"):
            if not self.content.get(key):
                yield Issue("missing list", self.path, f"it has no {key}", key == "images")
        yield from self._image_issues(images)
        all_valid = categories and categories == self.content["categories"]
        known = {x["id"] for x in categories} if all_valid else None
        images_by_id = {x["id"]: x for x in images}
        for annotation in annotations:
            yield from self._annotation_issues(annotation, images_by_id, known, masks)
        boxes = [x["bbox"] for x in annotations if is_box(x.get("bbox"))]
        if 0 < max((max(x + w, y + h) for x, y, w, h in boxes), default=0) <= 1:
            detail = (
                f"all boxes are within one pixel, such as {boxes[0]}; COCO's are in pixels, so "
                "multiply fractions by the width and height of the image"
            )
            yield Issue(FRACTIONS, self.path, detail, True)

    def evaluation_issues(self, masks: bool) -> Iterator[Issue]:
        """Yield the issues that stop COCO's evaluation, whose rules differ from a training's.

        Args:
            masks: True if masks are evaluated.
        """
        annotations = self.content.get("annotations")
        for annotation in annotations if isinstance(annotations, list) else []:
            if isinstance(annotation, dict):
                for problem in _evaluation_problems(annotation, masks):
                    yield problem.at(f"{self.path} (annotation {annotation.get('id')!r:.99})")

    def _entries(
        self, key: str, needed: Mapping[str, type]
    ) -> Generator[Issue, None, list[dict[str, Any]]]:
        """Yield the issues of a list, and return its well-formed entries."""
        entries = self.content.get(key, [])
        if not isinstance(entries, list):
            detail = f"'{key}' is a JSON {type(entries).__name__}, not a list"
            yield Issue(WRONG_TYPE, self.path, detail, True)
            return []
        good: dict[Any, dict[str, Any]] = {}
        for index, entry in enumerate(entries):
            where = f"{self.path} ({key}[{index}])"
            if problem := _malformed(entry, needed):
                yield problem.at(where)
            elif entry["id"] in good:
                fatal = key != "annotations" or "minival" not in self.path  # as in detectron2
                detail = f"the id {entry['id']!r:.99} is already taken"
                yield Issue(f"duplicate id in {key}", where, detail, fatal)
            else:
                good[entry["id"]] = entry
        if len({isinstance(x, str) for x in good}) > 1:
            detail = f"the ids of '{key}' are numbers and strings"
            yield Issue(WRONG_TYPE, self.path, detail, True)
        return list(good.values())

    def _image_issues(self, images: Sequence[Mapping[str, Any]]) -> Iterator[Issue]:
        for image in images:
            path = os.path.join(self.image_root, image["file_name"])
            yield from path_issues({"file_name": path}, self.roots)
            _, problem = image_size(image)
            if problem or image["width"] is None:
                problem = problem or Problem("image without a size", "it has no size")
                yield problem.at(path, path)

    def _annotation_issues(
        self,
        annotation: Mapping[str, Any],
        images: Mapping[Any, Mapping[str, Any]],
        categories: Collection[Any] | None,
        masks: bool,
    ) -> Iterator[Issue]:
        image_id, category_id = annotation["image_id"], annotation["category_id"]
        if not (is_id(image_id) and is_id(category_id)):
            detail = f"image_id={image_id!r:.99} or category_id={category_id!r:.99} is not an id"
            yield Issue(WRONG_TYPE, self._place(self.path, annotation), detail, True)
            return
        if image_id not in images:
            detail = f"there is no image with image_id={image_id!r:.99}"
            yield Issue("unknown image", self._place(self.path, annotation), detail, False)
            return
        path = os.path.join(self.image_root, images[image_id]["file_name"])
        size, _ = image_size(images[image_id])
        problems = list(
            annotation_problems(annotation, BoxMode.XYWH_ABS, size, masks, on_disk=True)
        )
        problems += _reader_problems(annotation)
        if categories is not None and category_id not in categories:
            detail = f"there is no category with category_id={category_id!r:.99}"
            problems.append(Problem("unknown category", detail))
        for problem in problems:
            droppable = problem.kind not in (WRONG_TYPE, "unknown category")
            yield problem.at(self._place(path, annotation), path if droppable else "")

    def _place(self, path: str, annotation: Mapping[str, Any]) -> str:
        """Return the place of an annotation, for messages.

        Args:
            path: path of its image, or of the file if the image is unknown.
            annotation: the annotation.
        """
        return f"{path} (annotation {annotation['id']!r:.99})"


def _malformed(entry: Any, needed: Mapping[str, type]) -> Problem | None:
    """Return the problem of an entry in one of COCO's lists that detectron2 could not read."""
    if not isinstance(entry, dict):
        return Problem(WRONG_TYPE, f"{reprlib.repr(entry)} is not a JSON object")
    for key, kind in needed.items():
        if key not in entry:
            return Problem("missing key", f"it has no {key}")
        if not isinstance(entry[key], kind):
            return Problem(WRONG_TYPE, f"{key} is {reprlib.repr(entry[key])}")
    if not is_id(entry.get("id")):
        return Problem(WRONG_TYPE, f"its id is {reprlib.repr(entry.get('id'))}")
    return None


def _reader_problems(annotation: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the problems of an annotation that stop detectron2's reader of COCO files."""
    box, keypoints = annotation.get("bbox", [0]), annotation.get("keypoints")
    if not isinstance(box, (list, str, dict)) or not box:
        yield Problem(WRONG_TYPE, f"the box is {reprlib.repr(box)}")
    if annotation.get("ignore", 0) != 0:
        yield Problem(WRONG_TYPE, "detectron2 does not support 'ignore'; use iscrowd")
    if keypoints and not (isinstance(keypoints, list) and all(map(is_number, keypoints))):
        yield Problem(WRONG_TYPE, "the keypoints are not a list of numbers")


def _evaluation_problems(annotation: Mapping[str, Any], masks: bool) -> Iterator[Problem]:
    """Yield the problems of an annotation that stop pycocotools' evaluation."""
    box, remedy = annotation.get("bbox"), "COCO's evaluation needs it"
    if not is_box(box):
        yield Problem(NOT_EVALUABLE, f"bbox is {reprlib.repr(box)}, not 4 numbers; {remedy}")
    if not is_number(annotation.get("area")):
        detail = f"area is {reprlib.repr(annotation.get('area'))}, not a number; {remedy}"
        yield Problem(NOT_EVALUABLE, detail)
    if isinstance(annotation.get("id"), str):
        yield Problem(NOT_EVALUABLE, "its id is a string; COCO's evaluation needs numbers")
    elif annotation.get("id") == 0:
        detail = "its id is 0, so COCO's evaluation counts it as missed; number them from 1"
        yield Problem(NOT_EVALUABLE, detail)
    if annotation.get("iscrowd") not in (0, 1):
        detail = f"iscrowd is {reprlib.repr(annotation.get('iscrowd'))}, not 0 or 1; {remedy}"
        yield Problem(NOT_EVALUABLE, detail)
    if masks and not is_evaluable_mask(annotation):
        detail = f"segmentation is {reprlib.repr(annotation.get('segmentation'))}; {remedy}"
        yield Problem(NOT_EVALUABLE, detail)

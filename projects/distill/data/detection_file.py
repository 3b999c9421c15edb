"""Detections of a teacher in a file, which follow the images of the training sets.

The file is in COCO's result format: a list of detections with ``image_id``, ``category_id``,
``bbox`` (x, y, width, height in pixels) and ``score``. It may also be an object with the lists
``images``, ``categories`` and ``annotations``, as ``distill predict`` writes it.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from numpy.typing import NDArray

from ..errors import DataError
from ..structures import DETECTIONS
from ..utils.text import clause, nearest, shortened
from .checks.issues import is_box, is_id, is_number, name_of
from .detections import Found

logger = logging.getLogger(__name__)

KEY = "MODEL.DISTILL.TEACHER.DETECTIONS"
HIDDEN = 0.5  # share of a box inside a crowd from which it is left out: the crowd is painted over


class Detection(NamedTuple):
    """A detection of the file.

    Attributes:
        category: id or name of its class.
        box: x, y, width, height in pixels.
        score: in [0, 1].
    """

    category: Any
    box: list[float]
    score: float


class DetectionFile:
    """Detections of a file, which are handed to the images of the training sets.

    Args:
        path: path of the file.

    Raises:
        DataError: the file cannot be read, or a detection is wrong.
    """

    def __init__(self, path: str):
        self.path = path
        self.by_image: dict[str, list[Detection]] = defaultdict(list)
        self.file_names: dict[str, str] = {}  # by image, if the file has a list of images
        self.owners: dict[str, str] = {}  # file of the training image, by image
        content = self._read()
        categories: dict[Any, str] = {}
        if isinstance(content, dict):
            categories = {x["id"]: x["name"] for x in self._rows(content, "categories")}
            images = self._rows(content, "images")
            self.file_names = {_key(x["id"]): x["file_name"] for x in images}
            content = content.get("annotations")
        if not isinstance(content, list):
            raise self._error("it is no list of detections in COCO's result format")
        for number, row in enumerate(content):
            self._add(row, number, categories)
        boxes = [x.box for found in self.by_image.values() for x in found]
        if boxes and np.max(boxes) <= 1:
            raise self._error("its boxes are fractions; bbox is x, y, width, height in pixels")
        self.keys_by_name: dict[str, list[str]] = defaultdict(list)
        for key, name in self.file_names.items():
            self.keys_by_name[PurePath(name).name].append(key)

    def _error(self, detail: str) -> DataError:
        return DataError(f"{KEY} '{self.path}': {detail}.")

    def _read(self) -> Any:
        try:
            with open(self.path, encoding="utf-8") as f:
                return json.load(f)
        except OSError as e:
            raise self._error(f"it cannot be opened ({clause(e)})") from e
        except (ValueError, RecursionError) as e:
            raise self._error(f"it is not valid JSON ({clause(e)})") from e

    def _rows(self, content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
        """Return the list of images or categories, each with an id and a name."""
        name = "file_name" if key == "images" else "name"
        rows = content.get(key, [])
        if not isinstance(rows, list) or not all(
            isinstance(x, dict) and is_id(x.get("id")) and isinstance(x.get(name), str)
            for x in rows
        ):
            raise self._error(f"its '{key}' is no list of objects with 'id' and '{name}'")
        return rows

    def _add(self, row: Any, number: int, categories: Mapping[Any, str]) -> None:
        def wrong(what: str) -> DataError:
            return self._error(f"its detection {number} {what}")

        if not isinstance(row, dict):
            raise wrong("is no object")
        image, category, box, score = (
            row.get(x) for x in ("image_id", "category_id", "bbox", "score")
        )
        if not is_id(image) or not is_id(category):
            raise wrong("needs an image_id and a category_id")
        if not is_box(box):
            raise wrong("needs a bbox of four finite numbers: x, y, width, height in pixels")
        if not is_number(score) or not 0 <= score <= 1:  # type: ignore[operator]
            raise wrong(f"has the score {score!r:.20}, which must be in [0, 1]")
        if categories and category not in categories:
            raise wrong(f"has the category_id {category!r:.20}, which its categories lack")
        kind = categories.get(category, category)
        self.by_image[_key(image)].append(Detection(kind, box, float(score)))  # type: ignore[arg-type]

    def attached(
        self, name: str, dicts: Iterable[dict[str, Any]], classes: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return the dataset dicts of a training set with their detections.

        Args:
            name: name of the data set.
            dicts: its dataset dicts.
            classes: class names of the training.

        Raises:
            DataError: the data set lacks a category, or two images have the same id.
        """
        index = self._class_indices(name, classes)
        return [{**x, DETECTIONS: self._found(x, index)} for x in dicts]

    def _found(self, entry: dict[str, Any], index: Mapping[Any, int]) -> Found:
        rows = []
        for key in self._keys_of(entry):
            owner = self.owners.setdefault(key, name_of(entry))
            if owner != name_of(entry):
                raise self._error(
                    f"its image '{key}' is in several training sets ({owner} and "
                    f"{name_of(entry)}); name images by 'images' with their file_name"
                )
            rows += self.by_image[key]
        unknown = next((x.category for x in rows if x.category not in index), None)
        if unknown is not None:
            raise self._error(
                f"there is no category {unknown!r:.40} in DATASETS.TRAIN, which has "
                f"{nearest(unknown, map(str, index))}"
            )
        boxes = np.array([x.box for x in rows], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        visible = ~hidden(boxes, entry.get("annotations", ()))
        scores = np.array([x.score for x in rows], np.float32)
        labels = np.array([index[x.category] for x in rows], np.int64)
        return Found(boxes[visible], scores[visible], labels[visible])

    def _keys_of(self, entry: dict[str, Any]) -> list[str]:
        """Return the images of the file that are this image: by file name, otherwise by id."""
        if not self.file_names:
            key = _key(entry.get("image_id"))
            return [key] if key in self.by_image else []
        path = PurePath(name_of(entry))
        near = self.keys_by_name.get(path.name, ())
        return [x for x in near if x in self.by_image and _same(self.file_names[x], path)]

    def _class_indices(self, name: str, classes: Sequence[str]) -> dict[Any, int]:
        """Return the index of the class by its name, and by its id in the data set."""
        metadata = MetadataCatalog.get(name)
        own = list(metadata.get("thing_classes") or classes)
        ids = metadata.get("thing_dataset_id_to_contiguous_id") or {k: k for k in range(len(own))}
        index: dict[Any, int] = {x: k for k, x in enumerate(classes)}
        index |= {key: index[own[k]] for key, k in ids.items() if own[k] in index}
        return index

    def check_complete(self) -> None:
        """Check that every image of the file has been found, and log the number of detections.

        Raises:
            DataError: an image is in no training set.
        """
        missing = [self.file_names.get(x, x) for x in self.by_image if x not in self.owners]
        if missing:
            raise self._error(
                f"{len(missing)} of its {len(self.by_image)} images are in no data set of "
                f"DATASETS.TRAIN: {shortened(missing, 3)}; remove their detections"
            )
        number = sum(map(len, self.by_image.values()))
        logger.info("%s: %d detections in %d images", KEY, number, len(self.by_image))


def _key(image: Any) -> str:
    """Return an id of an image as text; some tools write it as a float."""
    return str(int(image) if isinstance(image, float) else image)


def _same(name: str, path: PurePath) -> bool:
    """Return whether one path is the other, or its last parts."""
    short, long = sorted((PurePath(name).parts, path.parts), key=len)
    return long[-len(short) :] == short


def hidden(boxes: NDArray[Any], annotations: Sequence[dict[str, Any]]) -> NDArray[np.bool_]:
    """Return True for the boxes (N, 4) XYXY of which half is inside a crowd or ignored region."""
    found = np.zeros(len(boxes), bool)
    area = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(1)
    for x in annotations:
        if x.get("iscrowd", 0) or x.get("ignored"):
            crowd = np.array(BoxMode.convert(list(x["bbox"]), x["bbox_mode"], BoxMode.XYXY_ABS))
            low, high = np.maximum(boxes[:, :2], crowd[:2]), np.minimum(boxes[:, 2:], crowd[2:])
            found |= (high - low).clip(min=0).prod(1) >= np.maximum(HIDDEN * area, 1e-6)
    return found


def detection_file(cfg: CfgNode) -> DetectionFile | None:
    """Return the file of ``MODEL.DISTILL.TEACHER.DETECTIONS``, or None."""
    path = cfg.MODEL.DISTILL.TEACHER.DETECTIONS
    return DetectionFile(path) if path else None

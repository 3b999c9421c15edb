"""Folders in PASCAL VOC's layout, as annotation tools write them."""

import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ...errors import DataError
from ...utils.text import clause
from .issues import Issue, as_root, entry_issues, path_issues

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _parsed(path: str) -> ET.Element:
    with PathManager.open(path) as f:
        return ET.parse(f).getroot()


def _objects(root: ET.Element) -> list[dict[str, Any]]:
    """Return the objects of an annotation file as VOC's evaluation has them.

    Tools may leave out ``difficult``, and write fractions of a pixel.

    Raises:
        ValueError: an object lacks a value, or has a wrong one.
    """
    return [
        {
            "name": _text(x, "name"),
            "difficult": int(x.findtext("difficult") or 0),
            "bbox": [float(_text(x, f"bndbox/{corner}")) for corner in _CORNERS],
        }
        for x in root.findall("object")
    ]


def _text(element: ET.Element, path: str) -> str:
    text = (element.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"<{element.tag}> has no <{path}>")
    return text


class VOCFolder:
    """Split of a folder with ``Annotations``, ``ImageSets/Main`` and ``JPEGImages``.

    Args:
        folder: the folder.
        split: name of the list of ids, ``ImageSets/Main/<split>.txt``.
        classes: class names.

    Attributes:
        remarks: always empty.
        objects: objects by the id of the image, as VOC's evaluation has them.
    """

    def __init__(self, folder: str, split: str, classes: Sequence[str]):
        self.folder, self.classes = folder, tuple(classes)
        self.remarks: list[Issue] = []
        self.objects: dict[str, list[dict[str, Any]]] = {}
        self._list = os.path.join(folder, "ImageSets", "Main", f"{split}.txt")
        self._found: list[Issue] = []
        self._dicts: list[dict[str, Any]] = []
        self._read()

    def _read(self) -> None:
        try:
            with PathManager.open(self._list, errors="replace") as f:
                ids = [line.strip() for line in f if line.strip()]
        except OSError as e:
            detail = f"it cannot be opened ({clause(e)})"
            self._found.append(Issue("unreadable list of images", self._list, detail, True))
            return
        images = os.path.join(self.folder, "JPEGImages")
        names = os.listdir(images) if os.path.isdir(images) else []
        by_id = {os.path.splitext(x)[0]: x for x in sorted(names)}
        for id in ids:
            path = os.path.join(images, by_id.get(id, f"{id}.jpg"))
            outside = list(path_issues({"file_name": path}, [as_root(images)]))
            where = f"{self._list} (id {id})"
            self._found += (x._replace(where=where, image="") for x in outside)
            if not outside:
                self._add(id, path)

    def _add(self, id: str, image: str) -> None:
        """Read the annotations of an image."""
        path = os.path.join(self.folder, "Annotations", f"{id}.xml")
        entry: dict[str, Any] = {"file_name": image, "image_id": id, "annotations": []}
        self._dicts.append(entry)
        self.objects[id] = []
        try:
            root = _parsed(path)
            size = {x: int(float(_text(root, f"size/{x}"))) for x in ("width", "height")}
            objects = _objects(root)
        except (OSError, ET.ParseError, ValueError, OverflowError) as e:
            detail = f"it cannot be read ({clause(e)})"
            self._found.append(Issue("unreadable annotations", path, detail, True, image))
            return
        entry |= size
        self.objects[id] = objects
        for number, x in enumerate(objects):
            if x["name"] in self.classes:
                entry["annotations"].append(self._annotation(x))
            else:
                detail = (
                    f"the class '{x['name']:.99}' is not one of the {len(self.classes)} of the "
                    "data set; list all classes of your own in DATASETS.VOC_FORMAT"
                )
                where = f"{path} (object {number})"
                self._found.append(Issue("unknown category", where, detail, True))
        self._found += entry_issues(entry, classes=len(self.classes))

    def _annotation(self, x: dict[str, Any]) -> dict[str, Any]:
        left, top, right, bottom = x["bbox"]
        return {  # as detectron2: the first pixel of VOC is 1
            "bbox": [left - 1, top - 1, right, bottom],
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": self.classes.index(x["name"]),
        }

    def evaluated_classes(self) -> list[str]:
        """Return the classes that have an object which is not difficult."""
        objects = (x for found in self.objects.values() for x in found)
        easy = {x["name"] for x in objects if not x["difficult"]}
        return [x for x in self.classes if x in easy]

    def issues(self, masks: bool = True) -> Iterator[Issue]:
        yield from self._found

    def evaluation_issues(self, masks: bool = True) -> Iterator[Issue]:
        yield from (x for x in self._found if x.image and x.kind == "unreadable annotations")
        if not self.evaluated_classes():
            detail = "no image has an object that is not difficult, so VOC's evaluation has no AP"
            yield Issue("no object to find", self._list, detail, True)

    def dataset_dicts(self, name: str) -> list[dict[str, Any]]:
        """Return detectron2's dataset dicts.

        Args:
            name: name of the data set, for messages.

        Raises:
            DataError: the list of images cannot be read, or an object has an unknown class.
        """
        for issue in self._found:
            if issue.fatal and not issue.image:
                raise DataError(f"Data set '{name}', {issue.where}: {issue.detail}.")
        return self._dicts

    def images(self) -> list[dict[str, Any]]:
        return [{"file_name": x["file_name"]} for x in self._dicts]

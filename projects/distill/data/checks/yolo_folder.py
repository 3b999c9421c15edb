"""Folders in YOLO's format, as Ultralytics' tools read and annotation tools write them.

A ``data.yaml`` names the folders of images and the classes. Each image has a text file of labels,
with one object per line. Coordinates are fractions of the width and height of the image. The facts
of the format are those of ``ultralytics/data/utils.py``, as released.
"""

import hashlib
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray

from ...utils.text import clause, quoted
from ..normalise import Rules
from .coco_file import CocoFile
from .images import images_below, in_threads, read_header
from .issues import WRONG_TYPE, Issue, Problem, Size, as_root, path_issues

SPLITS = ("train", "val", "test")
TOLERANCE = 0.01  # by which a fraction may exceed [0, 1], as released
_FORMS = "class, centre x, centre y, width and height; or class and 3 or more points of a polygon"

Object = tuple[int, list[float]]
"""Class index and fractions: 4 of a box (centre, width and height), or x and y of a polygon."""


class DataYaml(NamedTuple):
    """Content of a ``data.yaml``.

    Attributes:
        root: folder to which its paths are relative.
        names: class names.
        splits: folders or lists of images, as they are written, by split.
        keypoint_values: values of an object's keypoints; 0 without ``kpt_shape``.
        download: True if it asks for a download.
    """

    root: str
    names: tuple[str, ...]
    splits: Mapping[str, Any]
    keypoint_values: int
    download: bool


def read_data_yaml(path: str) -> DataYaml:
    """Read a ``data.yaml``, of which nothing is executed or downloaded.

    Raises:
        ValueError: one clause says why it cannot be read.
    """
    try:
        with PathManager.open(path, encoding="utf-8-sig", errors="replace") as f:
            content = yaml.safe_load(f)
    except OSError as e:
        raise ValueError(f"it cannot be opened ({clause(e)})") from e
    except Exception as e:  # PyYAML's constructors may raise anything for wrong values
        raise ValueError(f"it is not valid YAML ({clause(e)})") from e
    if not isinstance(content, dict):
        raise ValueError(f"it is {reprlib.repr(content)}, not a mapping with 'names' and 'train'")
    root = content.get("path") or "."
    folder = _joined(os.path.dirname(path), root) if isinstance(root, str) else ""
    if not os.path.isdir(folder):
        raise ValueError(
            f"its 'path' is {reprlib.repr(root)}, but there is no such folder; correct it, or leave"
            " it out if that is the folder of this file"
        )
    splits = {x: content[x] for x in SPLITS if content.get(x)}
    return DataYaml(
        folder, _names(content), splits, _keypoint_values(content), "download" in content
    )


def _joined(folder: str, path: str) -> str:
    return os.path.normpath(os.path.join(folder, path.replace("\\", "/")))  # tools run on Windows


def _names(content: Mapping[str, Any]) -> tuple[str, ...]:
    names = content.get("names")
    if isinstance(names, dict):
        by_index = {str(key): name for key, name in names.items()}
        indices = [str(k) for k in range(len(names))]
        if set(by_index) != set(indices):
            raise ValueError(f"the keys of 'names' are not the indices 0 to {len(names) - 1}")
        names = [by_index[k] for k in indices]
    if not isinstance(names, list) or not names:
        raise ValueError(f"its 'names' are {reprlib.repr(names)}, not a list of class names")
    for name in names:
        if not isinstance(name, str | int | float) or isinstance(name, bool):
            detail = f"'names' has {reprlib.repr(name)}, which is not a text; write it in quotes"
            raise ValueError(detail)
    count = content.get("nc", len(names))
    if count != len(names):
        raise ValueError(
            f"its 'nc' is {reprlib.repr(count)}, but 'names' has {len(names)} classes; correct one"
        )
    return tuple(map(str, names))


def _keypoint_values(content: Mapping[str, Any]) -> int:
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    numbers = isinstance(shape, list) and [type(x) for x in shape] == [int, int]
    if not numbers or shape[0] < 1 or shape[1] not in (2, 3):
        raise ValueError(
            f"its 'kpt_shape' is {reprlib.repr(shape)}, not [number of keypoints, 2 or 3 values]"
        )
    return int(shape[0] * shape[1])


def label_path(image: str) -> str:
    """Return the path of an image's labels: the last folder ``images`` is ``labels`` there."""
    head, found, tail = os.path.abspath(image).rpartition(f"{os.sep}images{os.sep}")
    stem = os.path.splitext(tail)[0]
    return f"{head}{os.sep}labels{os.sep}{stem}.txt" if found else f"{stem}.txt"


def parse_line(line: str, classes: int, keypoint_values: int = 0) -> Object | Problem:
    """Return the object of a line of labels, or the problem of the line.

    Args:
        line: a class index, and the fractions of a box or polygon.
        classes: number of classes.
        keypoint_values: number of values after each box, which are not read.
    """
    try:
        label, *values = map(float, line.split())
    except ValueError as e:
        return Problem(WRONG_TYPE, f"it has a value that is not a number ({clause(e)})")
    count = len(values) + 1
    if keypoint_values:
        values = values[:4]
        if count != 5 + keypoint_values:
            detail = f"it has {count} values; with this kpt_shape there are {5 + keypoint_values}"
            return Problem("wrong number of values", detail)
    elif count != 5 and (count < 7 or count % 2 == 0):
        return Problem("wrong number of values", f"it has {count} values, which are not {_FORMS}")
    for x in values:
        if not -TOLERANCE <= x <= 1 + TOLERANCE:  # True for NaN
            detail = (
                f"{x:g} is not in [0, 1]; divide x and widths by the width of the image, y and "
                "heights by its height"
            )
            return Problem("value that is no fraction", detail)
    if not 0 <= label < classes or label % 1:
        detail = f"class {label:g} is not an index of the {classes} 'names'"
        return Problem("unknown category", detail)
    return int(label), values


def _annotation(values: Sequence[float], size: Size) -> dict[str, Any]:
    """Return box, area and polygon in pixels, as COCO has them.

    Args:
        values: see :data:`Object`.
        size: width and height of the image in pixels.
    """
    if len(values) == 4:
        x, y, w, h = (x * side for x, side in zip(values, (*size, *size)))
        return {"bbox": [x - w / 2, y - h / 2, w, h], "area": w * h}
    points = np.array(values).reshape(-1, 2) * size
    box = [*points.min(0).tolist(), *np.ptp(points, 0).tolist()]
    polygon = points.ravel().tolist()
    return {"bbox": box, "area": abs(signed_area(points)), "segmentation": [polygon]}


def signed_area(points: NDArray[np.float64]) -> float:
    """Return the area of a polygon (P, 2), which is negative for one of its two orientations.

    The literal form is Σ (x_i y_{i+1} − x_{i+1} y_i) / 2, over all points in a circle.
    """
    x, y = points.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


class _ImageFiles(NamedTuple):
    """Files of an image, as they are read.

    Attributes:
        size: width and height; None if the image cannot be read.
        problem: problem of the image's header, or None.
        labels: content of the label file; None if there is no such file.
        error: reason why the label file cannot be read, or "".
    """

    size: Size | None
    problem: Problem | None
    labels: bytes | None
    error: str = ""


def _read_files(image: str) -> _ImageFiles:
    size, problem = read_header(image)
    path = label_path(image)
    if not os.path.isfile(path):  # True for no pipe, whose reader would wait
        return _ImageFiles(size, problem, None)
    try:
        return _ImageFiles(size, problem, Path(path).read_bytes())
    except OSError as e:
        return _ImageFiles(size, problem, b"", clause(e))


class YOLOFolder(CocoFile):
    """Split of a folder in YOLO's format, read as the content of a file in COCO's format.

    Images and categories are numbered from 1, in the order of the paths and of ``names``. Every
    root of an image is a folder that ``data.yaml`` names. Images of a list must be below ``path``,
    or below the folder of the list.

    Args:
        path: path of ``data.yaml``.
        split: one of :data:`SPLITS`.
        rules: as in :class:`CocoFile`.

    Attributes:
        digest: hash of class names, image names and labels.
    """

    def __init__(self, path: str, split: str, rules: Rules | None = None):
        self.split = split
        self.digest = ""
        self._found: list[Issue] = []
        self._notes: list[Issue] = []
        self._repeated: list[str] = []
        super().__init__(path, "", rules)
        self.remarks = [*self._notes, *self.remarks]

    def _read(self) -> str:
        self.roots = []
        try:
            data = read_data_yaml(self.path)
            places = self._places(data)
            images = [x for place in places for x in self._images(place, data.root)]
        except ValueError as e:
            return str(e)
        if not images:
            outside = [f"{x.where}: {x.detail}" for x in self._found]
            return next(iter(outside), f"there are no images in {quoted(places)}")
        files = list(in_threads(_read_files, images))
        self.digest = _digest(data, images, files)
        self.content = self._coco(data, images, files)
        self._note_all(data, images, files)
        return ""

    def _note_all(
        self, data: DataYaml, images: Sequence[str], files: Sequence[_ImageFiles]
    ) -> None:
        missing = [image for image, own in zip(images, files) if own.labels is None]
        if missing:
            detail = (
                f"images without a file of labels: {len(missing)} of {len(images)} (that of "
                f"{missing[0]} would be {label_path(missing[0])}); they have no objects"
            )
            self._note("images without labels", detail)
        if self._repeated:
            detail = (
                f"lines that repeat an object: {len(self._repeated)} (the first, "
                f"{self._repeated[0]}); each object is read once"
            )
            self._note("lines that repeat an object", detail)
        if data.keypoint_values:
            detail = "its keypoints are not read; write them in COCO's format to train on them"
            self._note("keypoints", detail)
        if data.download:
            self._note("download", "its 'download' is ignored")

    def _note(self, kind: str, detail: str) -> None:
        self._notes.append(Issue(kind, self.path, detail, False))

    def _places(self, data: DataYaml) -> list[str]:
        """Return the folders and lists of images.

        Raises:
            ValueError: one does not exist, or the split has a wrong type.
        """
        named = data.splits.get(self.split)
        named = [named] if isinstance(named, str) else named
        if not isinstance(named, list) or not all(isinstance(x, str) for x in named):
            raise ValueError(
                f"its '{self.split}' is {reprlib.repr(named)}, not a folder of images, a list of "
                "folders, or a .txt file of image paths"
            )
        return [self._resolved(data.root, x) for x in named]

    def _resolved(self, root: str, named: str) -> str:
        path, inner = _joined(root, named), _joined(root, re.sub(r"^\.\.[/\\]", "", named))
        if not os.path.exists(path) and os.path.exists(inner):  # Roboflow's files have one too many
            self._note("paths with ../", f"'{named}' does not exist, so '{inner}' is read instead")
            path = inner
        if not os.path.isdir(path) and not (path.endswith(".txt") and os.path.isfile(path)):
            raise ValueError(f"its '{self.split}' names '{path}', which is no folder or .txt file")
        return path

    def _images(self, place: str, root: str) -> list[str]:
        """Return the images of a folder, or those that a list names."""
        if os.path.isdir(place):
            self.roots.append(as_root(place))
            return images_below(place)
        folder = os.path.dirname(place)
        roots = [as_root(root), as_root(folder)]
        self.roots += roots
        images = []
        for number, line in enumerate(_lines(place), 1):
            if not line:
                continue
            # Ultralytics takes only names with ./ to be relative to the list.
            paths = [_joined(x, line) for x in (folder, root)]
            image = next(filter(os.path.isfile, paths), paths[0])
            outside = list(path_issues({"file_name": image}, roots))
            self._found += (x._replace(where=f"{place} (line {number})", image="") for x in outside)
            images += [] if outside else [image]
        return images

    def _coco(
        self, data: DataYaml, images: Sequence[str], files: Sequence[_ImageFiles]
    ) -> dict[str, Any]:
        """Return the content of a file in COCO's format."""
        entries: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for id, (image, own) in enumerate(zip(images, files), 1):
            width, height = own.size or (None, None)
            entries.append({"id": id, "file_name": image, "width": width, "height": height})
            if own.problem:
                self._found.append(own.problem.at(image, image))
            for line, (label, values) in self._objects(image, own, data):
                keys = {"id": len(annotations) + 1, "image_id": id, "category_id": label + 1}
                if own.size:
                    shape = _annotation(values, own.size)
                    annotations.append({**keys, **shape, "iscrowd": 0, "line": line})
        categories = [{"id": k, "name": name} for k, name in enumerate(data.names, 1)]
        return {"images": entries, "annotations": annotations, "categories": categories}

    def _objects(
        self, image: str, files: _ImageFiles, data: DataYaml
    ) -> Iterator[tuple[int, Object]]:
        """Yield the number of each line, and its object. The same line twice is one object."""
        path = label_path(image)
        if files.error:
            detail = f"it cannot be opened ({files.error})"
            self._found.append(Issue("unreadable labels", path, detail, True, image))
        known: set[tuple[float, ...]] = set()
        lines = (files.labels or b"").decode("utf-8-sig", "replace").splitlines()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            parsed = parse_line(line, len(data.names), data.keypoint_values)
            where = f"{path} (line {number})"
            if isinstance(parsed, Problem):
                dropped = "" if parsed.kind == "unknown category" else image
                self._found.append(parsed.at(where, dropped))
            elif (key := (parsed[0], *parsed[1])) in known:
                self._repeated.append(where)
            else:
                known.add(key)
                yield number, parsed

    def _image_issues(self, images: Sequence[Mapping[str, Any]]) -> Iterator[Issue]:
        yield from self._found  # they also say why an image has no size

    def _place(self, path: str, annotation: Mapping[str, Any]) -> str:
        return f"{label_path(path)} (line {annotation['line']})"

    def evaluation_issues(self, masks: bool) -> Iterator[Issue]:
        """Yield the issues that stop an evaluation, such as an object that cannot be read."""
        yield from (x._replace(image="") for x in self._found)
        yield from super().evaluation_issues(masks)


def _lines(path: str) -> list[str]:
    try:
        with PathManager.open(path, encoding="utf-8-sig", errors="replace") as f:
            return [line.strip() for line in f]
    except OSError as e:
        raise ValueError(f"'{path}' cannot be opened ({clause(e)})") from e


def _digest(data: DataYaml, images: Sequence[str], files: Sequence[_ImageFiles]) -> str:
    """Return a hash that is the same wherever the data set lies."""
    digest = hashlib.sha256(repr((data.names, data.keypoint_values)).encode())
    for image, own in zip(images, files):
        for part in (os.fsencode(os.path.relpath(image, data.root)), own.labels or b""):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()

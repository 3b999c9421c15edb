"""Issues of annotations, which are collected and never raised.

:func:`entry_issues` checks the dataset dicts of any data set, and :func:`config_issues` whether
they fit the config. :mod:`.coco_file` checks an annotation file before detectron2 reads it, and
:mod:`.images` opens the images.

An issue is fatal if the training would fail or learn something wrong. Other issues are remarks,
because detectron2 handles them. Its mapper drops boxes without area (COCO's own train2017 has
some), and its reader skips annotations of unknown images. That reader also drops an object if all
its polygons have fewer than 3 points. This is fatal, because the object would be background.

Paths are checked as they are written; symbolic links are not resolved.
"""

import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

BOX_TOLERANCE = 1.0  # pixels by which a box may exceed its image, because annotation tools round
FILE_KEYS = ("file_name", "sem_seg_file_name", "pan_seg_file_name")
ROOT_KEYS = ("image_root", "sem_seg_root", "panoptic_root", "dirname", "image_dir", "gt_dir")
ESCAPE = "path out of the folder"
WRONG_TYPE = "value of a wrong type"
SHORT_POLYGON = "polygon of fewer than 3 points"

_LARGEST = 1e12  # far beyond all coordinates and sizes
_FARTHEST = 1e6  # in pixels; pycocotools uses memory for every pixel along a polygon
_BOX_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS)

Size = tuple[int, int]  # width, height


class Issue(NamedTuple):
    """Fault of a data set.

    Attributes:
        kind: a few words that are common to similar issues.
        where: the file, and the annotation in it.
        detail: one clause without newline.
        fatal: True if the training would fail or learn something wrong.
        image: path of the image that must be dropped to avoid the issue; "" if dropping an image
            does not help.
    """

    kind: str
    where: str
    detail: str
    fatal: bool
    image: str = ""


class Problem(NamedTuple):
    """Issue without its place, which the caller knows."""

    kind: str
    detail: str
    fatal: bool = True

    def at(self, where: str, image: str = "") -> Issue:
        """Return the issue at a place."""
        return Issue(self.kind, where, self.detail, self.fatal, image)


LOST = Problem(
    "object without a polygon",
    "no polygon has 3 points or more, so the object would be trained as background",
)


def as_root(folder: str | os.PathLike[str]) -> str:
    """Return a folder for :func:`path_issues`: absolute, with a separator at the end."""
    return os.path.join(os.path.abspath(folder), "")


def metadata_roots(metadata: Any) -> list[str]:
    """Return the folders of a data set's files that its metadata names."""
    folders = [metadata.get(key) for key in ROOT_KEYS]
    return [as_root(x) for x in folders if x and isinstance(x, (str, os.PathLike))]


def name_of(entry: Mapping[str, Any]) -> str:
    """Return the path of a dataset dict's image."""
    return str(entry.get("file_name") or "")


def path_issues(entry: Mapping[str, Any], roots: Sequence[str]) -> Iterator[Issue]:
    """Yield the paths of a dataset dict that are outside the data set's folders.

    Args:
        entry: detectron2's dataset dict.
        roots: results of :func:`as_root`. A path must be below one of them, unless it is empty.
    """
    for key in FILE_KEYS:
        path = entry.get(key)
        if path is None:
            continue
        if not isinstance(path, (str, os.PathLike)):
            where = f"{key} {reprlib.repr(path)}"
            yield Issue(WRONG_TYPE, where, "the name of the file is not a string", True)
            continue
        path = os.fspath(path)
        inside = any(os.path.abspath(path).startswith(root) for root in roots)
        if "\0" in path or (roots and not inside):
            detail = f"the path leads out of the folder {roots[0] if roots else ''}"
            yield Issue(ESCAPE, path, detail, True, name_of(entry))


def voc_issues(dirname: str, split: str) -> Iterator[Issue]:
    """Yield the ids of a split of PASCAL VOC that would make its reader leave the folder."""
    path = os.path.join(dirname, "ImageSets", "Main", f"{split}.txt")
    try:
        with PathManager.open(path, errors="replace") as f:
            names = f.read().split()
    except OSError:
        return  # the reader reports this
    root = as_root(os.path.join(dirname, "JPEGImages"))
    for name in names:
        for issue in path_issues({"file_name": os.path.join(root, name)}, [root]):
            yield issue._replace(where=f"{path} (id {name})", image="")


# --------------------------------------------------------------------------------- annotations


def is_number(x: Any) -> bool:
    """Return True for a finite number, but not for a bool."""
    if type(x) is float or type(x) is int:
        return -_LARGEST < x < _LARGEST  # False for NaN
    return isinstance(x, (np.floating, np.integer)) and bool(np.isfinite(x))


def is_id(x: Any) -> bool:
    """Return True for an id in COCO's format: a whole number or a string."""
    return type(x) in (int, str) or (type(x) is float and x.is_integer())


def is_box(x: Any) -> TypeGuard[list[float]]:
    """Return True for a list of four finite numbers."""
    return isinstance(x, list) and len(x) == 4 and all(map(is_number, x))


def image_size(entry: Mapping[str, Any]) -> tuple[Size | None, Problem | None]:
    """Return the annotated width and height of an image, and the problem if they are wrong."""
    width: Any = entry.get("width")
    height: Any = entry.get("height")
    if width is None and height is None:
        return None, None
    if all(is_number(x) and x >= 1 and x == int(x) for x in (width, height)):
        return (int(width), int(height)), None
    detail = f"width {reprlib.repr(width)} or height {reprlib.repr(height)} is not a size in pixels"
    return None, Problem("image without a size", detail)


def _box_problem(box: Any, mode: Any, size: Size | None) -> Problem | None:
    if isinstance(box, np.ndarray):
        box = box.tolist()
    if mode not in _BOX_MODES:
        return Problem(
            WRONG_TYPE, f"detectron2 does not train on the box mode {reprlib.repr(mode)}"
        )
    if box is None:
        return Problem("no box", "it has no box; add one")
    length = 5 if mode == BoxMode.XYWHA_ABS else 4
    if not isinstance(box, (list, tuple)) or len(box) != length:
        return Problem("no box", f"{reprlib.repr(box)} is not a box of {length} numbers")
    for x in box:
        if not is_number(x):
            return Problem("box that is not finite", f"the box {reprlib.repr(box)} is not finite")
    if mode == BoxMode.XYWH_ABS:
        x1, y1, x2, y2 = box[0], box[1], box[0] + box[2], box[1] + box[3]
    elif mode == BoxMode.XYXY_ABS:
        x1, y1, x2, y2 = box
    else:
        x1, y1, x2, y2 = BoxMode.convert(box, mode, BoxMode.XYXY_ABS)
    if x2 < x1 or y2 < y1:
        return Problem("box of negative size", f"the box {box} has a negative size")
    if size and (
        min(x1, y1) < -BOX_TOLERANCE or x2 > size[0] + BOX_TOLERANCE or y2 > size[1] + BOX_TOLERANCE
    ):
        detail = f"the box {box} is outside its image of {size[0]} x {size[1]} pixels"
        return Problem("box outside its image", detail)
    if x1 == x2 or y1 == y2:
        return Problem("box without area", f"the box {box} has no area", fatal=False)
    return None


def _has_mask(annotation: Mapping[str, Any]) -> bool:
    mask = annotation.get("segmentation")
    return isinstance(mask, np.ndarray) or bool(mask)


def _mask_problems(
    annotation: Mapping[str, Any], size: Size | None, masks: bool, on_disk: bool
) -> Iterator[Problem]:
    if not _has_mask(annotation):
        return
    mask = annotation["segmentation"]
    crowd = annotation.get("iscrowd", 0) != 0
    if isinstance(mask, dict):
        found = _rle_problem(mask, size)
        problems = [found] if found else []
    else:
        problems = list(_polygon_problems(mask))
    for problem in problems:
        if problem.kind == SHORT_POLYGON and on_disk:  # the reader drops the polygon
            lost = all(_is_short(polygon) for polygon in mask)
            yield LOST._replace(fatal=not crowd) if lost else problem._replace(fatal=False)
        else:
            stops_reader = on_disk and problem.kind == WRONG_TYPE
            yield problem._replace(fatal=stops_reader or (masks and not crowd))


def is_evaluable_mask(annotation: Mapping[str, Any]) -> bool:
    """Return True if pycocotools can make a mask from a COCO annotation's segmentation.

    It accepts polygons that are too short for detectron2's reader, except as the first polygon.
    """
    mask = annotation.get("segmentation")
    if not mask:
        return False
    if isinstance(mask, dict):
        return _rle_problem(mask, None) is None
    problems = list(_polygon_problems(mask))
    return all(x.kind == SHORT_POLYGON for x in problems) and len(mask[0]) > 4


def _is_short(polygon: Sequence[float]) -> bool:
    return len(polygon) < 6 or len(polygon) % 2 == 1


def _polygon_problems(mask: Any) -> Iterator[Problem]:
    polygons = mask if isinstance(mask, (list, tuple)) else [None]
    if not all(isinstance(x, (list, tuple)) or getattr(x, "ndim", 0) == 1 for x in polygons):
        detail = f"the segmentation {reprlib.repr(mask)} is neither polygons nor run lengths"
        yield Problem(WRONG_TYPE, detail)
        return
    short = [polygon for polygon in mask if _is_short(polygon)]
    if short:
        detail = f"the polygon {reprlib.repr(list(short[0]))} does not have 3 points of x and y"
        yield Problem(SHORT_POLYGON, detail)
    if not all(_is_short(polygon) or _is_in_range(polygon) for polygon in mask):
        detail = f"a polygon has coordinates that are not numbers within {_FARTHEST:.0f} pixels"
        yield Problem("polygon out of range", detail)


def _is_in_range(polygon: Sequence[float]) -> bool:
    try:
        finite = is_number(sum(polygon))  # three times as fast as checking each number
        return finite and min(polygon) > -_FARTHEST and max(polygon) < _FARTHEST
    except (TypeError, ValueError, OverflowError):
        return False


def _rle_problem(rle: Mapping[str, Any], size: Size | None) -> Problem | None:
    """Return the problem of a run-length encoded mask, or None.

    If the runs do not cover all pixels, pycocotools leaves the others uninitialised.
    """
    shape, counts = rle.get("size"), rle.get("counts")
    if not (
        isinstance(shape, (list, tuple))
        and len(shape) == 2
        and all(is_number(x) and x > 0 for x in shape)
    ):
        return Problem(WRONG_TYPE, f"the mask's size {reprlib.repr(shape)} is not (height, width)")
    if isinstance(counts, list):
        if not all(is_number(x) and 0 <= x < 2**32 for x in counts):
            return Problem(WRONG_TYPE, "the mask's counts are not run lengths")
        pixels: int | None = sum(int(x) for x in counts)
    elif isinstance(counts, (str, bytes)):
        pixels = _compressed_pixels(counts)
    else:
        return Problem(WRONG_TYPE, "the mask's counts are not run lengths")
    if size and (shape[1], shape[0]) != size:
        detail = f"the mask has {shape[1]} x {shape[0]} pixels, its image {size[0]} x {size[1]}"
        return Problem("mask of another size", detail)
    if pixels != shape[0] * shape[1]:
        return Problem("broken mask", "the mask's run lengths do not fill its image")
    return None


def _compressed_pixels(counts: str | bytes) -> int | None:
    """Return the number of pixels that runs in COCO's compressed format cover; None if malformed.

    Each character has 5 bits of a number, lowest first, and one bit that is set if more characters
    of the number follow. From the fourth number on, a number is the difference to the one two
    positions before.
    """
    if isinstance(counts, str):
        if not counts.isascii():
            return None
        counts = counts.encode()
    x = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    last = x & 32 == 0
    if not len(x) or x.min() < 0 or x.max() > 63 or not last[-1]:
        return None
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    lengths = np.diff(np.append(starts, len(x)))
    if lengths.max() > 7:  # 32 bits need no more
        return None
    shifts = 5 * (np.arange(len(x)) - np.repeat(starts, lengths))
    values = np.add.reduceat((x & 31) << shifts, starts)
    values -= ((x[last] & 16) > 0).astype(np.int64) << (5 * lengths)
    for first in (1, 2):
        values[first::2] = values[first::2].cumsum()
    return int(values.sum()) if values.min() >= 0 else None


def annotation_problems(
    annotation: Mapping[str, Any], mode: Any, size: Size | None, masks: bool, on_disk: bool
) -> Iterator[Problem]:
    """Yield the problems of one annotation's box and mask.

    Args:
        annotation: annotation of COCO or of a dataset dict.
        mode: a :class:`BoxMode`.
        size: width and height of the image; None if unknown.
        masks: True if masks are trained.
        on_disk: True for an annotation of a COCO file, False if detectron2 has read it.
    """
    problem = _box_problem(annotation.get("bbox"), mode, size)
    if problem:
        yield problem
    if annotation.get("iscrowd", 0) not in (0, 1):
        detail = f"iscrowd is {reprlib.repr(annotation['iscrowd'])}, not 0 or 1"
        yield Problem("iscrowd that is not 0 or 1", detail)
    yield from _mask_problems(annotation, size, masks, on_disk)


# -------------------------------------------------------------------------------- dataset dicts


def _annotations(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = entry.get("annotations")
    return [x for x in found if isinstance(x, dict)] if isinstance(found, (list, tuple)) else []


def entry_issues(
    entry: Mapping[str, Any],
    roots: Sequence[str] = (),
    classes: int | None = None,
    masks: bool = True,
) -> Iterator[Issue]:
    """Yield the issues of one image of any data set, without opening the image.

    Args:
        entry: detectron2's dataset dict.
        roots: see :func:`path_issues`.
        classes: number of classes of the data set; None if unknown.
        masks: True if masks are trained.
    """
    image = name_of(entry)
    if not image:
        yield Issue(WRONG_TYPE, reprlib.repr(entry), "an image has no file_name", True)
    yield from path_issues(entry, roots)
    size, problem = image_size(entry)
    if problem:
        yield problem.at(image, image)
    annotations = _annotations(entry)
    found = entry.get("annotations", [])
    if not isinstance(found, (list, tuple)) or len(annotations) < len(found):
        yield Issue(WRONG_TYPE, image, "the annotations are not a list of dicts", True, image)
    for index, annotation in enumerate(annotations):
        mode = annotation.get("bbox_mode")
        problems = list(annotation_problems(annotation, mode, size, masks, on_disk=False))
        label = annotation.get("category_id")
        last = math.inf if classes is None else classes - 1
        if not isinstance(label, (int, np.integer)) or not 0 <= label <= last:
            detail = f"{reprlib.repr(label)} is not an index of the data set's classes"
            problems.append(Problem("unknown category", detail))
        for problem in problems:
            yield problem.at(f"{image} (annotations[{index}])", image)


def crowd_issues(entries: Iterable[Mapping[str, Any]], name: str) -> Iterator[Issue]:
    """Yield an issue if all objects of a training set are crowds.

    Args:
        entries: detectron2's dataset dicts.
        name: name of the data set.
    """
    crowds = [x.get("iscrowd", 0) == 1 for entry in entries for x in _annotations(entry)]
    if crowds and all(crowds):
        detail = (
            f"all {len(crowds)} objects are crowds (iscrowd 1), regions that a training ignores; "
            "set iscrowd to 0 for the objects to train on"
        )
        yield Issue("no object but crowds", name, detail, True)


def object_counts(entries: Iterable[Mapping[str, Any]]) -> Iterator[int]:
    """Yield the number of objects of each image, without crowds."""
    for entry in entries:
        yield sum(x.get("iscrowd", 0) == 0 for x in _annotations(entry))


def config_issues(
    entry: Mapping[str, Any], num_classes: int | None = None, key: str = "", mask_format: str = ""
) -> Iterator[Issue]:
    """Yield the annotations of one image that do not fit the config.

    Args:
        entry: detectron2's dataset dict.
        num_classes: number of classes that the config predicts; None without instances.
        key: key of the config that has this number.
        mask_format: ``INPUT.MASK_FORMAT``, or "" if masks are not trained.
    """
    image = name_of(entry)
    limit = math.inf if num_classes is None else num_classes
    for index, annotation in enumerate(_annotations(entry)):
        label, problem, dropped = annotation.get("category_id"), None, ""
        if isinstance(label, (int, np.integer)) and label >= limit:
            detail = (
                f"class index {label}, but the config predicts {limit} classes; set {key} to the "
                "data set's number"
            )
            problem = Problem("class beyond the config's number", detail)
        elif not mask_format or annotation.get("iscrowd", 0) != 0:
            continue
        elif not _has_mask(annotation):
            detail = "no segmentation; set MODEL.MASK_ON False or add the masks"
            problem, dropped = Problem("object without a mask", detail), image
        elif mask_format == "polygon" and isinstance(annotation["segmentation"], dict):
            detail = "the mask has run lengths, not polygons; set INPUT.MASK_FORMAT bitmask"
            problem = Problem("mask of another format", detail)
        if problem:
            yield problem.at(f"{image} (annotations[{index}])", dropped)

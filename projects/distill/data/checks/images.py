"""Checks that open images and find those that cannot be used."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from PIL import Image
from PIL.ExifTags import Base as ExifTag

from ...utils.progress import Progress
from ...utils.text import clause
from ..cityscapes import label_problem
from .issues import Issue, Problem, Size, image_size, name_of

T = TypeVar("T")
R = TypeVar("R")

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
LABEL_VALUES = "label_values"
"""Key of dataset dicts whose labels are decoded: number of classes, and value to ignore."""

_TRANSPOSING = (5, 6, 7, 8)  # EXIF's orientations that swap width and height
_TOO_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_WINDOW = 256  # number of images that are checked one by one if one of them kills its process
_READERS = 16  # threads that read files, most of which wait for the disk


def images_below(folder: str) -> list[str]:
    """Return the paths of all images in a folder and below it, sorted, without hidden files."""
    return sorted(
        os.path.join(at, name)
        for at, _, names in os.walk(folder, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
    )


def _files(entry: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Return the files that detectron2's mapper reads, with True for semantic labels."""
    names = ((entry.get("file_name"), False), (entry.get("sem_seg_file_name"), True))
    return [(os.fspath(x), labels) for x, labels in names if isinstance(x, (str, os.PathLike))]


def missing_files(entry: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield the files of an image that do not exist, without opening a file."""
    for path, _ in _files(entry):
        if not PathManager.isfile(path):  # also True for a pipe, whose reader would wait
            folder = PathManager.isdir(path)
            detail = "it is a folder, not a file" if folder else "there is no such file"
            yield Issue("missing file", path, detail, True, name_of(entry))


def header_issues(entry: Mapping[str, Any], sizes: bool = False) -> Iterator[Issue]:
    """Yield the fatal issues that the first bytes of an image's files show.

    Args:
        entry: detectron2's dataset dict. With :data:`LABEL_VALUES`, its labels are decoded.
        sizes: compare the size of the image with the annotated one, and labels with the image.
    """
    missing = list(missing_files(entry))
    yield from missing
    size, _ = image_size(entry)
    for path, labels in [] if missing else _files(entry):
        values = entry.get(LABEL_VALUES) if labels else None
        found, problem = _header(path, labels, sizes, size, values)
        size = size or found
        if problem:
            yield problem.at(path, name_of(entry))


def read_header(path: str) -> tuple[Size | None, Problem | None]:
    """Return the width and height that detectron2 reads from an image, and its problem.

    Both may be None. An image is read once by a process while it does not change.
    """
    try:
        changed = os.stat(path).st_mtime_ns
    except OSError:
        changed = 0
    return _known_header(path, changed)


@cache
def _known_header(path: str, changed: int) -> tuple[Size | None, Problem | None]:
    return _header(path, labels=False, sizes=True)


def _header(
    path: str,
    labels: bool,
    sizes: bool = False,
    size: Size | None = None,
    values: tuple[int, int] | None = None,
) -> tuple[Size | None, Problem | None]:
    """Return the width and height that detectron2 reads, if asked for, and a problem.

    Args:
        path: path of the file.
        labels: True for semantic labels.
        sizes: find the size, and compare it with ``size``.
        size: annotated width and height, or those of the image; None if unknown.
        values: see :data:`LABEL_VALUES`; None: do not decode the labels.
    """
    try:
        with PathManager.open(path, "rb") as f:
            if not f.read(1):
                return None, Problem("unreadable image", "it has 0 bytes")
            f.seek(0)
            image = Image.open(f)
            problem = _mode_problem(image, labels)
            # Pillow decodes a whole PNG to look for EXIF after the pixels, where it hardly ever is.
            look = sizes and (image.format != "PNG" or "exif" in image.info)
            stored, orientation = image.size, _orientation(image) if look else 1
            if values and not problem:
                problem = _values_problem(image, *values)
    except Exception as e:  # Pillow's readers may raise anything for damaged bytes
        return None, _unreadable(e)
    read = stored[::-1] if orientation in _TRANSPOSING else stored
    if not problem and sizes:
        problem = _size_problem(read, size, stored, orientation, labels)
    return read if sizes else None, problem


def _mode_problem(image: Image.Image, labels: bool) -> Problem | None:
    """Return the problem if detectron2 reads other values than the file has."""
    mode = image.mode
    if mode in _TOO_DEEP:
        return Problem("more than 8 bits", f"its values are of mode {mode}; convert it to 8 bits")
    palette = image.getpalette() if labels and mode == "P" else None
    if palette and palette != [k // 3 for k in range(len(palette))]:
        detail = "its labels would be read as colours of its palette; store it as 8-bit greyscale"
        return Problem("coloured labels", detail)
    return None


def _values_problem(image: Image.Image, classes: int, ignored: int) -> Problem | None:
    """Return the problem of the first value that is no class index and not to be ignored."""
    if image.mode not in ("L", "P"):
        detail = f"its labels are of mode {image.mode}; store class indices as 8-bit greyscale"
        return Problem("coloured labels", detail)
    found = np.flatnonzero(np.bincount(np.asarray(image.convert("L")).ravel())).tolist()
    wrong = [x for x in found if x >= classes and x != ignored]
    if not wrong:
        return None
    detail = (
        f"the value {wrong[0]} is not one of the {classes} class indices from 0, nor "
        f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE, which is {ignored}"
    )
    return Problem("unknown label", detail)


def _unreadable(error: Exception) -> Problem:
    if isinstance(error, Image.UnidentifiedImageError):
        return Problem("unreadable image", "Pillow does not know its format")
    reason = getattr(error, "strerror", None) or clause(error) or type(error).__name__
    return Problem("unreadable image", f"it cannot be read ({reason})")


def file_issues(entry: Mapping[str, Any]) -> Iterator[Issue]:
    """Decode the files of an image and yield their issues, without raising an error.

    Two issues are remarks: CMYK, whose colours are converted without their profile, and a rotation
    by EXIF, which detectron2 applies.

    Args:
        entry: detectron2's dataset dict.
    """
    size, _ = image_size(entry)
    missing = list(missing_files(entry))
    yield from missing
    for path, labels in [] if missing else _files(entry):
        _, problem = _header(path, labels, values=entry.get(LABEL_VALUES) if labels else None)
        if problem:
            yield problem.at(path, name_of(entry))
            continue
        found, problems = _decode(path, size)
        size = size or found
        unknown = label_problem(path) if labels and found else None
        for problem in [*problems, *([unknown] if unknown else [])]:
            yield problem.at(path, name_of(entry))


def _decode(path: str, size: Size | None) -> tuple[Size | None, list[Problem]]:
    """Return the width and height that detectron2 reads, and the problems.

    Args:
        path: path of the file.
        size: annotated width and height; None if unknown.
    """
    try:
        with PathManager.open(path, "rb") as f:
            image = Image.open(f)
            mode, stored, orientation = image.mode, image.size, _orientation(image)
        height, width = read_image(path, "RGB").shape[:2]
    except Exception as e:  # Pillow's readers may raise anything for damaged bytes
        return None, [_unreadable(e)]
    problems = []
    if problem := _size_problem((width, height), size, stored, orientation):
        problems.append(problem)
    elif orientation in range(2, 9):
        detail = f"its EXIF orientation {orientation} rotates it; annotations must be rotated, too"
        problems.append(Problem("EXIF rotation", detail, fatal=False))
    if mode == "CMYK":
        detail = "its colours are converted without their profile"
        problems.append(Problem("CMYK", detail, fatal=False))
    return (width, height), problems


def _size_problem(
    read: Size, size: Size | None, stored: Size, orientation: int, labels: bool = False
) -> Problem | None:
    """Return the problem if an image is not of the annotated size.

    Args:
        read: width and height that detectron2 reads.
        size: annotated width and height; None if unknown.
        stored: width and height in the file.
        orientation: EXIF's orientation, by which detectron2 rotates the image.
        labels: True for semantic labels, whose annotated size is that of their image.
    """
    if size is None or size == read:
        return None
    other = "its image has" if labels else "is annotated as"
    detail = f"it has {read[0]} x {read[1]} pixels, but {other} {size[0]} x {size[1]}"
    if stored == size:
        detail += f", because its EXIF orientation {orientation} rotates it"
    return Problem("size not as annotated", detail)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTag.Orientation, 1)
    except Exception:  # detectron2 does not rotate such an image
        return 1


# --------------------------------------------------------------------------------- many images


def in_threads(read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield the results of a function that mostly waits for the disk, in the order of ``items``."""
    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(read, items)


def inspect_headers(entries: Sequence[Mapping[str, Any]], title: str) -> list[Issue]:
    """Return the :func:`header_issues` of many images, which the processes of a run share.

    Args:
        entries: detectron2's dataset dicts, the same in every process.
        title: title of the bar that shows the progress on a terminal.
    """
    own = entries[comm.get_rank() :: comm.get_world_size()]
    with Progress(json=True, transient=True) as progress:
        by_image = in_threads(lambda entry: list(header_issues(entry, sizes=True)), own)
        tracked = progress.track(by_image, total=len(own), description=title)
        found = [issue for issues in tracked for issue in issues]
    return [issue for part in comm.all_gather(found) for issue in part]


def inspect_images(entries: Iterable[Mapping[str, Any]], workers: int) -> Iterator[list[Issue]]:
    """Yield the :func:`file_issues` of each image, in the order of ``entries``.

    Args:
        entries: detectron2's dataset dicts.
        workers: number of processes; 0: this process, which ends if a decoder crashes.
    """
    keys = ("file_name", "sem_seg_file_name", "width", "height", LABEL_VALUES)
    slim = ({k: entry[k] for k in keys if k in entry} for entry in entries)
    if not workers:
        yield from map(_inspect, slim)
        return
    pool = ProcessPoolExecutor(workers)
    try:
        while window := list(islice(slim, _WINDOW)):
            try:
                yield from list(pool.map(_inspect, window, chunksize=8))
            except BrokenProcessPool:
                pool.shutdown()
                yield from map(_inspect_alone, window)
                pool = ProcessPoolExecutor(workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _inspect(entry: Mapping[str, Any]) -> list[Issue]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about images that it can read
        return list(file_issues(entry))


def _inspect_alone(entry: Mapping[str, Any]) -> list[Issue]:
    with ProcessPoolExecutor(1) as pool:
        try:
            return pool.submit(_inspect, entry).result()
        except BrokenProcessPool:
            detail = "its decoder crashes or takes too much memory"
            return [Issue("unreadable image", name_of(entry), detail, True, name_of(entry))]

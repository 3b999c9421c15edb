"""Pictures that cannot be trained on: found where they are opened, and named instead of raised."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, NamedTuple

from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from PIL import Image
from PIL.ExifTags import Base as ExifTag

from ..cityscapes import label_problem
from .issues import (
    Fault,
    Problem,
    Size,
    config_faults,
    entry_faults,
    name_of,
    one_line,
    picture_size,
)

_TOO_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
# What transforms raise for a picture of a size or content that they cannot take. A bug of the
# mapper mostly raises others: AttributeError, NameError, TypeError, KeyError.
_UNFIT = (OSError, ValueError, AssertionError, ArithmeticError, MemoryError, RuntimeError)
_WINDOW = 256  # pictures that are looked at again, one by one, if one of them kills its process


class BadPicture(NamedTuple):
    """What stands in a batch for a picture that cannot be trained on."""

    file_name: str
    reason: str  # one clause without newline


class GuardedMapper:
    """A mapper that returns a :class:`BadPicture` where a file or an annotation is at fault.

    If the mapper raises, the files and annotations are looked at again. Are they in order, and is
    the exception none that an augmentation raises for an odd picture, then it is a bug and passes.

    Args:
        mapper: of detectron2's contract.
    """

    def __init__(self, mapper: Callable[[dict[str, Any]], Any]):
        self.mapper = mapper

    def __call__(self, entry: dict[str, Any]) -> Any:
        """
        Args:
            entry: detectron2's dataset dict.

        Returns:
            What the mapper returns, or a :class:`BadPicture`.
        """
        # Before the mapper, which would wait for a pipe and clip 16 bits to white.
        fault = next(_header_faults(entry), None)
        if fault:
            return BadPicture(name_of(entry), _reason(fault))
        try:
            mapped = self.mapper(entry)
        except Exception as e:
            reason = self._blame(entry, e)
            if reason is None:
                raise
        else:
            reason = _misfit(mapped)
        return BadPicture(name_of(entry), reason) if reason else mapped

    def _blame(self, entry: dict[str, Any], error: Exception) -> str | None:
        masks = getattr(self.mapper, "use_instance_mask", False)
        mask_format = self.mapper.instance_mask_format if masks else ""  # type: ignore[attr-defined]
        for fault in chain(
            file_faults(entry),
            entry_faults(entry, masks=masks),
            config_faults(entry, mask_format=mask_format),
        ):
            if fault.fatal:
                return _reason(fault)
        if isinstance(error, _UNFIT):
            return f"the mapper cannot take it ({type(error).__name__}: {one_line(error)})"
        return None


def _reason(fault: Fault) -> str:
    place = fault.where.removeprefix(fault.picture).strip(" ()")
    return f"{fault.detail} ({place})" if place else fault.detail


def _misfit(mapped: Any) -> str | None:
    """What is wrong with a picture that its mapper has not refused."""
    if not isinstance(mapped, Mapping):
        return None
    arrays = [mapped[key] for key in ("image", "sem_seg") if key in mapped]
    sizes = {tuple(x.shape[-2:]) for x in arrays if hasattr(x, "shape")}
    if any(0 in size for size in sizes):
        return "the augmentations leave no pixel of it"
    return f"picture and semantic labels differ in size: {sizes}" if len(sizes) > 1 else None


# ------------------------------------------------------------------------------- opening files


def _files(entry: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Files that detectron2's mapper reads, and whether they hold semantic labels."""
    names = ((entry.get("file_name"), False), (entry.get("sem_seg_file_name"), True))
    return [(os.fspath(x), labels) for x, labels in names if isinstance(x, (str, os.PathLike))]


def missing_files(entry: Mapping[str, Any]) -> Iterator[Fault]:
    """Files of a picture that are not there; none is opened."""
    for path, _ in _files(entry):
        if not PathManager.isfile(path):  # nor is a pipe a file, whose reader would wait
            folder = PathManager.isdir(path)
            detail = "it is a folder, no file" if folder else "there is no such file"
            yield Fault("missing file", path, detail, True, name_of(entry))


def _header_faults(entry: Mapping[str, Any]) -> Iterator[Fault]:
    """Fatal faults that the first bytes of a picture's files show."""
    yield from missing_files(entry)
    for path, labels in _files(entry):
        problem = _header_problem(path, labels)
        if problem:
            yield problem.at(path, name_of(entry))


def _header_problem(path: str, labels: bool) -> Problem | None:
    try:
        with PathManager.open(path, "rb") as f:
            if not f.read(1):
                return Problem("unreadable picture", "it has 0 bytes")
            f.seek(0)
            image = Image.open(f)
            mode = image.mode
            palette = image.getpalette() if labels and mode == "P" else None
    except Exception as e:  # on broken bytes, Pillow's readers raise nearly anything
        return _unreadable(e)
    if mode in _TOO_DEEP:
        return Problem("more than 8 bits", f"its values are of mode {mode}; convert it to 8 bits")
    if palette and palette != [k // 3 for k in range(len(palette))]:
        detail = "its labels are coloured, and colours would be read; store it as 8-bit greyscale"
        return Problem("coloured labels", detail)
    return None


def _unreadable(error: Exception) -> Problem:
    if isinstance(error, Image.UnidentifiedImageError):
        return Problem("unreadable picture", "it is no picture that Pillow knows")
    reason = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
    return Problem("unreadable picture", f"it cannot be read ({reason})")


def file_faults(entry: Mapping[str, Any]) -> Iterator[Fault]:
    """Decode the files of a picture. Never raises.

    Remarks, which training copes with: CMYK, whose colours are converted without their profile, and
    a rotation by EXIF, which detectron2 applies.

    Args:
        entry: detectron2's dataset dict.
    """
    size, _ = picture_size(entry)
    missing = list(missing_files(entry))
    yield from missing
    for path, labels in [] if missing else _files(entry):
        problem = _header_problem(path, labels)
        if problem:
            yield problem.at(path, name_of(entry))
            continue
        found, problems = _decode(path, size)
        size = size or found
        unknown = label_problem(path) if labels and found else None
        for problem in [*problems, *([unknown] if unknown else [])]:
            yield problem.at(path, name_of(entry))


def _decode(path: str, size: Size | None) -> tuple[Size | None, list[Problem]]:
    """Width and height that detectron2 reads, and faults.

    Args:
        size: that it has to be; None: unknown.
    """
    try:
        with PathManager.open(path, "rb") as f:
            image = Image.open(f)
            mode, stored, orientation = image.mode, image.size, _orientation(image)
        height, width = read_image(path, "RGB").shape[:2]
    except Exception as e:  # on broken bytes, Pillow's readers raise nearly anything
        return None, [_unreadable(e)]
    problems = []
    if size and size != (width, height):
        detail = f"it has {width} x {height} pixels, but is annotated as {size[0]} x {size[1]}"
        if stored == size:
            detail += f", for its EXIF orientation {orientation} rotates it"
        problems.append(Problem("size not as annotated", detail))
    elif orientation in range(2, 9):
        detail = f"its EXIF orientation {orientation} rotates it, which annotations have to follow"
        problems.append(Problem("EXIF rotation", detail, fatal=False))
    if mode == "CMYK":
        detail = "its colours are converted without their profile"
        problems.append(Problem("CMYK", detail, fatal=False))
    return (width, height), problems


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTag.Orientation, 1)
    except Exception:  # as detectron2, which takes such a picture as it is
        return 1


# ------------------------------------------------------------------------------- many pictures


def inspect_pictures(entries: Iterable[Mapping[str, Any]], workers: int) -> Iterator[list[Fault]]:
    """:func:`file_faults` of many pictures, in their order.

    Args:
        entries: detectron2's dataset dicts.
        workers: processes; 0: this one, which a decoder that crashes takes with it.
    """
    keys = ("file_name", "sem_seg_file_name", "width", "height")
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


def _inspect(entry: Mapping[str, Any]) -> list[Fault]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of pictures that it can read
        return list(file_faults(entry))


def _inspect_alone(entry: Mapping[str, Any]) -> list[Fault]:
    with ProcessPoolExecutor(1) as pool:
        try:
            return pool.submit(_inspect, entry).result()
        except BrokenProcessPool:
            detail = "its decoder crashes or takes too much memory"
            return [Fault("unreadable picture", name_of(entry), detail, True, name_of(entry))]

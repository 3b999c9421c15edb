"""KITTI's object detection benchmark: labels and splits.

KITTI's archives unpack to ``training/image_2/<id>.png`` (left colour camera) and
``training/label_2/<id>.txt``. ``ImageSets/<split>.txt`` with one id per line is optional.

Source: Geiger, Lenz, Urtasun, "Are we ready for autonomous driving? The KITTI vision benchmark
suite", CVPR 2012, and the readme of its development kit.
"""

import math
import os
import random
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from ..errors import DataError
from ..utils.text import choices

KITTI_CLASSES = ("Car", "Pedestrian", "Cyclist")
NEIGHBOURS = {"Van": "Car", "Person_sitting": "Pedestrian"}
"""Types similar to a class; detecting them as this class is neither right nor wrong."""
DONT_CARE = "DontCare"
BACKGROUND = ("Truck", "Tram", "Misc")
TYPES = (*KITTI_CLASSES, *NEIGHBOURS, DONT_CARE, *BACKGROUND)

_COLUMNS = 15
_SPLITS = ("train", "val")
_SPLIT_SEED = 0

Box = tuple[float, float, float, float]


class Label(NamedTuple):
    """Line of a label file; unknown numbers, as in every DontCare region, are -1.

    Attributes:
        type: one of :data:`TYPES`.
        truncation: fraction of the object outside the image.
        occlusion: 0 fully visible, 1 partly occluded, 2 largely occluded, 3 unknown.
        box: left, top, right, bottom in pixels; the corner of the image is (0, 0).
    """

    type: str
    truncation: float
    occlusion: int
    box: Box


def read_labels(path: str | os.PathLike[str]) -> list[Label]:
    """Read a label file.

    Raises:
        DataError: the file is missing, or a line is not in KITTI's format.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        raise DataError(f"KITTI's label file {path} cannot be read: {e.strerror}.") from e
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _parse(line: str, where: str) -> Label:
    columns = line.split()
    if len(columns) != _COLUMNS:
        raise DataError(f"{where}: {len(columns)} columns; KITTI's labels have {_COLUMNS}.")
    if columns[0] not in TYPES:
        raise DataError(
            f"{where}: unknown type '{columns[0]}'; types: {choices(columns[0], TYPES)}."
        )
    numbers = [_number(text, where) for text in columns[1:]]
    left, top, right, bottom = numbers[3:7]
    if left > right or top > bottom:
        raise DataError(
            f"{where}: the box {left, top, right, bottom} is not left, top, right, bottom."
        )
    return Label(columns[0], numbers[0], int(numbers[1]), (left, top, right, bottom))


def _number(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: '{text}' is not a number.")
    return number


def split_ids(root: str | os.PathLike[str], split: str) -> list[str]:
    """Return the ids of a split, in the order of ``ImageSets/<split>.txt``.

    If ``ImageSets`` has neither train nor val, all images are shuffled with a fixed seed. The first
    half is train, the other half is val. Then neighbouring frames of a drive are in both, which
    makes results too good. Use the lists of the literature for numbers to publish.

    Raises:
        DataError: the split has no list, is not train or val, or is empty; or an id is not a
            number.
    """
    lists = {name: Path(root, "ImageSets", f"{name}.txt") for name in (*_SPLITS, split)}
    if lists[split].is_file():
        ids = lists[split].read_text(encoding="utf-8", errors="replace").split()
    elif split in _SPLITS and not any(path.is_file() for path in lists.values()):
        ids = _draw(root)[split]
    else:
        raise DataError(f"KITTI's split '{split}' needs the file {lists[split]}.")
    if not ids:
        raise DataError(f"KITTI's split '{split}' below {root} has no images.")
    for name in ids:
        if not (name.isascii() and name.isdigit()):
            raise DataError(f"KITTI's split '{split}' below {root}: '{name}' is not a number.")
    return ids


def _draw(root: str | os.PathLike[str]) -> dict[str, list[str]]:
    ids = sorted(path.stem for path in Path(root, "training", "image_2").glob("*.png"))
    rng = random.Random(_SPLIT_SEED)
    # Python promises to keep the values of random(); shuffle() may change.
    shuffled = sorted(ids, key=lambda _: rng.random())
    half = (len(ids) + 1) // 2
    return {"train": sorted(shuffled[:half]), "val": sorted(shuffled[half:])}


def load_kitti(root: str | os.PathLike[str], split: str) -> list[dict[str, Any]]:
    """Return the dataset dicts of a split.

    Annotations are the objects of ``KITTI_CLASSES``; Truck, Tram and Misc are background. Regions
    to ignore are crowds, which stock detectron2 does not train on and COCO's evaluation ignores.
    These are DontCare regions once per class, Van as Car, and Person_sitting as Pedestrian. They
    also have ``"ignored": True``, see :mod:`.ignored_regions`. Boxes are clipped to their image.
    The key ``label_file`` is the path of the labels.

    Args:
        root: folder with ``training`` and, if it exists, ``ImageSets``.
        split: see :func:`split_ids`.

    Raises:
        DataError: a file or folder is missing, or a label is wrong.
    """
    folder = Path(root, "training", "image_2")
    if not folder.is_dir():
        raise DataError(
            f"There is no folder {folder} with KITTI's images (the environment variable "
            "DETECTRON2_DATASETS names the folder that holds 'kitti')."
        )
    return [_record(Path(root, "training"), name) for name in split_ids(root, split)]


def _record(folder: Path, name: str) -> dict[str, Any]:
    path, label_file = folder / "image_2" / f"{name}.png", folder / "label_2" / f"{name}.txt"
    try:
        with Image.open(path) as image:
            width, height = image.size  # reads only the header
    except OSError as e:
        raise DataError(f"KITTI's image {path} is missing or unreadable.") from e
    annotations = []
    for number, label in enumerate(read_labels(label_file), 1):
        annotations += _annotations(label, width, height, f"{label_file}, line {number}")
    return {
        "file_name": str(path),
        "label_file": str(label_file),
        "image_id": int(name),
        "width": width,
        "height": height,
        "annotations": annotations,
    }


def _annotations(label: Label, width: int, height: int, where: str) -> list[dict[str, Any]]:
    if label.type in BACKGROUND:
        return []
    left, right = (min(max(x, 0.0), width) for x in label.box[::2])
    top, bottom = (min(max(y, 0.0), height) for y in label.box[1::2])
    if left == right or top == bottom:
        if label.type == DONT_CARE:  # no pixel to ignore
            return []
        raise DataError(
            f"{where}: the box {label.box} has no area in its image of {width} x {height} pixels."
        )
    box = {"bbox": [left, top, right, bottom], "bbox_mode": BoxMode.XYXY_ABS}
    if label.type in KITTI_CLASSES:
        return [{**box, "category_id": KITTI_CLASSES.index(label.type), "iscrowd": 0}]
    classes = KITTI_CLASSES if label.type == DONT_CARE else (NEIGHBOURS[label.type],)
    ids = (KITTI_CLASSES.index(name) for name in classes)
    return [{**box, "category_id": i, "iscrowd": 1, "ignored": True} for i in ids]


def register_kitti(name: str, root: str | os.PathLike[str], split: str) -> None:
    """Register a split as data set ``name``, whose files are read at the first use.

    Args:
        name: name in detectron2's catalogues, for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        root: see :func:`load_kitti`.
        split: see :func:`split_ids`.
    """
    DatasetCatalog.register(name, lambda: load_kitti(root, split))
    MetadataCatalog.get(name).set(
        thing_classes=list(KITTI_CLASSES), evaluator_type="kitti", ignored_regions=True
    )


for _split in _SPLITS:
    _datasets = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    register_kitti(f"kitti_{_split}", os.path.join(_datasets, "kitti"), _split)

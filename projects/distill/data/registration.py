"""Registration of the data sets that a config describes, in five formats.

Each has a reader of its files, which also checks them. Training, evaluation and ``distill
check-data`` use it instead of detectron2's readers.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import get_distill_cfg
from ..errors import DataError
from ..utils.text import choices
from .checks.coco_file import CocoFile
from .checks.image_folder import ImageFolder
from .checks.issues import Issue
from .checks.semantic_folders import SemanticFolders
from .checks.voc_folder import VOCFolder
from .checks.yolo_folder import SPLITS, YOLOFolder
from .normalise import Rules

FORMATS = {
    "COCO_FORMAT": "(name, annotations.json, image folder) triple",
    "YOLO_FORMAT": "(name, data.yaml, split) triple",
    "VOC_FORMAT": "(name, folder, split, class names) entry",
    "SEM_SEG_FORMAT": "(name, image folder, label folder, class names) entry",
    "FOLDER_FORMAT": "(name, image folder) pair",
}
_LENGTHS = {"COCO_FORMAT": 3, "YOLO_FORMAT": 3, "FOLDER_FORMAT": 2}  # others end with class names


class OwnFiles(Protocol):
    """Files of a data set, which may be wrong in any way.

    Attributes:
        remarks: issues that are not fatal, for the log.
    """

    remarks: list[Issue]

    def issues(self, masks: bool) -> Iterator[Issue]:
        """Yield every issue of the files, except those that only an evaluation has."""

    def evaluation_issues(self, masks: bool) -> Iterator[Issue]:
        """Yield the issues that stop or spoil an evaluation."""

    def dataset_dicts(self, name: str) -> list[dict[str, Any]]:
        """Return detectron2's dataset dicts."""

    def images(self) -> list[dict[str, Any]]:
        """Return the images that can be opened, as dataset dicts without annotations."""


class OwnSet(NamedTuple):
    """Data set of a config.

    Attributes:
        key: the key that has it, below ``DATASETS``.
        name: name of the data set.
        places: the two names of files, folders or splits that follow; "" for one that is absent.
        classes: class names; empty if a file has them.
    """

    key: str
    name: str
    places: tuple[str, str]
    classes: tuple[str, ...] = ()

    @property
    def semantic(self) -> bool:
        return self.key == "SEM_SEG_FORMAT"


def own_sets(cfg: CfgNode) -> Iterator[OwnSet]:
    """Yield the data sets that a config describes; a plain config of detectron2 has no such keys.

    Raises:
        DataError: an entry is malformed.
    """
    for key in FORMATS:
        for entry in cfg.DATASETS.get(key, ()):
            yield _own_set(key, entry)


def _own_set(key: str, entry: Any) -> OwnSet:
    parts = list(entry) if isinstance(entry, (tuple, list)) else []
    names = parts[3:]
    classes = names[0] if names and isinstance(names[0], (tuple, list)) else ()
    texts = [*parts[:3], *classes]
    complete = len(parts) == _LENGTHS.get(key, 4) and (key in _LENGTHS or classes)
    if not complete or not all(isinstance(x, str) and x for x in texts):
        raise DataError(f"DATASETS.{key}: {entry!r:.200} is not a {FORMATS[key]}.")
    repeated = next((x for x in classes if list(classes).count(x) > 1), "")
    if repeated:
        raise DataError(f"DATASETS.{key} '{parts[0]}' names the class '{repeated}' twice.")
    return OwnSet(key, parts[0], (parts[1], "".join(parts[2:3])), tuple(classes))


def own_set(cfg: CfgNode, name: str) -> OwnSet | None:
    """Return the data set ``name`` of a config, or None if it is registered in another way."""
    return next((x for x in own_sets(cfg) if x.name == name), None)


def is_own_set(cfg: CfgNode, name: str) -> bool:
    """Return True if the config describes the data set."""
    return own_set(cfg, name) is not None


def own_files(name: str) -> OwnFiles | None:
    """Read the files of a registered data set of a config; None for another data set."""
    reader: Callable[[], OwnFiles] | None = MetadataCatalog.get(name).get("own_files")
    return reader() if reader else None


def register_files(annotations: str, images: str, split: str = "") -> tuple[CfgNode, str]:
    """Register annotations of the command line; return a config that has them, and their name.

    Args:
        annotations: a file in COCO format, or the data.yaml of a data set in YOLO's format.
        images: folder of the images of a file in COCO format.
        split: split of a data set in YOLO's format.

    Raises:
        DataError: the file or the folder is missing.
    """
    key, other = ("YOLO_FORMAT", split) if split else ("COCO_FORMAT", images)
    cfg, name = get_distill_cfg(), f"{annotations} with {other}"
    cfg.DATASETS[key] = ((name, annotations, other),)
    register_own_sets(cfg)
    return cfg, name


def label_digests(cfg: CfgNode) -> dict[str, str]:
    """Return a hash of the labels of each training set of ``DATASETS.YOLO_FORMAT``, by its name."""
    names = [
        x.name for x in own_sets(cfg) if x.key == "YOLO_FORMAT" and x.name in cfg.DATASETS.TRAIN
    ]
    files = {name: own_files(name) for name in names}
    return {name: x.digest for name, x in files.items() if isinstance(x, YOLOFolder)}


def register_own_sets(cfg: CfgNode, names: Sequence[str] | None = None) -> None:
    """Register the data sets that a config describes.

    Args:
        cfg: the whole config.
        names: names of the data sets to register; None: all.

    Raises:
        DataError: an entry is malformed, a file or folder is missing, or a name is registered for
            other files.
    """
    for own in list(own_sets(cfg)):
        if names is None or own.name in names:
            _REGISTER[own.key](cfg, own)


def _register_coco(cfg: CfgNode, own: OwnSet) -> None:
    annotations, images = own.places
    if not os.path.isfile(annotations):
        raise DataError(f"DATASETS.COCO_FORMAT '{own.name}': there is no file '{annotations}'.")
    _check_folders(own, images)
    rules = Rules.from_config(cfg)
    _register(
        own,
        partial(CocoFile, annotations, images, rules),
        {"json_file": annotations, "image_root": images},
        {"rules": rules},
        evaluator_type="coco",
        ignored_regions=True,
    )


def _register_yolo(cfg: CfgNode, own: OwnSet) -> None:
    path, split = own.places
    if not os.path.isfile(path):
        raise DataError(f"DATASETS.YOLO_FORMAT '{own.name}': there is no file '{path}'.")
    if split not in SPLITS:
        raise DataError(
            f"DATASETS.YOLO_FORMAT '{own.name}': the split is '{split}'; it must be one of: "
            f"{choices(split, SPLITS)}."
        )
    rules = Rules.from_config(cfg)
    _register(
        own,
        partial(YOLOFolder, path, split, rules),
        {"json_file": path, "split": split},  # detectron2's evaluator looks for a json_file
        {"rules": rules},
        evaluator_type="coco",
    )


def _register_voc(cfg: CfgNode, own: OwnSet) -> None:
    folder, split = own.places
    _check_folders(own, *(os.path.join(folder, x) for x in ("Annotations", "JPEGImages")))
    _register(
        own,
        partial(VOCFolder, folder, split, own.classes),
        {"dirname": folder, "split": split},
        {"thing_classes": list(own.classes)},
        evaluator_type="pascal_voc",
        year=2012,  # AP is the area below the curve; that of 2007 has 11 points
    )


def _register_semantic(cfg: CfgNode, own: OwnSet) -> None:
    images, labels = own.places
    _check_folders(own, images, labels)
    _register(
        own,
        partial(SemanticFolders, images, labels),
        {"image_root": images, "sem_seg_root": labels},
        {
            "stuff_classes": list(own.classes),
            "ignore_label": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        },
        evaluator_type="sem_seg",
    )


def _register_folder(cfg: CfgNode, own: OwnSet) -> None:
    folder, _ = own.places
    _check_folders(own, folder)
    _register(own, partial(ImageFolder, folder), {"image_root": folder}, {})


_REGISTER = {
    "COCO_FORMAT": _register_coco,
    "YOLO_FORMAT": _register_yolo,
    "VOC_FORMAT": _register_voc,
    "SEM_SEG_FORMAT": _register_semantic,
    "FOLDER_FORMAT": _register_folder,
}


def _check_folders(own: OwnSet, *folders: str) -> None:
    for folder in folders:
        if not os.path.isdir(folder):
            raise DataError(f"DATASETS.{own.key} '{own.name}': there is no folder '{folder}'.")


def _register(
    own: OwnSet,
    reader: Callable[[], OwnFiles],
    files: Mapping[str, Any],
    choices: Mapping[str, Any],
    **metadata: Any,
) -> None:
    """Register a data set, or replace one of the same files for which the config chose otherwise.

    Args:
        own: the data set.
        reader: reads its files.
        files: metadata that identifies the files.
        choices: metadata that another config may have otherwise.
        metadata: other metadata.
    """
    if own.name in DatasetCatalog.list():
        known = MetadataCatalog.get(own.name)
        if any(known.get(key) != value for key, value in files.items()):
            raise DataError(
                f"DATASETS.{own.key}: the name '{own.name}' is already registered for other files; "
                "choose another."
            )
        if all(known.get(key) == value for key, value in choices.items()):
            return
        DatasetCatalog.remove(own.name)
        MetadataCatalog.remove(own.name)
    DatasetCatalog.register(own.name, lambda: reader().dataset_dicts(own.name))
    MetadataCatalog.get(own.name).set(own_files=reader, **files, **choices, **metadata)

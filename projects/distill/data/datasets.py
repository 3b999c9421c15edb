"""Data sets: registration by config alone, and the checks before training."""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..config import student_config
from ..errors import DataError

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, AssertionError)
BOX_TOLERANCE = 1.0  # pixels by which a box may exceed its picture; annotation tools round


def register_coco_format(cfg: CfgNode, names: Sequence[str] | None = None) -> None:
    """Register ``DATASETS.COCO_FORMAT``: (name, annotations.json, image folder) triples.

    Args:
        cfg: the whole config.
        names: data sets to register; None: all.

    Raises:
        DataError: a triple is malformed, a path is missing, or a name stands for other files.
    """
    for entry in cfg.DATASETS.COCO_FORMAT:
        triple = isinstance(entry, (tuple, list)) and len(entry) == 3
        if not triple or not all(isinstance(x, str) for x in entry):
            raise DataError(
                f"DATASETS.COCO_FORMAT: {entry!r} is not a (name, annotations.json, image folder) "
                "triple."
            )
        name, annotations, images = entry
        if names is not None and name not in names:
            continue
        if not os.path.isfile(annotations):
            raise DataError(f"DATASETS.COCO_FORMAT '{name}': there is no file '{annotations}'.")
        if not os.path.isdir(images):
            raise DataError(f"DATASETS.COCO_FORMAT '{name}': there is no folder '{images}'.")
        if name in DatasetCatalog.list():
            metadata = MetadataCatalog.get(name)
            if (metadata.get("json_file"), metadata.get("image_root")) == (annotations, images):
                continue
            raise DataError(
                f"DATASETS.COCO_FORMAT: the name '{name}' already stands for other files; "
                "choose another."
            )
        register_coco_instances(name, {}, annotations, images)


def class_names(cfg: CfgNode, semantic: bool = False) -> tuple[str, ...] | None:
    """Class names of the first training set; None if they cannot be known.

    Args:
        cfg: of the student or the teacher.
        semantic: names of semantic classes instead of those with instances.
    """
    if not cfg.DATASETS.TRAIN:
        return None
    name, key = cfg.DATASETS.TRAIN[0], "stuff_classes" if semantic else "thing_classes"
    annotations = {entry[0]: entry[1] for entry in cfg.DATASETS.COCO_FORMAT}.get(name)
    registered = name in DatasetCatalog.list()
    metadata = MetadataCatalog.get(name) if registered else None
    if annotations and (metadata is None or metadata.get("json_file") != annotations):
        return _coco_names(annotations)  # a teacher's own set, which nobody trains on here
    if metadata is None:
        return None
    if metadata.get(key) is None and metadata.get("evaluator_type") == "coco":
        _load(name)  # COCO's names stand in its annotation file
    names = metadata.get(key)
    return tuple(names) if names else None


def _coco_names(annotations: str) -> tuple[str, ...] | None:
    """Category names in detectron2's order, by id; None if the file cannot tell them."""
    try:
        with open(annotations) as f:
            categories = json.load(f)["categories"]
        return tuple(c["name"] for c in sorted(categories, key=lambda c: c["id"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _load(name: str) -> list[dict[str, Any]]:
    try:
        return DatasetCatalog.get(name)
    except DataError:
        raise
    except _UNREADABLE as e:
        path = MetadataCatalog.get(name).get("json_file")
        reason = (path and _coco_problem(path)) or f"{type(e).__name__} {_one_line(e)}"
        raise DataError(
            f"Data set '{name}' cannot be read from {path or 'its files'}: {reason}."
        ) from e


def _one_line(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    return " ".join(text.split())[:200].rstrip(".!")


def _coco_problem(path: str) -> str | None:
    """What is wrong with an annotation file that detectron2 could not read, or None."""
    if not os.path.isfile(path):
        return (
            "there is no such file (the environment variable DETECTRON2_DATASETS names the folder "
            "of detectron2's own data sets)"
        )
    try:
        with open(path) as f:
            content = json.load(f)
    except ValueError as e:
        return f"it is no JSON ({_one_line(e)})"
    if not isinstance(content, dict):
        return f"it holds a JSON {type(content).__name__}, not COCO's instances"
    if not content.get("categories"):  # the others may be missing
        return "it is not in COCO's instances format, which has images, annotations, categories"
    return None


def load_training_set(cfg: CfgNode) -> list[dict[str, Any]]:
    """The training pictures as detectron2 dataset dicts, checked.

    Raises:
        DataError: a set is unreadable or empty, the sets' classes differ, a picture is missing, a
            box lies outside its picture, a class is beyond the config's number of classes, or a
            mask is missing where masks are trained.
    """
    try:
        dicts = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        )
    except _UNREADABLE as e:
        raise _training_set_error(cfg, e) from e
    # One picture shows a wrong folder; looking for all of them would take long.
    if not PathManager.isfile(dicts[0]["file_name"]):
        raise DataError(
            f"There is no picture {dicts[0]['file_name']}, which DATASETS.TRAIN "
            f"{tuple(cfg.DATASETS.TRAIN)} lists; correct the image folder."
        )
    check_annotations(dicts, number_of_classes(cfg), cfg.MODEL.MASK_ON)
    return dicts


def _training_set_error(cfg: CfgNode, error: Exception) -> DataError:
    """The reason of a failed reading, which detectron2's exceptions only hint at."""
    for name in cfg.DATASETS.TRAIN:
        if not _load(name):
            return DataError(f"Data set '{name}' of DATASETS.TRAIN has no pictures.")
    if isinstance(error, AssertionError):
        return DataError(
            f"No picture of DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has an annotation; set "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS False to train on pictures without any."
        )
    return DataError(f"DATASETS.TRAIN: {_one_line(error)}.")  # it names the sets and classes


def check_test_set(name: str) -> None:
    """Refuse a test set of COCO or KITTI that could not be evaluated after the training.

    Raises:
        DataError: it is unreadable or has no pictures.
    """
    if MetadataCatalog.get(name).get("evaluator_type") in ("coco", "kitti") and not _load(name):
        raise DataError(f"Data set '{name}' of DATASETS.TEST has no pictures.")


def number_of_classes(cfg: CfgNode) -> int | None:
    """Instance classes that the configured student predicts; None if it has none."""
    architecture = student_config(cfg).MODEL.META_ARCHITECTURE
    if architecture == "RetinaNet":
        return cfg.MODEL.RETINANET.NUM_CLASSES
    if architecture in ("GeneralizedRCNN", "PanopticFPN"):
        return cfg.MODEL.ROI_HEADS.NUM_CLASSES
    return None


def check_annotations(dicts: list[dict[str, Any]], num_classes: int | None, masks: bool) -> None:
    """Refuse annotations that would train a wrong model or stop it in the middle."""
    outside: list[str] = []
    for picture in dicts:
        for annotation in picture.get("annotations", ()):
            if len(annotation.get("bbox", ())) < 4:
                raise DataError(f"An annotation of {picture['file_name']} has no box; add one.")
            where = f"{picture['file_name']} (annotation box {annotation['bbox']})"
            if _outside(annotation, picture):
                outside.append(where)
            if num_classes is not None and annotation["category_id"] >= num_classes:
                raise DataError(
                    f"Class index {annotation['category_id']} in {where}, but the config predicts "
                    f"{num_classes} classes; set MODEL.ROI_HEADS.NUM_CLASSES (of a RetinaNet: "
                    "MODEL.RETINANET.NUM_CLASSES) to the data set's number."
                )
            if masks and not annotation.get("segmentation"):
                raise DataError(
                    f"No segmentation in {where}; set MODEL.MASK_ON False or add the masks."
                )
    if outside:
        raise DataError(
            f"Boxes outside their picture ({len(outside)} in all), the first in {outside[0]}; "
            "correct or remove them."
        )


def _outside(annotation: dict[str, Any], picture: dict[str, Any]) -> bool:
    if "height" not in picture:
        return False
    box = list(annotation["bbox"])
    if annotation["bbox_mode"] == BoxMode.XYWH_ABS:
        box[2:] = box[0] + box[2], box[1] + box[3]  # BoxMode.convert takes 17 s on COCO
    else:
        box = BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS)
    x1, y1, x2, y2 = (float(v) for v in box)
    limit_x, limit_y = picture["width"] + BOX_TOLERANCE, picture["height"] + BOX_TOLERANCE
    inside = -BOX_TOLERANCE <= x1 <= x2 <= limit_x and -BOX_TOLERANCE <= y1 <= y2 <= limit_y
    return not inside or not np.isfinite([x1, y1, x2, y2]).all()

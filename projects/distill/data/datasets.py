"""Data sets: registration by config alone, and the checks before training."""

import os
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode

from ..config import student_config
from ..errors import DataError

BOX_TOLERANCE = 1.0  # pixels by which a box may exceed its picture; annotation tools round


def register_coco_format(cfg: CfgNode) -> None:
    """Register ``DATASETS.COCO_FORMAT``: (name, annotations.json, image folder) triples.

    Raises:
        DataError: a triple is malformed, a path is missing, or a name stands for other files.
    """
    for entry in cfg.DATASETS.COCO_FORMAT:
        if len(entry) != 3 or not all(isinstance(x, str) for x in entry):
            raise DataError(
                f"DATASETS.COCO_FORMAT: {entry!r} is not a (name, annotations.json, image folder) "
                "triple."
            )
        name, annotations, images = entry
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
    if not cfg.DATASETS.TRAIN or cfg.DATASETS.TRAIN[0] not in DatasetCatalog.list():
        return None
    name, key = cfg.DATASETS.TRAIN[0], "stuff_classes" if semantic else "thing_classes"
    metadata = MetadataCatalog.get(name)
    if metadata.get(key) is None and metadata.get("evaluator_type") == "coco":
        _load(name)  # COCO's names stand in its annotation file
    names = metadata.get(key)
    return tuple(names) if names else None


def _load(name: str) -> list[dict[str, Any]]:
    try:
        return DatasetCatalog.get(name)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AssertionError) as e:
        where = MetadataCatalog.get(name).get("json_file", "its files")
        raise DataError(
            f"Data set '{name}' cannot be read from {where}: {type(e).__name__} "
            f"{' '.join(str(e).split())[:200]}."
        ) from e


def load_training_set(cfg: CfgNode) -> list[dict[str, Any]]:
    """The training pictures as detectron2 dataset dicts, checked.

    Raises:
        DataError: a set is unreadable or empty, a box lies outside its picture, a class is beyond
            the config's number of classes, or a mask is missing where masks are trained.
    """
    for name in cfg.DATASETS.TRAIN:
        if not _load(name):
            raise DataError(f"Data set '{name}' of DATASETS.TRAIN has no pictures.")
    try:
        dicts = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        )
    except AssertionError as e:
        raise DataError(
            f"No picture of DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has an annotation; set "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS False to train on pictures without any."
        ) from e
    check_annotations(dicts, number_of_classes(cfg), cfg.MODEL.MASK_ON)
    return dicts


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
            where = f"{picture['file_name']} (annotation box {annotation['bbox']})"
            if _outside(annotation, picture):
                outside.append(where)
            if num_classes is not None and annotation["category_id"] >= num_classes:
                raise DataError(
                    f"Class index {annotation['category_id']} in {where}, but the config predicts "
                    f"{num_classes} classes; set NUM_CLASSES to the data set's number."
                )
            if masks and not annotation.get("segmentation"):
                raise DataError(
                    f"No segmentation in {where}; set MODEL.MASK_ON False or add the masks."
                )
    if outside:
        raise DataError(
            f"{len(outside)} boxes lie outside their picture, the first in {outside[0]}; correct "
            "or remove them."
        )


def _outside(annotation: dict[str, Any], picture: dict[str, Any]) -> bool:
    if "height" not in picture:
        return False
    box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
    x1, y1, x2, y2 = (float(v) for v in box)
    limit_x, limit_y = picture["width"] + BOX_TOLERANCE, picture["height"] + BOX_TOLERANCE
    inside = -BOX_TOLERANCE <= x1 <= x2 <= limit_x and -BOX_TOLERANCE <= y1 <= y2 <= limit_y
    return not inside or not np.isfinite([x1, y1, x2, y2]).all()

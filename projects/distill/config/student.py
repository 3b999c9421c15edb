"""The files with which a student leaves its training: its config and its class names."""

import json
import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..errors import ConfigError
from ..utils.io import write_json, write_text
from .load import load_config
from .resolve import student_config

CONFIG, CLASSES, WEIGHTS = "student.yaml", "classes.json", "model_final.pth"
_KINDS = ("thing_classes", "stuff_classes")  # attributes of detectron2's metadata


def write_student(cfg: CfgNode) -> None:
    """Write the student's plain detectron2 config and its class names to ``OUTPUT_DIR``."""
    student = student_config(cfg)
    student.MODEL.WEIGHTS = os.path.join(os.path.abspath(cfg.OUTPUT_DIR), WEIGHTS)
    write_text(os.path.join(cfg.OUTPUT_DIR, CONFIG), student.dump())
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    classes = {kind: list(metadata.get(kind)) for kind in _KINDS if metadata.get(kind)}
    write_json(os.path.join(cfg.OUTPUT_DIR, CLASSES), classes)


def get_student_cfg(path: str) -> CfgNode:
    """Return the config of a ``student.yaml``, for detectron2's ``build_model`` or predictor.

    ``MODEL.WEIGHTS`` is the checkpoint beside the file, wherever the folder is now. The class names
    beside it become those of the first test set, whose metadata ``DefaultPredictor`` uses.

    Raises:
        ConfigError: the file or its class names cannot be read.
    """
    cfg = load_config(path)
    classes = os.path.join(os.path.dirname(path), CLASSES)
    if not os.path.isfile(classes):  # earlier versions wrote none
        return cfg
    try:
        with open(classes) as f:
            names = {kind: list(value) for kind, value in json.load(f).items() if kind in _KINDS}
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise ConfigError(f"'{classes}' cannot be read; train again or remove it.") from e
    # Two students of one process have names of their own.
    cfg.DATASETS.TEST = cfg.DATASETS.TEST or (f"classes of {os.path.abspath(path)}",)
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    for kind, value in names.items():
        if metadata.get(kind) is None:
            metadata.set(**{kind: value})
    return cfg

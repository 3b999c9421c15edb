"""Values on which a training depends: each checkpoint has them, and a resume compares them.

Places of files are not compared, but their contents: data and a teacher may move. Folders in VOC's
layout and semantic labels are not read for this, so only the class names of such data are compared.
"""

import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from detectron2.config import CfgNode

from ..heads import DISTILL_HEAD_REGISTRY, teacher_needed
from ..utils.io import file_hash
from .architecture import student_architecture
from .defaults import declared_keys
from .detectron2_rules import leaves
from .resolve import balance_mode, teacher_config
from .several import TEACHER, TEACHERS, OneTeacher, one_per_teacher

DIGITS = 16  # as many digits of a hash tell files apart, and fit into a message

# Keys that change nothing of a training that goes on: evaluation, logs, places, starting weights.
_IGNORED = (
    *("CUDNN_BENCHMARK", "DETERMINISTIC", "FLOAT32_PRECISION", "GLOBAL.*", "OUTPUT_DIR", "VERSION"),
    *("DATALOADER.NUM_WORKERS", "DATALOADER.TIMEOUT", "DATASETS.*_FORMAT", "DATASETS.TEST"),
    *(
        "INPUT.*_TEST",
        "INPUT.AUGMENT.CACHE",
        "MODEL.*_TEST",
        "MODEL.ALLOW_CODE",
        "MODEL.ALLOW_PICKLE",
        "MODEL.DEVICE",
        "MODEL.WEIGHTS",
    ),
    *("MODEL.DISTILL.COSINE_PERIOD", "MODEL.DISTILL.INHERIT", "MODEL.PANOPTIC_FPN.COMBINE.*"),
    "MODEL.DISTILL.STUDENT_ARCHITECTURE",
    *(f"{TEACHER}.CONFIG_FILE", f"{TEACHER}.OPTS", f"{TEACHER}.WEIGHTS"),
    *(f"{TEACHER}.CACHE.*", f"{TEACHER}.DETECTIONS", TEACHERS),
    *("MODEL.ONNX.FILE", "MODEL.TIMM.PRETRAINED", "MODEL.TIMM.WEIGHTS", "SOLVER.CHECKPOINT_PERIOD"),
    *("SOLVER.KEEP_CHECKPOINTS", "SOLVER.MAX_SKIPS", "SOLVER.ON_NONFINITE", "SOLVER.SCHEDULE"),
    *(
        "REPORT.*",
        "TEST.[!P]*",
        "TRACKERS",
        "VIS_PERIOD",
    ),  # not PRECISE_BN, which changes the student
)
# Keys whose new value takes effect from the next iteration on.
_APPLIED = (
    *(
        "DATALOADER.ON_BAD_IMAGE",
        "INPUT.AUGMENT.SWITCH_ITER",
        "SOLVER.ACCUMULATE",
        "SOLVER.AMP.ENABLED",
        "SOLVER.BASE_LR*",
    ),
    "SOLVER.BIAS_LR_FACTOR",
    *("SOLVER.CLIP_GRADIENTS.*", "SOLVER.EMA.*", "SOLVER.FLAT_FRACTION", "SOLVER.GAMMA"),
    *("SOLVER.TAIL_FRACTION", "MODEL.YOLOX.L1_FROM_ITER"),
    *("SOLVER.LR_SCHEDULER_NAME", "SOLVER.MAX_ITER", "SOLVER.MOMENTUM", "SOLVER.NESTEROV"),
    *("SOLVER.NUM_DECAYS", "SOLVER.POLY_LR_*", "SOLVER.RESCALE_INTERVAL", "SOLVER.STEPS"),
    *("SOLVER.PATIENCE", "SOLVER.WARMUP_*", "SOLVER.WEIGHT_DECAY*"),
    *("MODEL.DISTILL.*WEIGHT", "MODEL.DISTILL.*_ITER", "MODEL.DISTILL.*_ITERS"),
    *("MODEL.DISTILL.BALANCE.RATIO", "MODEL.DISTILL.BALANCE.FADE", f"{TEACHERS}.*.FACTOR"),
    *(f"{TEACHER}.DTYPE", f"{TEACHER}.CHANNELS_LAST", f"{TEACHER}.COMPILE"),
)
# Values for checkpoints of versions that lack a key, where its default is another.
_BEFORE = {"MODEL.DISTILL.BALANCE.MODE": "none"}
_OF_TEACHER = ("MODEL.*", "INPUT.FORMAT", "DATASETS.TRAIN")  # keys of its config that it depends on


def training_values(
    cfg: CfgNode,
    teachers: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    unlabeled: str = "",
) -> dict[str, Any]:
    """Return the values on which a training depends, as plain types by dotted name.

    Args:
        cfg: the whole config.
        teachers: hash of the weights of each teacher, by its name.
        labels: hash of the labels of each training set of ``DATASETS.YOLO_FORMAT``, by its name.
        unlabeled: hash of the names of the images of ``DATASETS.UNLABELED``.
    """
    heads = {name.upper() for name in cfg.MODEL.DISTILL.HEADS}
    others = {f"MODEL.DISTILL.{name.upper()}." for name, _ in DISTILL_HEAD_REGISTRY}
    others -= {f"MODEL.DISTILL.{name}." for name in heads}
    values = {
        key: _plain(value)
        for key, value in leaves(cfg)
        if not _fits(key, _IGNORED) and not key.startswith(tuple(others))
    }
    # DistillRCNN and the student's own architecture are two names of one training.
    values["MODEL.META_ARCHITECTURE"] = student_architecture(cfg)
    values["MODEL.DISTILL.BALANCE.MODE"] = balance_mode(cfg)
    for name, annotations, _ in cfg.DATASETS.COCO_FORMAT:
        if name in cfg.DATASETS.TRAIN and os.path.isfile(annotations):
            values[f"DATASETS.COCO_FORMAT '{name}'"] = file_hash(annotations)[:DIGITS]
    for name, digest in (labels or {}).items():
        values[f"DATASETS.YOLO_FORMAT '{name}'"] = digest[:DIGITS]
    if cfg.DATASETS.UNLABELED:
        values["DATASETS.UNLABELED (images)"] = unlabeled[:DIGITS]
    for key in ("VOC_FORMAT", "SEM_SEG_FORMAT"):
        for name, *_, classes in cfg.DATASETS[key]:
            if name in cfg.DATASETS.TRAIN:
                values[f"DATASETS.{key} '{name}'"] = _plain(classes)
    detections = cfg.MODEL.DISTILL.TEACHER.DETECTIONS
    if os.path.isfile(detections):
        values[f"{TEACHER}.DETECTIONS"] = file_hash(detections)[:DIGITS]
    parts = [x for x in one_per_teacher(cfg) if teacher_needed(x.cfg)]
    values[TEACHERS] = [x.name for x in parts if x.name]
    for one in parts:
        own = _teacher_values(one, (teachers or {}).get(one.name, ""))
        prefix = f"{TEACHERS}.{one.name}" if one.name else TEACHER
        values |= {f"{prefix}.{key}": value for key, value in own.items()}
    return values


def _teacher_values(one: OneTeacher, weights: str) -> dict[str, Any]:
    """Return the values of a teacher by their keys in ``MODEL.DISTILL.TEACHER``.

    Args:
        weights: hash of its weights.
    """
    node = one.cfg.MODEL.DISTILL
    cache = node.TEACHER.CACHE
    values: dict[str, Any] = {
        "CACHE.DTYPE": cache.DTYPE if cache.DIR else "float32",
        "WEIGHTS": weights[:DIGITS],
    }
    if one.name:
        values |= {"FACTOR": one.factor, "HEADS": _plain(node.HEADS)}
        values |= {key: _plain(node.TEACHER[key]) for key in ("CLASSES", "SCALE")}
    for key, value in leaves(teacher_config(one.cfg)):
        of_network = _fits(key, _OF_TEACHER) and not key.startswith("MODEL.DISTILL.")
        if of_network and not _fits(key, _IGNORED):
            values[f"CONFIG_FILE ({key})"] = _plain(value)
    return values


def changed_values(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return old and new value of the keys that differ.

    A key that the version of the checkpoint lacks has its default there, or what that version did.

    Args:
        saved: values of the checkpoint.
        own: values of this training.
    """
    defaults = {name: _plain(key.initial) for name, key in declared_keys().items()} | _BEFORE
    pairs = {key: (saved.get(key, defaults.get(key)), own[key]) for key in own}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def takes_effect(key: str) -> bool:
    """Return whether a training may go on with another value of a key.

    The factors of the terms of a head's loss are such keys, too.
    """
    declared = declared_keys().get(key)
    return _fits(key, _APPLIED) or (declared is not None and bool(declared.term))


def _fits(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _plain(value: Any) -> Any:
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value

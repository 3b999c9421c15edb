"""The checks that run before any weight is loaded."""

import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    PanopticFPN,
    SemanticSegmentor,
)
from detectron2.modeling.meta_arch.dense_detector import DenseDetector

from ..errors import ConfigError, of_teacher
from ..families import FAMILIES
from ..heads import DISTILL_HEAD_REGISTRY, teacher_needed
from ..section import check_choice
from .architecture import distill_architectures, student_architecture, student_class
from .defaults import AUGMENT_STEPS, SIZED_STEPS, TRACKERS, declared_keys
from .detectron2_rules import check_read, check_rules, check_together, leaves
from .resolve import teacher_config
from .several import check_teachers, one_per_teacher

INHERITED_PARTS = ("neck", "head")
ONLY_TEACH = ("FeatureExtractor", "LazyNetwork")


def validate_config(cfg: CfgNode, *, training: bool = True) -> None:
    """Check every value that this package reads, before any weight is loaded.

    Args:
        cfg: the whole config, as :func:`distill.config.load_config` returns it.
        training: also check the training sets and the teacher's config, which evaluation does not
            need.

    Raises:
        ConfigError: names the key, its value and the valid choices, nearest first.
    """
    check_values(cfg)
    if cfg.SOLVER.SCHEDULE != "1x":
        raise ConfigError(
            f"SOLVER.SCHEDULE is {cfg.SOLVER.SCHEDULE}, but MAX_ITER and STEPS are not scaled yet; "
            "load the config with distill.config.load_config, or set it to 1x."
        )
    check_read(cfg)
    architectures = [name for name, _ in META_ARCH_REGISTRY]
    check_choice("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, architectures)
    if student_architecture(cfg) in ONLY_TEACH:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE {student_architecture(cfg)} only teaches; set it to the "
            "student's."
        )
    _validate_data(cfg, training)
    if cfg.MODEL.DISTILL.HEADS or cfg.MODEL.META_ARCHITECTURE in distill_architectures():
        _validate_distill(cfg)
    check_teachers(cfg)
    for one in one_per_teacher(cfg) if training else ():
        if teacher_needed(one.cfg):
            with of_teacher(one.name):
                _validate_teacher(teacher_config(one.cfg))
    if training:
        _validate_detections(cfg)
        _validate_unlabeled(cfg)
    if training and cfg.SOLVER.QAT.ENABLED and not cfg.MODEL.WEIGHTS:
        raise ConfigError(
            "SOLVER.QAT.ENABLED is True, but MODEL.WEIGHTS is empty; name the checkpoint of a "
            "trained student, whose norms keep their statistics."
        )
    if training and cfg.REPORT.ENABLED:
        _validate_report(cfg)
    _validate_augment(cfg)
    _validate_drawing(cfg)
    _validate_test_modes(cfg)
    for name in cfg.TRACKERS:
        check_choice("TRACKERS", name, TRACKERS)


def _validate_data(cfg: CfgNode, training: bool) -> None:
    for key in ("TRAIN", "TEST") if training else ("TEST",):
        for name in cfg.DATASETS[key]:
            check_choice(f"DATASETS.{key}", name, DatasetCatalog.list())
    if training and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty; name at least one data set.")
    in_files = [entry[0] for entry in cfg.DATASETS.COCO_FORMAT]  # the reader checks these
    for name in cfg.DATASETS.TRAIN if training and cfg.MODEL.KEYPOINT_ON else ():
        if name not in in_files and not MetadataCatalog.get(name).get("keypoint_names"):
            raise ConfigError(
                f"MODEL.KEYPOINT_ON is True, but DATASETS.TRAIN '{name}' has no keypoints; set it "
                "to False."
            )


def _validate_unlabeled(cfg: CfgNode) -> None:
    """Refuse unlabelled images of which nothing can be learned, and folders without labels."""
    node, folders = cfg.DATASETS, [entry[0] for entry in cfg.DATASETS.FOLDER_FORMAT]
    for key in ("TRAIN", "TEST"):
        for name in node[key]:
            if name in folders:
                raise ConfigError(
                    f"DATASETS.{key} names '{name}' of DATASETS.FOLDER_FORMAT, whose images have "
                    "no labels; name it in DATASETS.UNLABELED."
                )
    if not node.UNLABELED:
        return
    named = f"DATASETS.UNLABELED is {tuple(node.UNLABELED)}"
    for name in node.UNLABELED:
        check_choice("DATASETS.UNLABELED", name, DatasetCatalog.list())
    if not cfg.MODEL.DISTILL.HEADS or not teacher_needed(cfg):
        raise ConfigError(
            f"{named}, but no head of MODEL.DISTILL.HEADS {tuple(cfg.MODEL.DISTILL.HEADS)} has a "
            "teacher, who says what is in these images; name such a head, or empty it."
        )
    student, crop = student_class(cfg), cfg.INPUT.CROP
    by_category = crop.ENABLED and crop.SINGLE_CATEGORY_MAX_AREA < 1
    reasons = {
        "PanopticFPN needs semantic labels, too": issubclass(student, PanopticFPN),
        "MODEL.KEYPOINT_ON is True, and teachers detect no keypoints": cfg.MODEL.KEYPOINT_ON,
        "MODEL.DISTILL.TEACHER.DETECTIONS are of labelled images only": bool(
            cfg.MODEL.DISTILL.TEACHER.DETECTIONS
        ),
        "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA is below 1, which needs semantic labels": (
            by_category and issubclass(student, SemanticSegmentor)
        ),
        "TEST.PRECISE_BN.ENABLED is True, which reads labelled batches": (
            cfg.TEST.PRECISE_BN.ENABLED
        ),
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    if reason:
        raise ConfigError(f"{named}, but {reason}; change it, or empty DATASETS.UNLABELED.")


def _validate_augment(cfg: CfgNode) -> None:
    """Refuse augmentations in an order that cannot work, or of labels that they do not move."""
    node = cfg.INPUT.AUGMENT
    if not node.STEPS:
        return
    student = student_class(cfg)
    if issubclass(student, SemanticSegmentor | PanopticFPN) or cfg.MODEL.KEYPOINT_ON:
        what = "MODEL.KEYPOINT_ON is True" if cfg.MODEL.KEYPOINT_ON else student.__name__
        raise ConfigError(
            f"INPUT.AUGMENT.STEPS is {tuple(node.STEPS)}, which moves boxes and masks, but neither "
            f"keypoints nor semantic labels ({what}); empty it."
        )
    for key in ("STEPS", "LAST_STEPS"):
        for name in node[key]:
            check_choice(f"INPUT.AUGMENT.{key}", name, AUGMENT_STEPS)
        if node[key] and not _is_pipeline(node[key]):
            raise ConfigError(
                f"INPUT.AUGMENT.{key} is {tuple(node[key])}; it must have one of "
                f"{', '.join(SIZED_STEPS)}, mosaic only as the first step, mixup only after that, "
                "and no step twice."
            )


def _is_pipeline(steps: Sequence[str]) -> bool:
    sized = [k for k, name in enumerate(steps) if name in SIZED_STEPS]
    return (
        len(sized) == 1
        and len(set(steps)) == len(steps)
        and "mosaic" not in steps[1:]
        and "mixup" not in steps[: sized[0]]
    )


def _validate_detections(cfg: CfgNode) -> None:
    """Refuse detections of a file that nothing reads, and added boxes that cannot be trained."""
    teacher, key = cfg.MODEL.DISTILL.TEACHER, "MODEL.DISTILL.TEACHER"
    readers = [x for x in cfg.MODEL.DISTILL.HEADS if reads_detections(cfg, x)]
    if teacher.ADD_BOXES and not teacher.DETECTIONS:
        raise ConfigError(
            f"{key}.ADD_BOXES is {teacher.ADD_BOXES}, but {key}.DETECTIONS is empty; name a file, "
            "or set ADD_BOXES to 0."
        )
    if not teacher.DETECTIONS:
        return
    student = student_class(cfg)
    if issubclass(student, SemanticSegmentor):
        raise ConfigError(
            f"{key}.DETECTIONS is '{teacher.DETECTIONS}', but a {student.__name__} has no boxes; "
            "empty it."
        )
    if not teacher.ADD_BOXES and not readers:
        raise ConfigError(
            f"{key}.DETECTIONS is '{teacher.DETECTIONS}', which nothing reads; set {key}.ADD_BOXES "
            "above 0, or INSTANCES teacher for a head that has it."
        )
    for part in ("MASK_ON", "KEYPOINT_ON"):
        if teacher.ADD_BOXES and cfg.MODEL[part]:
            raise ConfigError(
                f"{key}.ADD_BOXES is {teacher.ADD_BOXES}, which adds boxes only, but MODEL.{part} "
                "is True; set one of them to 0 or False."
            )


def reads_detections(cfg: CfgNode, head: str) -> bool:
    """Return whether a head takes the teacher's detections in place of the ground truth."""
    return bool(cfg.MODEL.DISTILL[head.upper()].get("INSTANCES") == "teacher")


def _validate_report(cfg: CfgNode) -> None:
    """Refuse a baseline of the report that is no run, or the run itself."""
    baseline = cfg.REPORT.BASELINE
    if not baseline:
        return
    if os.path.realpath(baseline) == os.path.realpath(cfg.OUTPUT_DIR):
        raise ConfigError(
            f"REPORT.BASELINE '{baseline}' is OUTPUT_DIR itself; name another training, or empty "
            "it."
        )
    if not os.path.isfile(os.path.join(baseline, "metrics.json")):
        raise ConfigError(
            f"REPORT.BASELINE is '{baseline}', which has no metrics.json; name the OUTPUT_DIR of a "
            "training, or empty it."
        )


def _validate_drawing(cfg: CfgNode) -> None:
    """Refuse to draw training images of a student whose class in detectron2 draws no images."""
    if cfg.VIS_PERIOD and issubclass(student_class(cfg), DenseDetector | SemanticSegmentor):
        raise ConfigError(
            f"VIS_PERIOD is {cfg.VIS_PERIOD}, but only GeneralizedRCNN and PanopticFPN draw their "
            "training images; set it to 0."
        )


def _validate_test_modes(cfg: CfgNode) -> None:
    """Refuse an evaluation that the student's architecture does not have."""
    student = student_class(cfg)
    if cfg.TEST.SLIDING_WINDOW.ENABLED and not issubclass(student, SemanticSegmentor):
        raise ConfigError(
            "TEST.SLIDING_WINDOW.ENABLED is True, which is only for SemanticSegmentor; set it "
            "to False."
        )
    if not cfg.TEST.AUG.ENABLED:
        return
    if not issubclass(student, GeneralizedRCNN) or issubclass(student, PanopticFPN):
        raise ConfigError(
            "TEST.AUG.ENABLED is True, but detectron2 has test-time augmentation only for "
            "GeneralizedRCNN; set it to False."
        )
    if cfg.MODEL.KEYPOINT_ON:
        raise ConfigError(
            "TEST.AUG.ENABLED is True, but detectron2's test-time augmentation has no keypoints; "
            "set it or MODEL.KEYPOINT_ON to False."
        )


def check_values(cfg: CfgNode) -> None:
    """Check the values of a config, each by itself and some together.

    Raises:
        ConfigError: names the key, its value and the valid values.
    """
    declared = declared_keys()
    for name, value in leaves(cfg):
        if name in declared:
            declared[name].check(name, value)
        else:
            check_rules(name, value)
    check_together(cfg)


def _validate_teacher(teacher: CfgNode) -> None:
    try:
        check_values(teacher)
    except ConfigError as e:
        raise ConfigError(f"The teacher's config: {e}") from e


def _validate_distill(cfg: CfgNode) -> None:
    _validate_architectures(cfg)
    node = cfg.MODEL.DISTILL
    if len(set(node.HEADS)) < len(node.HEADS):
        raise ConfigError(f"MODEL.DISTILL.HEADS {tuple(node.HEADS)} names a head twice.")
    for name in node.HEADS:
        check_choice("MODEL.DISTILL.HEADS", name, [n for n, _ in DISTILL_HEAD_REGISTRY])
        if name.upper() not in node:
            raise ConfigError(
                f"MODEL.DISTILL.HEADS: {name} has no config section; import the module that "
                "registers it before get_distill_cfg()."
            )
        DISTILL_HEAD_REGISTRY.get(name).check_config(cfg)
    for part in node.INHERIT:
        check_choice("MODEL.DISTILL.INHERIT", part, INHERITED_PARTS)
    if node.INHERIT and not teacher_needed(cfg):
        raise ConfigError(
            f"MODEL.DISTILL.INHERIT is {tuple(node.INHERIT)}, but no head of MODEL.DISTILL.HEADS "
            "has a teacher; name one that has, or empty it."
        )


def _validate_architectures(cfg: CfgNode) -> None:
    """Refuse a student that cannot be distilled, or two keys that name different students."""
    name, student = cfg.MODEL.META_ARCHITECTURE, student_architecture(cfg)
    named, distilling = cfg.MODEL.DISTILL.STUDENT_ARCHITECTURE, distill_architectures()
    if named not in ("", student):
        raise ConfigError(
            f"MODEL.DISTILL.STUDENT_ARCHITECTURE is {named}, but MODEL.META_ARCHITECTURE {name} is "
            "a student itself; leave STUDENT_ARCHITECTURE empty, or change one of them."
        )
    plain = [n for n, _ in META_ARCH_REGISTRY if n not in distilling]
    check_choice("MODEL.DISTILL.STUDENT_ARCHITECTURE", student, plain)
    network = META_ARCH_REGISTRY.get(student)
    if not isinstance(network, type):
        return  # the class is known only after this function has built a network
    if name in distilling:
        META_ARCH_REGISTRY.get(name).check_student(network)
    elif not issubclass(network, tuple(family.architecture for family in FAMILIES)):
        families = ", ".join(family.architecture.__name__ for family in FAMILIES)
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE {name} cannot be distilled; MODEL.DISTILL.HEADS needs one of "
            f"{families} or a subclass."
        )

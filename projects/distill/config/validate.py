"""The checks that run before any weight is loaded."""

import warnings

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    PanopticFPN,
    SemanticSegmentor,
)

from ..errors import ConfigError
from ..heads import DISTILL_HEAD_REGISTRY, teacher_needed
from ..modeling.init_from_teacher import INHERITED_PARTS
from .detectron2_rules import check_choice, check_values

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # its use of pkg_resources is not our user's
from .resolve import distill_architectures, is_student, teacher_config


def validate_config(cfg: CfgNode, *, training: bool = True) -> None:
    """Check every value that this package reads; runs before any weight is loaded.

    Args:
        cfg: the whole config.
        training: check the training sets and the teacher's config too; evaluation needs neither.

    Raises:
        ConfigError: names the key, its value and the valid choices, nearest first.
    """
    check_values(cfg)
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError(
            "MODEL.LOAD_PROPOSALS is True; detectron2 reads proposals from pickles, which can run "
            "any code: set it False."
        )
    architectures = [name for name, _ in META_ARCH_REGISTRY]
    check_choice("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, architectures)
    for key in ("TRAIN", "TEST") if training else ("TEST",):
        for name in cfg.DATASETS[key]:
            check_choice(f"DATASETS.{key}", name, DatasetCatalog.list())
    if training and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty; name at least one data set.")
    for name in cfg.DATASETS.TRAIN if training and cfg.MODEL.KEYPOINT_ON else ():
        if not MetadataCatalog.get(name).get("keypoint_names"):
            raise ConfigError(
                f"MODEL.KEYPOINT_ON is True, but DATASETS.TRAIN '{name}' has no keypoints; set it "
                "False."
            )
    if cfg.MODEL.META_ARCHITECTURE in distill_architectures():
        _validate_distill(cfg)
        if training and teacher_needed(cfg):
            _validate_teacher(teacher_config(cfg))
    _validate_test_modes(cfg)


def _validate_test_modes(cfg: CfgNode) -> None:
    """Refuse an evaluation that the student's architecture does not have."""
    if cfg.TEST.SLIDING_WINDOW.ENABLED and not is_student(cfg, SemanticSegmentor):
        raise ConfigError(
            "TEST.SLIDING_WINDOW.ENABLED is True, which is only for SemanticSegmentor; set it "
            "False."
        )
    if not cfg.TEST.AUG.ENABLED:
        return
    if not is_student(cfg, GeneralizedRCNN) or is_student(cfg, PanopticFPN):
        raise ConfigError(
            "TEST.AUG.ENABLED is True, but detectron2 has test-time augmentation only for "
            "GeneralizedRCNN; set it False."
        )
    if cfg.MODEL.KEYPOINT_ON:
        raise ConfigError(
            "TEST.AUG.ENABLED is True, but detectron2's test-time augmentation has no keypoints; "
            "set it or MODEL.KEYPOINT_ON False."
        )


def _validate_teacher(teacher: CfgNode) -> None:
    try:
        check_values(teacher)
    except ConfigError as e:
        raise ConfigError(f"The teacher's config: {e}") from e


def _validate_distill(cfg: CfgNode) -> None:
    node = cfg.MODEL.DISTILL
    plain = [n for n, _ in META_ARCH_REGISTRY if n not in distill_architectures()]
    check_choice("MODEL.DISTILL.STUDENT_ARCHITECTURE", node.STUDENT_ARCHITECTURE, plain)
    student = META_ARCH_REGISTRY.get(node.STUDENT_ARCHITECTURE)
    if isinstance(student, type):  # of a function that builds one, the network itself will tell
        META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE).check_student(student)
    if len(set(node.HEADS)) < len(node.HEADS):
        raise ConfigError(f"MODEL.DISTILL.HEADS {tuple(node.HEADS)} names a head twice.")
    for name in node.HEADS:
        check_choice("MODEL.DISTILL.HEADS", name, [n for n, _ in DISTILL_HEAD_REGISTRY])
        if name.upper() not in node:
            raise ConfigError(
                f"MODEL.DISTILL.HEADS: {name} has no config section; call "
                f"add_head_section('{name}') where it is registered."
            )
        _validate_terms(name.upper(), node[name.upper()])
    for part in node.INHERIT:
        check_choice("MODEL.DISTILL.INHERIT", part, INHERITED_PARTS)
    if node.INHERIT and not teacher_needed(cfg):
        raise ConfigError(
            f"MODEL.DISTILL.INHERIT is {tuple(node.INHERIT)}, but no head of MODEL.DISTILL.HEADS "
            "has a teacher; name one that has, or empty it."
        )
    if "IMA" in node.HEADS and node.IMA.SCOPE == "mask" and not cfg.MODEL.MASK_ON:
        raise ConfigError(
            "MODEL.DISTILL.IMA.SCOPE is mask, which needs ground-truth masks; "
            "set MODEL.MASK_ON True or SCOPE box."
        )


# Factors of the terms of a loss: without any, adapters would get no gradient.
_TERMS = {
    "CROSSKD": ("CLASS_WEIGHT", "BOX_WEIGHT"),
    "DEFEAT": ("FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT"),
    "DKD": ("ALPHA", "BETA"),
    "FGD": ("ALPHA", "BETA", "GAMMA", "LAMBDA"),
    "FKD": ("ATTENTION_WEIGHT", "POOLED_WEIGHT", "RELATION_WEIGHT"),
    "FRS": ("FEATURE_WEIGHT", "CLASS_WEIGHT"),
    "GID": ("FEATURE_WEIGHT", "RELATION_WEIGHT", "CLASS_WEIGHT", "BOX_WEIGHT"),
    "LD": ("BOX_WEIGHT", "REGION_WEIGHT", "CLASS_WEIGHT"),
    "MKD": ("FEA_WEIGHT", "MULTISCALE_WEIGHT", "FDMD_WEIGHT", "FAD_WEIGHT"),
    "MSSD": ("DISTILL_WEIGHT", "MASK_WEIGHT"),
    "TID": ("ALPHA_HIGH", "ALPHA_MED", "ALPHA_LOW"),
}


def _validate_terms(head: str, section: CfgNode) -> None:
    terms = _TERMS.get(head, ())
    if terms and not any(section[key] for key in terms):
        raise ConfigError(
            f"MODEL.DISTILL.{head}: {', '.join(terms)} are all 0; set one of them above 0, or "
            "WEIGHT 0.0 to switch the head off."
        )

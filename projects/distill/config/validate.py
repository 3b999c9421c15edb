"""The checks that run before any weight is loaded."""

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY

from ..errors import ConfigError
from ..families import FAMILIES
from ..heads import DISTILL_HEAD_REGISTRY, teacher_needed
from .architecture import distill_architectures, student_architecture
from .detectron2_rules import check_choice, check_values
from .resolve import teacher_config

INHERITED_PARTS = ("neck", "head")


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
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError(
            "MODEL.LOAD_PROPOSALS is True; detectron2 reads proposals from pickles, which can run "
            "any code: set it to False."
        )
    architectures = [name for name, _ in META_ARCH_REGISTRY]
    check_choice("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, architectures)
    _validate_data(cfg, training)
    if cfg.MODEL.DISTILL.HEADS or cfg.MODEL.META_ARCHITECTURE in distill_architectures():
        _validate_distill(cfg)
        if training and teacher_needed(cfg):
            _validate_teacher(teacher_config(cfg))


def _validate_data(cfg: CfgNode, training: bool) -> None:
    for key in ("TRAIN", "TEST") if training else ("TEST",):
        for name in cfg.DATASETS[key]:
            check_choice(f"DATASETS.{key}", name, DatasetCatalog.list())
    if training and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty; name at least one data set.")
    for name in cfg.DATASETS.TRAIN if training and cfg.MODEL.KEYPOINT_ON else ():
        if not MetadataCatalog.get(name).get("keypoint_names"):
            raise ConfigError(
                f"MODEL.KEYPOINT_ON is True, but DATASETS.TRAIN '{name}' has no keypoints; set it "
                "to False."
            )


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

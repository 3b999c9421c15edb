"""Several teachers: ``MODEL.DISTILL.TEACHERS`` as one config per teacher."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from ..errors import ConfigError
from ..heads import DISTILL_HEAD_REGISTRY
from ..section import check_choice
from .defaults import KEYS, TEACHERS_KEYS
from .detectron2_rules import leaves
from .load import merge_section

TEACHER, TEACHERS = "MODEL.DISTILL.TEACHER", "MODEL.DISTILL.TEACHERS"
OF_NETWORK = ("CONFIG_FILE", "OPTS", "WEIGHTS", "CLASSES")  # keys without a value for all teachers
OF_DATA = ("DETECTIONS", "ADD_BOXES")  # keys without a value for a single teacher


class OneTeacher(NamedTuple):
    """Part of a distillation: the heads of one teacher, or those that need no teacher.

    Attributes:
        name: name of the teacher; "" for the only teacher, or for no teacher.
        cfg: whole config, whose ``TEACHER`` is this teacher and whose ``HEADS`` are its heads.
        factor: factor of the losses of these heads.
        chosen: True if a head that does not work is an error; otherwise it is left out.
    """

    name: str
    cfg: CfgNode
    factor: float = 1.0
    chosen: bool = True


def one_per_teacher(cfg: CfgNode) -> list[OneTeacher]:
    """Return the parts of a distillation, each with at most one teacher.

    Without ``MODEL.DISTILL.TEACHERS``, ``cfg`` itself is the only part. With it, there is a part
    for each teacher. A last part has the heads that need no teacher, if there are any.

    Raises:
        ConfigError: a section of ``TEACHERS`` has an unknown key or a value of another type.
    """
    node = cfg.MODEL.DISTILL
    if not node.TEACHERS:
        return [OneTeacher("", cfg)]
    heads = taught_heads(cfg)
    parts = []
    for k, section in enumerate(node.TEACHERS):
        teacher = _merged(cfg, section, f"{TEACHERS}[{k}]")
        name, chosen, factor = (teacher.pop(key) for key in TEACHERS_KEYS)
        part = _part(cfg, teacher, [x for x in chosen or heads if x in heads])
        parts.append(OneTeacher(name, part, factor, bool(chosen)))
    others = [x for x in node.HEADS if x not in heads]
    return [*parts, OneTeacher("", _part(cfg, node.TEACHER, others))] if others else parts


def taught_heads(cfg: CfgNode) -> list[str]:
    """Return the names of the heads in ``MODEL.DISTILL.HEADS`` that need a teacher."""
    return [x for x in cfg.MODEL.DISTILL.HEADS if DISTILL_HEAD_REGISTRY.get(x).needs_teacher]


def _merged(cfg: CfgNode, section: Any, source: str) -> CfgNode:
    """Return all keys of a section of ``TEACHERS``, with the values of ``TEACHER`` as defaults."""
    merged = cfg.MODEL.DISTILL.TEACHER.clone()
    merged.defrost()
    for name, key in TEACHERS_KEYS.items():
        merged[name] = key.initial
    merge_section(merged, section, source)
    return merged


def _part(cfg: CfgNode, teacher: CfgNode, heads: Sequence[str]) -> CfgNode:
    """Return a config with this ``TEACHER`` and these ``HEADS``."""
    part = cfg.clone()
    part.defrost()
    node = part.MODEL.DISTILL
    node.TEACHERS, node.TEACHER, node.HEADS = [], teacher, tuple(heads)
    # All parts share what `teacher_config` has read.
    vars(teacher)["__teachers__"] = vars(cfg.MODEL.DISTILL.TEACHER).setdefault("__teachers__", {})
    if cfg.is_frozen():
        part.freeze()
    return part


def check_teachers(cfg: CfgNode) -> None:
    """Check the sections of ``MODEL.DISTILL.TEACHERS``, before anything is built.

    Raises:
        ConfigError: names the key, its value and the valid values.
    """
    node = cfg.MODEL.DISTILL
    if not node.TEACHERS:
        return
    for key in OF_NETWORK:
        if node.TEACHER[key]:
            raise ConfigError(
                f"{TEACHER}.{key} is {node.TEACHER[key]!r:.80}, but {TEACHERS} names the teachers; "
                "empty one of the two keys."
            )
    if node.INHERIT:
        raise ConfigError(
            f"MODEL.DISTILL.INHERIT is {tuple(node.INHERIT)}, which is not for several teachers; "
            f"empty it, or name one teacher in {TEACHER} instead of {TEACHERS}."
        )
    for k, section in enumerate(node.TEACHERS):
        _check_section(cfg, section, f"{TEACHERS}[{k}]")
    parts = one_per_teacher(cfg)
    names = [x.name for x in parts if x.name]
    if len({x.lower() for x in names}) < len(names):
        raise ConfigError(
            f"{TEACHERS} has the names {', '.join(names)}; each teacher needs its own NAME, also "
            "in small letters."
        )
    named = {head for x in parts for head in x.cfg.MODEL.DISTILL.HEADS}
    for head in node.HEADS:
        if head not in named:
            raise ConfigError(
                f"MODEL.DISTILL.HEADS has {head}, but no HEADS of {TEACHERS} have it; add it to "
                "those of a teacher, or remove it."
            )


def _check_section(cfg: CfgNode, section: Any, source: str) -> None:
    """Check the values of one section of ``TEACHERS``."""
    merged = _merged(cfg, section, source)
    for key in OF_DATA:
        if key in section:
            raise ConfigError(
                f"{source}.{key} is {section[key]!r:.80}, but such detections belong to the "
                f"training images; set {TEACHER}.{key} for all teachers."
            )
    for key, value in leaves(merged):
        declared = TEACHERS_KEYS.get(key) or KEYS[f"{TEACHER}.{key}"]
        declared.check(f"{source}.{key}", value)
    if not merged.NAME:
        raise ConfigError(f"{source}.NAME is empty; give each teacher a name, such as vehicles.")
    heads = taught_heads(cfg)
    for head in merged.HEADS if heads else ():
        check_choice(f"{source}.HEADS", head, heads)

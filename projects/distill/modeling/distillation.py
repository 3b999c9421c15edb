"""The teachers of a config, and the heads that compare a student with them."""

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from ..config import OneTeacher, balance_mode, one_per_teacher, teacher_config
from ..data.datasets import class_names
from ..errors import ConfigError, of_teacher
from ..families import Family
from ..heads import DISTILL_HEAD_REGISTRY, build_heads, teacher_needed, unfinished_phases
from ..heads.classes import ClassMap
from ..structures import NetworkInfo
from .balance import GradientBalance
from .teacher import Teacher, build_teacher

logger = logging.getLogger(__name__)

UNKNOWN = "unknown teacher class"  # begins the names of classes whose names are unknown

Infos = dict[str, tuple[NetworkInfo, NetworkInfo | None]]
"""Descriptions of the student and of a teacher by the teacher's name."""


def build_teachers(cfg: CfgNode, *, trained: bool = True) -> dict[str, Teacher]:
    """Build the teachers that the heads of ``cfg`` need, by name; "" is that of the only one.

    Args:
        trained: see :func:`build_teacher`.

    Raises:
        ConfigError, WeightsError: a network cannot be built, or its weights not loaded.
    """
    teachers = {}
    for one in one_per_teacher(cfg):
        if teacher_needed(one.cfg):
            with of_teacher(one.name):
                teachers[one.name] = build_teacher(one.cfg, trained=trained)
    return teachers


def infos_by_teacher(cfg: CfgNode, student: Family, teachers: Mapping[str, Teacher]) -> Infos:
    """Describe the student and each of its teachers, see :func:`network_infos`.

    The heads that need no teacher have the name "", too.
    """
    infos: Infos = {}
    for one in one_per_teacher(cfg):
        with of_teacher(one.name):
            infos[one.name] = network_infos(one.cfg, student, teachers.get(one.name))
    return infos


def build_all_heads(cfg: CfgNode, infos: Infos) -> nn.ModuleDict:
    """Build the heads of all teachers of ``cfg``, and log what several teachers teach.

    Args:
        infos: see :func:`infos_by_teacher`.

    Raises:
        ConfigError: a head or a teacher would teach nothing; the message says why.
    """
    found = nn.ModuleDict()
    left_out: dict[str, list[str]] = {}
    for one in one_per_teacher(cfg):
        pair = infos[one.name]
        problems = _problems(one, *pair)
        with of_teacher(one.name):
            heads = _heads_of(one, *pair, problems)
        if one.name:
            _log_teacher(one, heads, *pair)
        found.update({head.name: head for head in heads.values()})  # type: ignore[misc]
        for head, problem in problems.items():
            left_out.setdefault(head, []).append(f"{one.name}: {problem}")
    for name, reasons in left_out.items():
        if not any(type(head).__name__ == name for head in found.values()):
            raise ConfigError(
                f"MODEL.DISTILL.HEADS: {name} works with no teacher ({'; '.join(reasons)})."
            )
    _warn_of_untaught_classes(found)
    for sentence in unfinished_phases(cfg):
        logger.warning(sentence)
    return found


def _problems(one: OneTeacher, student: NetworkInfo, teacher: NetworkInfo | None) -> dict[str, str]:
    """Return why heads do not work with a teacher for which the user has not named them."""
    heads = () if one.chosen else one.cfg.MODEL.DISTILL.HEADS
    found = {name: DISTILL_HEAD_REGISTRY.get(name).problem(student, teacher) for name in heads}
    return {name: problem for name, problem in found.items() if problem}


def _heads_of(
    one: OneTeacher,
    student: NetworkInfo,
    teacher: NetworkInfo | None,
    problems: Mapping[str, str],
) -> nn.ModuleDict:
    """Return the heads of one teacher.

    Args:
        problems: why some of its heads are left out, by their names.
    """
    names = [x for x in one.cfg.MODEL.DISTILL.HEADS if x not in problems]
    if problems and not names:
        why = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise ConfigError(f"it teaches nothing, because no head works with it ({why}).")
    heads = build_heads(one.cfg, student, teacher, names)
    head: Any
    for head in heads.values():
        head.taught_by = one.name
        head.weight *= one.factor
    return heads


def _log_teacher(
    one: OneTeacher, heads: nn.ModuleDict, student: NetworkInfo, teacher: NetworkInfo | None
) -> None:
    known = set(teacher.classes) if teacher else set()
    shared = [x for x in student.classes if x in known]
    logger.info(
        "Teacher %s (%s) teaches with %s; it knows these classes of the student: %s.",
        *(one.name, one.cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE, ", ".join(heads)),
        ", ".join(shared) or "none",
    )


def _warn_of_untaught_classes(heads: nn.ModuleDict) -> None:
    """Log the classes that all teachers of a head lack, if several teachers share the work."""
    dropped: dict[str, list[set[str]]] = {}
    for head in heads.values():
        if head.taught_by and isinstance(classes := getattr(head, "classes", None), ClassMap):
            dropped.setdefault(type(head).__name__, []).append(set(classes.dropped))
    untaught = {name: sorted(set.intersection(*x)) for name, x in dropped.items()}
    lacking = [f"{name}: {', '.join(x)}" for name, x in untaught.items() if x]
    if lacking:
        logger.warning(
            "Classes that no teacher of MODEL.DISTILL.TEACHERS knows are taught by their labels "
            "only (%s).",
            "; ".join(lacking),
        )


def build_balance(
    cfg: CfgNode, student: NetworkInfo, heads: nn.ModuleDict
) -> GradientBalance | None:
    """Build the balance of heads of ``cfg``, or None if their weights are fixed."""
    node = cfg.MODEL.DISTILL.BALANCE
    if balance_mode(cfg) == "none":
        return None
    own: dict[str, Any] = dict(heads.items())
    return GradientBalance(
        {name: head.authors_weight(student) for name, head in own.items()},
        {name: head.term_strengths(cfg, student) for name, head in own.items()},
        {name: head.share_of_ratio(student) for name, head in own.items()},
        ratio=node.RATIO,
        fade=node.FADE,
        max_iter=cfg.SOLVER.MAX_ITER,
        cosine_period=cfg.MODEL.DISTILL.COSINE_PERIOD,
    )


def network_infos(
    cfg: CfgNode, student: Family, teacher: Teacher | None
) -> tuple[NetworkInfo, NetworkInfo | None]:
    """Describe student and teacher to the heads: levels, outputs and class names.

    Args:
        teacher: None if no head needs one.
    """
    names = class_names(cfg, _is_semantic(student))
    if names is None or len(names) != student.num_classes:
        names = tuple(f"class {i}" for i in range(student.num_classes))
    own = student.info("student", names, _semantic_classes(cfg, student, names))
    if teacher is None:
        return own, None
    family = teacher.family
    classes = _teacher_classes(cfg, names, family)
    semantic = _semantic_classes(teacher_config(cfg), family, classes, own.sem_seg_classes)
    known = () if any(x.startswith(UNKNOWN) for x in classes) else classes
    return own, teacher.info(classes, semantic, names if teacher.given_detections else known)


def _semantic_classes(
    cfg: CfgNode, family: Family, classes: tuple[str, ...], student: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Return the class names of a semantic head, which is one of two heads in a Panoptic FPN.

    Args:
        cfg: config of the network.
        classes: class names of the network; a network without boxes has only semantic classes.
        student: names for a teacher whose own names are unknown.
    """
    if family.sem_seg_shape is None or _is_semantic(family):
        return classes if _is_semantic(family) else ()
    number = family.model.sem_seg_head.predictor.out_channels
    named = class_names(cfg, semantic=True), student
    unknown = UNKNOWN if student else "class"
    return next(
        (x for x in named if x and len(x) == number),
        tuple(f"{unknown} {i}" for i in range(number)),
    )


def _is_semantic(family: Family) -> bool:
    """Return whether the network predicts semantic classes only, without instances."""
    return "rois" not in family.outputs and "sem_seg" in family.outputs


def _teacher_classes(cfg: CfgNode, student: tuple[str, ...], teacher: Family) -> tuple[str, ...]:
    """Return the teacher's class names: given, its own, of its training set, or the student's."""
    number = teacher.num_classes
    given = tuple(cfg.MODEL.DISTILL.TEACHER.CLASSES)
    if not number and "detections" in teacher.outputs:
        return given  # it does not say how many classes it detects
    if given and len(given) != number:
        raise ConfigError(
            f"MODEL.DISTILL.TEACHER.CLASSES lists {len(given)} names, but the teacher predicts "
            f"{number} classes."
        )
    own = given or teacher.classes or class_names(teacher_config(cfg), _is_semantic(teacher))
    if own and len(own) == number:
        return own
    if number == len(student):
        logger.warning("The teacher's class names are unknown; assuming those of the student.")
        return student
    # Only heads that compare predictions need names, and those heads refuse these.
    return tuple(f"{UNKNOWN} {i}" for i in range(number))

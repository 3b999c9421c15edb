"""The configs that follow from the user's: the student's and the teacher's."""

import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY

from ..errors import ConfigError, DistillError
from ..nets import add_config_read_by

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # its use of pkg_resources is not our user's
    from detectron2 import model_zoo
from .defaults import get_distill_cfg
from .load import find_config, merge_from_file, merge_from_list


def student_config(cfg: CfgNode) -> CfgNode:
    """The plain detectron2 config of the student: what ``student.yaml`` holds.

    It has no key that stock detectron2 does not know, but for networks that read those of
    :func:`distill.nets.add_nets_config`. Weights of a timm backbone are in the checkpoint.
    """
    student = get_cfg()
    add_config_read_by(cfg, student)
    _copy_known(cfg, student)
    if "TIMM" in student.MODEL:
        student.MODEL.TIMM.PRETRAINED, student.MODEL.TIMM.WEIGHTS = False, ""
    if cfg.MODEL.META_ARCHITECTURE in distill_architectures():
        student.MODEL.META_ARCHITECTURE = cfg.MODEL.DISTILL.STUDENT_ARCHITECTURE
    return student


def _copy_known(source: CfgNode, target: CfgNode) -> None:
    for key, value in target.items():
        if isinstance(value, CfgNode) and key in source:
            _copy_known(source[key], value)
        elif key in source:
            target[key] = source[key]


def distill_architectures() -> list[str]:
    """Registered meta-architectures that hold a student."""
    return [name for name, _ in META_ARCH_REGISTRY if name.startswith("Distill")]


def student_class(cfg: CfgNode) -> type:
    """Return the class of the student's meta-architecture; ``object`` if a function builds it."""
    name = student_config(cfg).MODEL.META_ARCHITECTURE
    found = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    return found if isinstance(found, type) else object


def teacher_config(cfg: CfgNode, *, trained: bool = True) -> CfgNode:
    """The teacher's own config, resolved from ``MODEL.DISTILL.TEACHER``.

    Args:
        trained: ``MODEL.WEIGHTS`` of a model-zoo config are those that its training ended with;
            False: those that it starts from.

    Raises:
        ConfigError: no config file is given, or it is neither a file nor in the model zoo.
    """
    node = cfg.MODEL.DISTILL.TEACHER
    if not node.CONFIG_FILE:
        raise ConfigError(
            "MODEL.DISTILL.TEACHER.CONFIG_FILE is empty; name the teacher's yaml, or a model-zoo "
            "config such as COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml."
        )
    teacher = get_distill_cfg()
    # The zoo before this package: of the few names in both, the zoo has trained weights.
    zoo = None if os.path.isfile(node.CONFIG_FILE) else _zoo_file(node.CONFIG_FILE)
    try:
        path = zoo or find_config(node.CONFIG_FILE)
    except ConfigError as e:
        raise ConfigError(
            f"MODEL.DISTILL.TEACHER.CONFIG_FILE is no config of detectron2's model zoo. {e}"
        ) from e
    merge_from_file(teacher, path)
    if trained and zoo and not node.WEIGHTS:
        teacher.MODEL.WEIGHTS = model_zoo.get_checkpoint_url(node.CONFIG_FILE)
    merge_from_list(teacher, list(node.OPTS), "MODEL.DISTILL.TEACHER.OPTS")
    if node.WEIGHTS:
        teacher.MODEL.WEIGHTS = node.WEIGHTS
    return teacher


def _zoo_file(name: str) -> str | None:
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        return None


_UNBUILDABLE = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)


@contextmanager
def building(network: str) -> Iterator[None]:
    """Say in one sentence what detectron2 asserts about a config that it cannot build.

    Raises:
        ConfigError: with the statement that failed, which names the key in most cases.
    """
    try:
        yield
    except DistillError:
        raise
    except _UNBUILDABLE as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        reason = " ".join(str(e.args[0] if e.args else "").split())
        where = f" at {os.path.basename(frame.filename)}:{frame.lineno} `{frame.line}`"
        if (frame.line or "").startswith("raise "):  # then the reason is written for users
            where = ""
        raise ConfigError(
            f"The {network} cannot be built from its config: {type(e).__name__} {reason}{where}"
        ) from e

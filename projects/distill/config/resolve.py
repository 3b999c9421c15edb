"""The student's and the teacher's configs, which follow from the user's."""

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from detectron2.config import CfgNode, get_cfg

from ..errors import ConfigError
from ..heads import DISTILL_HEAD_REGISTRY
from ..nets import add_config_read_by
from ..nets.lazy import CODE, describe_lazy, is_lazy, zoo_path
from ..utils.text import choices
from .architecture import student_architecture
from .load import find_config, load_config, permissions, refuse_permissions

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # it warns of its own use of pkg_resources
    from detectron2 import model_zoo


TIMM = "timm/"
"""Begins the name of a timm model that is a teacher of features."""


def balance_mode(cfg: CfgNode) -> str:
    """Return ``MODEL.DISTILL.BALANCE.MODE``, none or gradient, with what auto stands for."""
    heads = [DISTILL_HEAD_REGISTRY.get(name) for name in cfg.MODEL.DISTILL.HEADS]
    mode: str = cfg.MODEL.DISTILL.BALANCE.MODE
    if not heads:
        return "none"
    if mode == "auto":
        key = "WEIGHT"
        unset = [head.config_node(cfg)[key] == head.section[key].initial for head in heads]
        return "gradient" if all(unset) else "none"
    return mode


def student_config(cfg: CfgNode) -> CfgNode:
    """Return the student's plain detectron2 config, as ``student.yaml`` holds it.

    Stock detectron2 knows all of its keys, except those of :func:`distill.nets.add_nets_config`
    that the network reads. The weights of a timm backbone are in the checkpoint.
    """
    student = get_cfg()
    add_config_read_by(cfg, student)
    _copy_known(cfg, student)
    if "TIMM" in student.MODEL:
        student.MODEL.TIMM.PRETRAINED, student.MODEL.TIMM.WEIGHTS = False, ""
    if not {"LAZY", "MODULE"}.isdisjoint(student.MODEL):
        student.MODEL.ALLOW_CODE = cfg.MODEL.ALLOW_CODE
    student.MODEL.META_ARCHITECTURE = student_architecture(cfg)
    return student


def _copy_known(source: CfgNode, target: CfgNode) -> None:
    for key, value in target.items():
        if isinstance(value, CfgNode) and key in source:
            _copy_known(source[key], value)
        elif key in source:
            target[key] = source[key]


def teacher_config(cfg: CfgNode, *, trained: bool = True) -> CfgNode:
    """Return the teacher's own config, frozen, which ``MODEL.DISTILL.TEACHER`` describes.

    Its files are read once: ``cfg`` and copies of it keep the result until they describe another
    teacher.

    Args:
        trained: ``MODEL.WEIGHTS`` of a model-zoo config are the zoo's trained weights; if False,
            the weights from which their training started.

    Raises:
        ConfigError: no config file is given, or it is neither a file nor in the model zoo; or it
            cannot be read.
    """
    node = cfg.MODEL.DISTILL.TEACHER
    # Among the marks of yacs, such as "frozen": they are copied with the node and never dumped.
    known: dict[str, CfgNode] = vars(node).setdefault("__teachers__", {})
    allowed = permissions(cfg)
    described = repr((node.CONFIG_FILE, list(node.OPTS), node.WEIGHTS, trained, allowed))
    if described not in known:
        known[described] = _read_teacher(node, trained, allowed)
    return known[described]


def _read_teacher(node: CfgNode, trained: bool, allowed: Sequence[str]) -> CfgNode:
    if not node.CONFIG_FILE:
        raise ConfigError(
            "MODEL.DISTILL.TEACHER.CONFIG_FILE is empty; name the teacher's yaml, a model-zoo "
            "config such as COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml, or a model of timm such "
            "as timm/vit_small_patch14_dinov2.lvd142m."
        )
    if node.CONFIG_FILE.startswith(TIMM):
        return _timm_teacher(node, trained, allowed)
    if ".py:" in node.CONFIG_FILE:
        return _module_teacher(node, trained, allowed)
    if is_lazy(node.CONFIG_FILE):
        return _lazy_teacher(node, trained, allowed)
    # The zoo before this package: of the few names in both, the zoo has trained weights.
    zoo = None if os.path.isfile(node.CONFIG_FILE) else _zoo_file(node.CONFIG_FILE)
    try:
        path = zoo or find_config(node.CONFIG_FILE)
    except ConfigError as e:
        raise ConfigError(
            f"MODEL.DISTILL.TEACHER.CONFIG_FILE is no config of detectron2's model zoo. {e}"
        ) from e
    opts = list(node.OPTS)
    if trained and zoo and not node.WEIGHTS:
        opts = ["MODEL.WEIGHTS", model_zoo.get_checkpoint_url(node.CONFIG_FILE), *opts]
    teacher = load_config(path, opts, "MODEL.DISTILL.TEACHER.OPTS", allowed)
    refuse_permissions(teacher, "MODEL.DISTILL.TEACHER.OPTS", allowed)
    if node.WEIGHTS:
        teacher.MODEL.WEIGHTS = node.WEIGHTS
    teacher.freeze()
    return teacher


def _lazy_teacher(node: CfgNode, trained: bool, allowed: Sequence[str]) -> CfgNode:
    """Return the config of a LazyConfig's network; one of the model zoo is found by its name."""
    zoo = zoo_path(node.CONFIG_FILE)
    teacher = load_config("", [CODE, CODE in allowed])
    try:
        describe_lazy(teacher, zoo or node.CONFIG_FILE, list(node.OPTS))
    except ValueError as e:
        raise ConfigError(f"MODEL.DISTILL.TEACHER.CONFIG_FILE: {e}.") from e
    if node.WEIGHTS:
        teacher.MODEL.WEIGHTS = node.WEIGHTS
    elif trained and zoo:
        teacher.MODEL.WEIGHTS = ""  # not those with which its own training started
        with suppress(RuntimeError):  # the zoo has not trained it
            teacher.MODEL.WEIGHTS = model_zoo.get_checkpoint_url(node.CONFIG_FILE)
    teacher.freeze()
    return teacher


def _module_teacher(node: CfgNode, trained: bool, allowed: Sequence[str]) -> CfgNode:
    """Return the config of a network of the user's own code, which sees RGB in [0, 255]."""
    own = {
        "MODEL.META_ARCHITECTURE": "FeatureExtractor",
        "MODEL.BACKBONE.NAME": "build_module_backbone",
        "MODEL.MODULE.FUNCTION": node.CONFIG_FILE,
        "MODEL.MODULE.WEIGHTS": node.WEIGHTS if trained else "",
        "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "INPUT.FORMAT": "RGB",
    }
    return _feature_extractor(own, node, allowed)


def _feature_extractor(own: Mapping[str, Any], node: CfgNode, allowed: Sequence[str]) -> CfgNode:
    """Return a config with these values and the overrides of the user."""
    opts = [CODE, CODE in allowed, *(x for pair in own.items() for x in pair), *node.OPTS]
    teacher = load_config("", opts, "MODEL.DISTILL.TEACHER.OPTS", allowed)
    refuse_permissions(teacher, "MODEL.DISTILL.TEACHER.OPTS", allowed)
    teacher.freeze()
    return teacher


def _timm_teacher(node: CfgNode, trained: bool, allowed: Sequence[str]) -> CfgNode:
    """Return the config of a timm model that gives its features, with its own mean and std."""
    import timm

    name = node.CONFIG_FILE.removeprefix(TIMM)
    if not timm.is_model(name):
        near = choices(name, timm.list_models(pretrained=True))
        raise ConfigError(
            f"MODEL.DISTILL.TEACHER.CONFIG_FILE {node.CONFIG_FILE}: timm has no such model; "
            f"nearest: {near}."
        )
    known: Any = timm.get_pretrained_cfg(name)
    own = {
        "MODEL.META_ARCHITECTURE": "FeatureExtractor",
        "MODEL.BACKBONE.NAME": "build_timm_features",
        "MODEL.TIMM.NAME": name,
        "MODEL.TIMM.WEIGHTS": node.WEIGHTS if trained else "",
        "MODEL.TIMM.PRETRAINED": trained and not node.WEIGHTS,
        "MODEL.PIXEL_MEAN": [255 * x for x in known.mean],
        "MODEL.PIXEL_STD": [255 * x for x in known.std],
        "INPUT.FORMAT": "RGB",
    }
    return _feature_extractor(own, node, allowed)


def _zoo_file(name: str) -> str | None:
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        return None

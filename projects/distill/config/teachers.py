"""Kinds of teachers: how ``MODEL.DISTILL.TEACHER`` becomes the config of a network."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from ..errors import ConfigError
from ..nets.lazy import CODE, describe_lazy, is_lazy, zoo_path
from ..nets.onnx import describe_onnx
from ..utils.text import choices
from .load import find_config, load_config, refuse_permissions

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # it warns of its own use of pkg_resources
    from detectron2 import model_zoo


TIMM = "timm/"
"""Begins the name of a timm model that is a teacher of features."""

FILE = "MODEL.DISTILL.TEACHER.CONFIG_FILE"


class Kind(NamedTuple):
    """A kind of teachers.

    Attributes:
        fits: returns whether a value of ``CONFIG_FILE`` is of this kind.
        read: returns the config of such a teacher, from the arguments of :func:`read_teacher`.
    """

    fits: Callable[[str], bool]
    read: Callable[[CfgNode, bool, Sequence[str]], CfgNode]


def read_teacher(node: CfgNode, trained: bool, allowed: Sequence[str]) -> CfgNode:
    """Return the config of a teacher, frozen. The first of :data:`KINDS` that fits reads it.

    Args:
        node: ``MODEL.DISTILL.TEACHER``.
        trained: the weights are those of a trained teacher; if False, those before its training.
        allowed: keys named ``ALLOW_...`` that the user has set.

    Raises:
        ConfigError: there is no such teacher, or it cannot be read.
    """
    if not node.CONFIG_FILE:
        raise ConfigError(
            f"{FILE} is empty; name the teacher's yaml, a model-zoo config such as "
            "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml, a model of timm such as "
            "timm/vit_small_patch14_dinov2.lvd142m, or an ONNX file."
        )
    kind = next(x for x in KINDS if x.fits(node.CONFIG_FILE))
    teacher = kind.read(node, trained, allowed)
    teacher.freeze()
    return teacher


def _yaml_teacher(node: CfgNode, trained: bool, allowed: Sequence[str]) -> CfgNode:
    """Return the config of a yaml file, which may be one of detectron2's model zoo."""
    # The zoo before this package: of the few names in both, the zoo has trained weights.
    zoo = None if os.path.isfile(node.CONFIG_FILE) else _zoo_file(node.CONFIG_FILE)
    try:
        path = zoo or find_config(node.CONFIG_FILE)
    except ConfigError as e:
        raise ConfigError(f"{FILE} is no config of detectron2's model zoo. {e}") from e
    opts = list(node.OPTS)
    if trained and zoo and not node.WEIGHTS:
        opts = ["MODEL.WEIGHTS", model_zoo.get_checkpoint_url(node.CONFIG_FILE), *opts]
    teacher = load_config(path, opts, "MODEL.DISTILL.TEACHER.OPTS", allowed)
    refuse_permissions(teacher, "MODEL.DISTILL.TEACHER.OPTS", allowed)
    if node.WEIGHTS:
        teacher.MODEL.WEIGHTS = node.WEIGHTS
    return teacher


def _lazy_teacher(node: CfgNode, trained: bool, allowed: Sequence[str]) -> CfgNode:
    """Return the config of a LazyConfig's network; one of the model zoo is found by its name."""
    zoo = zoo_path(node.CONFIG_FILE)
    teacher = load_config("", [CODE, CODE in allowed])
    try:
        describe_lazy(teacher, zoo or node.CONFIG_FILE, list(node.OPTS))
    except ValueError as e:
        raise ConfigError(f"{FILE}: {e}.") from e
    if node.WEIGHTS:
        teacher.MODEL.WEIGHTS = node.WEIGHTS
    elif trained and zoo:
        teacher.MODEL.WEIGHTS = ""  # not those with which its own training started
        with suppress(RuntimeError):  # the zoo has not trained it
            teacher.MODEL.WEIGHTS = model_zoo.get_checkpoint_url(node.CONFIG_FILE)
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


def _onnx_teacher(node: CfgNode, trained: bool, allowed: Sequence[str]) -> CfgNode:
    """Return the config of an ONNX file, whose weights are in it or in the files that it names."""
    if node.WEIGHTS:
        raise ConfigError(
            f"MODEL.DISTILL.TEACHER.WEIGHTS is '{node.WEIGHTS}', but the weights of an ONNX file "
            "are its own; empty it."
        )
    try:
        described = describe_onnx(node.CONFIG_FILE)
    except ValueError as e:
        raise ConfigError(f"{FILE}: {e}.") from e
    own = {
        "MODEL.META_ARCHITECTURE": "FeatureExtractor",
        "MODEL.BACKBONE.NAME": "build_onnx_backbone",
        **described,
    }
    return _feature_extractor(own, node, allowed)


def _feature_extractor(own: Mapping[str, Any], node: CfgNode, allowed: Sequence[str]) -> CfgNode:
    """Return a config with these values and the overrides of the user."""
    opts = [CODE, CODE in allowed, *(x for pair in own.items() for x in pair), *node.OPTS]
    teacher = load_config("", opts, "MODEL.DISTILL.TEACHER.OPTS", allowed)
    refuse_permissions(teacher, "MODEL.DISTILL.TEACHER.OPTS", allowed)
    return teacher


def _timm_teacher(node: CfgNode, trained: bool, allowed: Sequence[str]) -> CfgNode:
    """Return the config of a timm model that gives its features, with its own mean and std."""
    import timm

    name = node.CONFIG_FILE.removeprefix(TIMM)
    if not timm.is_model(name):
        near = choices(name, timm.list_models(pretrained=True))
        raise ConfigError(f"{FILE} {node.CONFIG_FILE}: timm has no such model; nearest: {near}.")
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


KINDS = (
    Kind(lambda name: name.startswith(TIMM), _timm_teacher),
    Kind(lambda name: name.endswith(".onnx"), _onnx_teacher),
    Kind(lambda name: ".py:" in name, _module_teacher),
    Kind(is_lazy, _lazy_teacher),
    Kind(lambda name: True, _yaml_teacher),
)
"""The kinds of teachers, of which the first that fits is used."""

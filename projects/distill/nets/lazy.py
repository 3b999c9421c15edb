"""Networks of detectron2's LazyConfigs: Python files that describe a network by the calls that
build it.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import detectron2
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..utils.text import clause

CODE = "MODEL.ALLOW_CODE"
ZOO = Path(detectron2.__file__).resolve().parent / "model_zoo" / "configs"
CALL = "_target_"
"""Key of the function that a node of a LazyConfig calls."""


@META_ARCH_REGISTRY.register()
def LazyNetwork(cfg: CfgNode) -> Any:
    """Build the ``model`` of the LazyConfig ``MODEL.LAZY.FILE``.

    Raises:
        ValueError: the file may not be read, or its network not be built.
    """
    node = cfg.MODEL.LAZY
    lazy = load_lazy(node.FILE, node.OPTS, allow_code=cfg.MODEL.get("ALLOW_CODE", False))
    try:
        return instantiate(lazy.model)
    except ModuleNotFoundError as e:
        raise ValueError(
            f"LazyConfig '{node.FILE}' needs the package {e.name}, which is not installed"
        ) from e


def is_lazy(name: str) -> bool:
    """Return whether a file is a LazyConfig: a Python file, or a yaml that one was saved to."""
    if name.endswith(".py"):
        return True
    return os.path.isfile(name) and any(
        line.startswith(("model:", "dataloader:"))
        for line in Path(name).read_text(errors="replace").splitlines()
    )


def zoo_path(name: str) -> str:
    """Return the path of a file in detectron2's model zoo, or "".

    No path that leads out of the zoo is returned.
    """
    path = (ZOO / name).resolve()
    return str(path) if path.is_file() and path.is_relative_to(ZOO) else ""


def load_lazy(path: str, overrides: Sequence[Any], *, allow_code: bool) -> DictConfig:
    """Return the content of a LazyConfig with overrides.

    Such a file is code. Those of detectron2's model zoo are read, others only if the user allows
    it.

    Args:
        path: path of the file.
        overrides: KEY VALUE pairs, such as ``model.num_classes 8``.
        allow_code: value of ``MODEL.ALLOW_CODE``.

    Raises:
        ValueError: it may not be read, cannot be read, or has no key of an override.
    """
    if not allow_code:
        _refuse_code(path, overrides)
    if not os.path.isfile(path):
        raise ValueError(f"There is no LazyConfig '{path}'")
    try:
        config = LazyConfig.load(path)
    except Exception as e:  # it is code, which may raise anything
        reason = f"{type(e).__name__} {clause(e)}"
        raise ValueError(f"LazyConfig '{path}' cannot be read: {reason}") from e
    if "model" not in config:
        raise ValueError(f"LazyConfig '{path}' has no `model`")
    for key, value in zip(overrides[0::2], overrides[1::2]):
        _override(config, str(key), value, path)
    return config


def _refuse_code(path: str, overrides: Sequence[Any]) -> None:
    remedy = f"add '{CODE} True' to the command if you trust it"
    if not (path.endswith(".py") and Path(path).resolve().is_relative_to(ZOO)):
        raise ValueError(
            f"The LazyConfig '{path}' runs code when it is read, and it is not one of detectron2's "
            f"model zoo; {remedy}"
        )
    if CALL in repr(list(overrides)):
        raise ValueError(
            f"An override of the LazyConfig '{path}' sets `{CALL}`, which calls any function; "
            f"{remedy}"
        )


def _override(config: DictConfig, key: str, value: Any, path: str) -> None:
    try:
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        known = isinstance(node, DictConfig) and name in node
        if known:
            OmegaConf.update(config, key, value)
    except (OmegaConfBaseException, ValueError) as e:
        raise ValueError(f"{key} of LazyConfig '{path}' cannot be set: {clause(e)}") from e
    if not known:
        raise ValueError(f"LazyConfig '{path}' has no key '{key}'")


def describe_lazy(cfg: CfgNode, path: str, overrides: Sequence[Any]) -> None:
    """Let ``cfg`` describe the network of a LazyConfig, its weights, its images and its classes.

    Raises:
        ValueError: as :func:`load_lazy`.
    """
    lazy = load_lazy(path, overrides, allow_code=cfg.MODEL.ALLOW_CODE)
    cfg.MODEL.META_ARCHITECTURE = "LazyNetwork"
    cfg.MODEL.LAZY.FILE, cfg.MODEL.LAZY.OPTS = path, list(overrides)
    cfg.MODEL.WEIGHTS = OmegaConf.select(lazy, "train.init_checkpoint") or ""
    for key in ("dataloader.train.mapper.image_format", "model.input_format"):
        cfg.INPUT.FORMAT = OmegaConf.select(lazy, key) or cfg.INPUT.FORMAT
    names = OmegaConf.select(lazy, "dataloader.train.dataset.names") or ()
    cfg.DATASETS.TRAIN = (names,) if isinstance(names, str) else tuple(names)

"""Config files and overrides, read safely."""

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from fvcore.common.config import CfgNode as FvcoreCfgNode
from yaml import YAMLError

from ..errors import ConfigError
from ..utils.old_names import rename_heads, renamed_option
from ..utils.text import nearest
from .detectron2_rules import leaves

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # its use of pkg_resources is not our user's


class _SafeCfgNode(FvcoreCfgNode):
    """Loads ``_BASE_`` chains with the safe yaml loader only.

    detectron2's own RetinaNet and FCOS files compute their anchor sizes with an ``eval`` tag; that
    one expression is replaced by its value, every other tag is refused.
    """

    _EVAL = (
        '!!python/object/apply:eval ["[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] '
        'for x in [32, 64, 128, 256, 512 ]]"]'
    )
    _VALUE = str([[x * 2 ** (k / 3) for k in range(3)] for x in (32.0, 64.0, 128.0, 256.0, 512.0)])

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        if "://" in filename:  # what a _BASE_ names would be fetched and stored
            raise OSError(f"_BASE_ '{filename}' is no file; download it and name the copy")
        with PathManager.open(filename, "r") as f:
            text = io.StringIO(f.read().replace(cls._EVAL, cls._VALUE))
        text.name = filename  # yaml's messages show it
        return text

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Load a file with today's names; those of a file go before those of its ``_BASE_``."""
        loaded: dict[str, Any] = super().load_yaml_with_base(filename, allow_unsafe=False)
        model = loaded.get("MODEL")
        section = model.get("DISTILL") if isinstance(model, dict) else None
        if isinstance(section, dict):
            rename_heads(section, f"Config file '{filename}'")
        return loaded


def find_config(name: str) -> str:
    """Return the path of a config file.

    Args:
        name: a file, or a config of this package such as ``COCO-Detection/gfl_R_50_FPN_1x.yaml``,
            with or without ``configs/`` before it. A file comes first.

    Raises:
        ConfigError: there is no such config; the message has the nearest names.
    """
    if PathManager.isfile(name):
        return name
    configs = Path(__file__).resolve().parents[1] / "configs"
    if not configs.is_dir():  # not installed: they are at the top of the checkout
        configs = configs.parents[2] / "configs"
    packaged = {x.relative_to(configs).as_posix(): str(x) for x in configs.rglob("*.yaml")}
    short = name.removeprefix("configs/")
    if short not in packaged:
        raise ConfigError(
            f"Config file '{name}' does not exist (seen from {os.getcwd()}), nor does this package "
            f"have a config of that name; it has: {nearest(short, packaged, most=4)}."
        )
    return packaged[short]


def merge_from_file(cfg: CfgNode, filename: str) -> None:
    """Merge a yaml file and its ``_BASE_`` chain into ``cfg``.

    Raises:
        ConfigError: the file is missing, no valid or safe yaml, or has an unknown key.
    """
    filename = find_config(filename)
    try:
        _merge(cfg, _read_yaml(filename), filename)
    except RecursionError as e:
        raise ConfigError(
            f"The _BASE_ of config file '{filename}' leads back to itself, or its values hold "
            "themselves."
        ) from e


def _read_yaml(filename: str) -> CfgNode:
    try:
        return CfgNode(_SafeCfgNode.load_yaml_with_base(filename, allow_unsafe=False))
    except (YAMLError, OSError, ValueError) as e:  # yaml's scanner raises the last, too
        reason = " ".join(str(e).split())
        raise ConfigError(f"Config file '{filename}' cannot be read as safe yaml: {reason}") from e
    except (AttributeError, TypeError, AssertionError) as e:
        detail = f": {e}" if isinstance(e, AssertionError) else "."
        raise ConfigError(
            f"Config file '{filename}' or its _BASE_ is no mapping of KEY: VALUE sections{detail}"
        ) from e


def merge_from_list(cfg: CfgNode, opts: list[Any], source: str = "the command line") -> None:
    """Merge ``KEY VALUE ...`` overrides into ``cfg``.

    Raises:
        ConfigError: a key is unknown, a value is missing or of another type.
    """
    options = [x for x in opts[0::2] if str(x).startswith("--")]
    if options:
        raise ConfigError(f"{options[0]} must stand before the KEY VALUE overrides.")
    if len(opts) % 2:
        raise ConfigError(f"Overrides must be KEY VALUE pairs; '{opts[-1]}' has no value.")
    for old_key, old_value in zip(opts[0::2], opts[1::2]):
        key, value = renamed_option(str(old_key), old_value, source)
        with _keeping_types(cfg, [key], source):
            try:
                cfg.merge_from_list([key, value])
            except (ValueError, AssertionError) as e:
                raise ConfigError(f"{key} {value}: {_said(e)}") from e


def _merge(cfg: CfgNode, loaded: CfgNode, source: str) -> None:
    with _keeping_types(cfg, [key for key, _ in leaves(loaded)], source):
        try:
            cfg.merge_from_other_cfg(loaded)
        except (KeyError, ValueError, AssertionError) as e:
            raise ConfigError(f"{source}: {_said(e)}") from e


def _said(error: Exception) -> str:
    """What yacs says of a value, in words for users where it names Python's types."""
    sentence = str(error.args[0] if error.args else error)
    found = _MISMATCH.search(sentence)
    if not found:
        return sentence
    expected, given, value, key = found.groups()
    name = f'; write ("{value}",)' if given == "str" and expected in ("list", "tuple") else ""
    return f"{key} must be of type {expected}; {value} is of type {given}{name}."


_MISMATCH = re.compile(
    r"Type mismatch \(<class '(\w+)'> vs\. <class '(\w+)'>\) with values \(.* vs\. (.*)\) "
    r"for config key: ([\w.]+)",
    re.DOTALL,
)


@contextmanager
def _keeping_types(cfg: CfgNode, keys: list[str], source: str) -> Iterator[None]:
    """Refuse unknown keys, and None for a value that is not None, which yacs takes."""
    before = {key: _value(cfg, key, source) for key in keys}
    yield
    for key, value in before.items():
        if value is not None and _value(cfg, key, source) is None:
            raise ConfigError(f"{key} in {source} is None; it must be a {type(value).__name__}.")


def _value(cfg: CfgNode, key: str, source: str) -> Any:
    """The value of a key; None if detectron2 knows it as one of earlier times.

    Raises:
        ConfigError: it is unknown, or a section.
    """
    path: list[str] = []
    node = cfg
    for name in key.split("."):
        if not isinstance(node, CfgNode) or name not in node:
            if cfg.key_is_deprecated(key) or cfg.key_is_renamed(key):
                return None
            valid = nearest(name, node) if isinstance(node, CfgNode) else "no key below it"
            where = ".".join(path) or "the top level"
            raise ConfigError(f"Unknown config key '{key}' in {source}; {where} has: {valid}.")
        node = node[name]
        path.append(name)
    if isinstance(node, CfgNode):
        raise ConfigError(
            f"'{key}' in {source} is a section, not a value; it has: {nearest('', node)}."
        )
    return node

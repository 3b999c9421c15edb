"""Config files and overrides, read safely."""

import io
import math
import os
import re
from collections.abc import Collection, Iterator, Sequence
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
from .defaults import KEYS, SCHEDULES, get_distill_cfg
from .detectron2_rules import check_rules, leaves


def load_config(
    config_file: str,
    opts: Sequence[Any] = (),
    source: str = "the command line",
    allowed: Collection[str] = (),
) -> CfgNode:
    """Return the defaults of detectron2 and this package, a yaml file and overrides, merged.

    Three keys are resolved:

    - ``SOLVER.SCHEDULE`` scales the file's ``SOLVER.MAX_ITER`` and ``SOLVER.STEPS``, see
      :func:`scale_schedule`, and becomes 1x. Overrides of these two keys are not scaled.
    - An ``OUTPUT_DIR`` that neither the file, its ``_BASE_`` nor an override sets is derived from
      the file's path, see :func:`default_output_dir`.
    - ``MODEL.WEIGHTS`` of the file may have moved with it, as the checkpoint of a ``student.yaml``
      does. If it is not at its place, a file of its name beside the config file replaces it.

    Args:
        config_file: path or name, see :func:`find_config`; "" for the defaults.
        opts: KEY VALUE overrides.
        source: where the overrides come from, for messages.
        allowed: keys named ``ALLOW_...`` that the file may set, besides those of the overrides.

    Raises:
        ConfigError: the file or an override cannot be merged.
    """
    cfg = get_distill_cfg()
    cfg.OUTPUT_DIR = ""
    overridden = {str(key) for key in opts[0::2]}
    if config_file:
        config_file = find_config(config_file)
        merge_from_file(cfg, config_file, {*overridden, *allowed})
        cfg.MODEL.WEIGHTS = _moved_weights(cfg.MODEL.WEIGHTS, config_file)
    of_file = cfg.SOLVER.clone()
    merge_from_list(cfg, list(opts), source)
    schedule = cfg.SOLVER.SCHEDULE
    _apply_schedule(cfg.SOLVER, of_file, overridden)
    if not cfg.OUTPUT_DIR:
        other = schedule if schedule != of_file.SCHEDULE else ""
        cfg.OUTPUT_DIR = default_output_dir(config_file, other)
    return cfg


def _moved_weights(weights: str, config_file: str) -> str:
    folder, name = os.path.split(weights)
    beside = os.path.join(os.path.dirname(config_file), name)
    moved = folder and "://" not in weights and not os.path.isfile(weights)
    return beside if moved and os.path.isfile(beside) else weights


def _apply_schedule(solver: CfgNode, of_file: CfgNode, overridden: set[str]) -> None:
    KEYS["SOLVER.SCHEDULE"].check("SOLVER.SCHEDULE", solver.SCHEDULE)
    if solver.SCHEDULE == "1x":
        return
    for key in ("MAX_ITER", "STEPS"):
        check_rules(f"SOLVER.{key}", of_file[key])
    max_iter, steps = scale_schedule(
        of_file.MAX_ITER, of_file.STEPS, SCHEDULES.index(solver.SCHEDULE) + 1
    )
    if "SOLVER.MAX_ITER" not in overridden:
        solver.MAX_ITER = max_iter
    # Other schedulers ignore the steps, which stay as they are.
    if "SOLVER.STEPS" not in overridden and solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        solver.STEPS = steps
    solver.SCHEDULE = "1x"


def scale_schedule(
    max_iter: int, steps: Sequence[int], factor: float
) -> tuple[int, tuple[int, ...]]:
    """Return the iterations and the learning rate's steps of a longer schedule.

    For whole factors, this is the rule of detectron2's model zoo. From (60k, 80k) of 90k, 2x makes
    (120k, 160k) of 180k, and 3x makes (210k, 250k) of 270k. The phases after a step are at most
    doubled, because a longer training gains from its high learning rate (He et al., Rethinking
    ImageNet Pre-training).

    Args:
        max_iter, steps: values of the 1x schedule.
        factor: at least 1; the iterations are rounded up.
    """
    total = math.ceil(round(factor * max_iter, 6))  # a binary fraction may be just above
    return total, tuple(total - round(min(factor, 2) * (max_iter - step)) for step in steps)


def default_output_dir(config_file: str, schedule: str = "") -> str:
    """Return ``output/<path>``: the path of a config file below the folder ``configs``.

    The extension is left out. A file outside of such a folder gives ``output/<name>``; no file
    gives detectron2's ``./output``.

    Args:
        config_file: yaml path, or "".
        schedule: one that is not the file's own, which would overwrite its results. It replaces
            the ``_1x`` at the end of the name, or is appended.
    """
    if not config_file:
        return "./output"
    path = os.path.splitext(os.path.abspath(config_file))[0]
    _, below, name = path.rpartition(f"{os.sep}configs{os.sep}")
    name = name if below else os.path.basename(path)
    if schedule:
        name = f"{re.sub('_[123]x$', '', name)}_{schedule}"
    return os.path.join("output", name)


class _SafeCfgNode(FvcoreCfgNode):
    """Config that loads ``_BASE_`` chains with the safe yaml loader only.

    detectron2's own RetinaNet and FCOS files compute their anchor sizes with an ``eval`` tag. That
    one expression is replaced by its value; every other tag is refused.
    """

    _EVAL = (
        '!!python/object/apply:eval ["[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] '
        'for x in [32, 64, 128, 256, 512 ]]"]'
    )
    _VALUE = str([[x * 2 ** (k / 3) for k in range(3)] for x in (32.0, 64.0, 128.0, 256.0, 512.0)])

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        if "://" in filename:  # detectron2 would download it and keep the copy
            raise OSError(f"_BASE_ '{filename}' is no file; download it and name the copy")
        with PathManager.open(filename, "r") as f:
            text = io.StringIO(f.read().replace(cls._EVAL, cls._VALUE))
        text.name = filename  # for the messages of yaml
        return text

    @staticmethod
    def _found(filename: str) -> str:
        if "://" in filename or PathManager.isfile(filename):
            return filename
        packaged, parts = package_configs(), filename.split("/")
        for name in ("/".join(parts[k:]) for k in range(len(parts) - 1)):  # with a folder
            if (short := name.removeprefix("configs/")) in packaged:
                return packaged[short]
        raise OSError(
            f"there is no file '{filename}'. A _BASE_ is a path relative to the file that names "
            "it, or the name of a config of this package"
        )

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Load a file with today's names; those of a file go before those of its ``_BASE_``.

        A ``_BASE_`` is a path relative to the file that names it, or the name of a config of this
        package.
        """
        filename = cls._found(filename)
        loaded: dict[str, Any] = super().load_yaml_with_base(filename, allow_unsafe=False)
        model = loaded.get("MODEL")
        section = model.get("DISTILL") if isinstance(model, dict) else None
        if isinstance(section, dict):
            rename_heads(section, f"Config file '{filename}'")
        return loaded


def package_configs() -> dict[str, str]:
    """Return the paths of this package's configs by name, such as ``Base-R-50.yaml``."""
    configs = Path(__file__).resolve().parents[1] / "configs"
    if not configs.is_dir():  # not installed: they are at the top of the checkout
        configs = configs.parents[2] / "configs"
    return {x.relative_to(configs).as_posix(): str(x) for x in configs.rglob("*.yaml")}


def find_config(name: str) -> str:
    """Return the path of a config file.

    Args:
        name: a file, or a config of this package such as ``COCO-Detection/gfl_R_50_FPN.yaml``,
            with or without ``configs/`` before it. A file comes first.

    Raises:
        ConfigError: there is no such config; the message has the nearest names.
    """
    if PathManager.isfile(name):
        return name
    packaged, short = package_configs(), name.removeprefix("configs/")
    if short not in packaged:
        raise ConfigError(
            f"Config file '{name}' does not exist (seen from {os.getcwd()}), nor does this package "
            f"have a config of that name; it has: {nearest(short, packaged, most=4)}."
        )
    return packaged[short]


def merge_from_file(cfg: CfgNode, filename: str, allowed: Collection[str] = ()) -> None:
    """Merge a yaml file and its ``_BASE_`` chain into ``cfg``.

    Args:
        cfg: config with all keys.
        filename: path or name, see :func:`find_config`.
        allowed: keys named ``ALLOW_...`` that the file may set, because the command line does.

    Raises:
        ConfigError: the file is missing, is no valid or safe yaml, has an unknown key, or sets a
            key named ``ALLOW_...``.
    """
    filename = find_config(filename)
    if filename.endswith(".py"):
        raise ConfigError(
            f"Config file '{filename}' is a Python LazyConfig, which only a teacher can be: name a "
            "yaml of the same model."
        )
    allowed = {*permissions(cfg), *allowed}
    try:
        _merge(cfg, _read_yaml(filename), filename)
    except RecursionError as e:
        raise ConfigError(
            f"The _BASE_ of config file '{filename}' leads back to itself, or its values hold "
            "themselves."
        ) from e
    refuse_permissions(cfg, filename, allowed)


def permissions(cfg: CfgNode) -> list[str]:
    """Return the keys named ``ALLOW_...`` that are True."""
    return [key for key, on in leaves(cfg) if on and key.split(".")[-1].startswith("ALLOW_")]


def refuse_permissions(cfg: CfgNode, source: str, allowed: Collection[str]) -> None:
    """Raise ConfigError if a key named ``ALLOW_...`` is True that the user did not set.

    A yaml may come from a stranger. Only the user decides what is read on this machine.

    Args:
        cfg: config after ``source`` was merged into it.
        source: origin of the values, for the message.
        allowed: keys that may be True, because the command line sets them.
    """
    for key in permissions(cfg):
        if key not in allowed:
            raise ConfigError(
                f"{key} is True in {source}, but it counts only on the command line; remove it "
                f"there, or add '{key} True' to the command."
            )


def _read_yaml(filename: str) -> CfgNode:
    try:
        return CfgNode(_SafeCfgNode.load_yaml_with_base(filename, allow_unsafe=False))
    except (YAMLError, OSError, ValueError) as e:  # yaml's scanner raises ValueError, too
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
        ConfigError: a key is unknown, or a value is missing or of another type.
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


def merge_section(cfg: CfgNode, values: Any, source: str) -> None:
    """Merge keys and values of plain types, as a yaml file has them, into ``cfg``.

    Raises:
        ConfigError: there is an unknown key, a value of another type, or no mapping.
    """
    try:
        loaded = CfgNode(values)
    except (AttributeError, TypeError, ValueError, AssertionError) as e:
        raise ConfigError(f"{source} is {values!r:.80}; it must be KEY: VALUE pairs.") from e
    _merge(cfg, loaded, source)


def _said(error: Exception) -> str:
    """Return the message of yacs, rewritten for users where it compares Python types."""
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
    """Refuse unknown keys, and None in place of another value, which yacs accepts."""
    before = {key: _value(cfg, key, source) for key in keys}
    yield
    for key, value in before.items():
        if value is not None and _value(cfg, key, source) is None:
            raise ConfigError(f"{key} in {source} is None; it must be a {type(value).__name__}.")


def _value(cfg: CfgNode, key: str, source: str) -> Any:
    """Return the value of a key, or None for a key that detectron2 has deprecated or renamed.

    Raises:
        ConfigError: the key is unknown, or a section.
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

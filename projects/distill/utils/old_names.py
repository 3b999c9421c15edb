"""Names of earlier versions in files, and their current names.

A checkpoint has names of hooks and heads, and a yaml file those of heads and their sections. A log
or a reproducer has names of losses. The names of sections and losses follow from the heads.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from detectron2.utils.logger import log_first_n

HOOKS = {
    "Alarms": "LossHealthHook",
    "BestCheckpoint": "BestCheckpointHook",
    "Checkpoints": "CheckpointHook",
    "DistillRatio": "KDRatioHook",
    "Evaluation": "EvalHook",
    "Telemetry": "TelemetryHook",
    "WeightsEMA": "EMAHook",
}
HEADS = {"MaskKD": "MaskLogitKD"}
SECTIONS = {old.upper(): new.upper() for old, new in HEADS.items()}
LOSSES = {old.lower(): new.lower() for old, new in HEADS.items()}  # loss_<head>, kd_ratio/<head>

T = TypeVar("T")


def with_renamed_keys(
    mapping: Mapping[str, T], table: Mapping[str, str], source: str
) -> dict[str, T]:
    """Return ``mapping`` with the current names in its keys.

    Args:
        mapping: for example the states of hooks, or losses.
        table: one of the tables in this module.
        source: origin of the names, for the line in the log that has the current names.
    """
    log_old_names(mapping, table, source)
    return {renamed(key, table): value for key, value in mapping.items()}


def rename_heads(section: dict[str, Any], source: str) -> None:
    """Rename the heads and sections of ``MODEL.DISTILL`` in a yaml file, in place.

    Args:
        section: keys below ``MODEL.DISTILL``.
        source: as in :func:`with_renamed_keys`.
    """
    log_old_names([*section, section.get("HEADS")], {**SECTIONS, **HEADS}, source)
    for old in SECTIONS.keys() & section.keys():
        keys = section.pop(old)
        section.setdefault(SECTIONS[old], {}).update(keys)
    if "HEADS" in section:
        section["HEADS"] = renamed_heads(section["HEADS"])


def renamed_option(key: str, value: Any, source: str) -> tuple[str, Any]:
    """Return key and value of an override, ``KEY VALUE``, with the current names.

    Args:
        key, value: the value changes only if the key is ``MODEL.DISTILL.HEADS``.
        source: as in :func:`with_renamed_keys`.
    """
    if key == "MODEL.DISTILL.HEADS":
        log_old_names([value], HEADS, source)
        return key, renamed_heads(value)
    log_old_names([key], SECTIONS, source)
    return renamed(key, SECTIONS), value


def renamed_heads(heads: Any) -> Any:
    """Return a value of ``MODEL.DISTILL.HEADS``, a sequence or text, with the current names."""
    if isinstance(heads, list | tuple):
        return type(heads)(map(renamed_heads, heads))
    return renamed(heads, HEADS) if isinstance(heads, str) else heads


def renamed(text: str, table: Mapping[str, str]) -> str:
    """Return ``text`` with the current names."""
    return _names(table).sub(lambda found: table[found[0]], text)


def log_old_names(texts: Iterable[Any], table: Mapping[str, str], source: str) -> None:
    """Log one line, the first time only, if the texts have an old name."""
    found = dict.fromkeys(name for text in texts for name in _names(table).findall(str(text)))
    if found:
        news = ", ".join(f"{name} is now {table[name]}" for name in found)
        message = f"{source} has names of an earlier version: {news}."
        log_first_n(logging.WARNING, message, name=__name__, key="message")


def _names(table: Mapping[str, str]) -> re.Pattern[str]:
    """Return a pattern of the old names that do not touch a letter or a digit."""
    return re.compile(rf"(?<![a-zA-Z0-9])(?:{'|'.join(table)})(?![a-zA-Z0-9])")

"""Rows of the config reference, for the documentation."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..heads import DISTILL_HEAD_REGISTRY
from ..nets.config import NETS_KEYS
from ..section import Key
from .defaults import KEYS, TEACHERS_KEYS


class KeyRow(NamedTuple):
    """A config key as plain data.

    Attributes:
        key: its dotted name.
        default: the value in a new config; -1 if ``presets`` has values.
        values: the valid values.
        meaning: one line, with the unit and the symbol in the paper.
        presets: the authors' values by the student's detector. The first value is also that of a
            detector that is not listed. Empty if all detectors have the default.
    """

    key: str
    default: Any
    values: str
    meaning: str
    presets: dict[str, Any]


def head_rows() -> dict[str, list[KeyRow]]:
    """Return the rows of every registered head, by its name in ``MODEL.DISTILL.HEADS``."""
    return {
        name: _rows(cls.section, f"MODEL.DISTILL.{cls.__name__.upper()}.")
        for name, cls in DISTILL_HEAD_REGISTRY
    }


def other_rows() -> list[KeyRow]:
    """Return the rows of all keys of this package and its networks that belong to no head."""
    own = _rows(TEACHERS_KEYS, "MODEL.DISTILL.TEACHERS[i].")
    return [*_rows(KEYS), *own, *_rows(NETS_KEYS)]


def _rows(keys: Mapping[str, Key], prefix: str = "") -> list[KeyRow]:
    return [
        KeyRow(f"{prefix}{name}", key.initial, key.rule.text, key.meaning, dict(key.presets))
        for name, key in keys.items()
    ]

"""Errors that a user can mend: one sentence that names what to change."""

import difflib
from collections.abc import Iterable, Sequence


class DistillError(Exception):
    """Base class; the command line prints its message alone and exits with code 2."""


class ConfigError(DistillError, ValueError):
    """A config key or value that cannot work."""


class DataError(DistillError, ValueError):
    """A data set that cannot be trained on."""


class WeightsError(DistillError):
    """A checkpoint that is missing, unreadable or of another network."""


class CheckpointError(DistillError):
    """A checkpoint that cannot be written."""


class NumericalError(DistillError):
    """A loss or gradient that is not finite."""


class TapError(DistillError, RuntimeError):
    """A tapped module that does not exist or did not run."""


def choices(value: str, valid: Iterable[str]) -> str:
    """The valid names for a message, nearest to ``value`` first."""
    names = sorted(valid)
    near = similar(value, names, 0.5)
    return ", ".join(near + [n for n in names if n not in near])


def similar(value: str, names: Sequence[str], likeness: float = 0.6) -> list[str]:
    """The names that are like ``value``, in capitals or not, the nearest first."""
    capitals: dict[str, list[str]] = {}
    for name in names:
        capitals.setdefault(name.upper(), []).append(name)
    found = difflib.get_close_matches(value.upper(), capitals, len(names) or 1, likeness)
    return [name for x in found for name in capitals[x]]

"""Text for messages."""

import difflib
from collections.abc import Iterable, Sequence


def choices(value: str, valid: Iterable[str]) -> str:
    """Return the valid names for a message, nearest to ``value`` first."""
    names = sorted(valid)
    near = similar(value, names, 0.5)
    return ", ".join(near + [n for n in names if n not in near])


def shortened(names: Sequence[str], most: int) -> str:
    """Return the first ``most`` names, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def similar(value: str, names: Sequence[str], likeness: float = 0.6) -> list[str]:
    """Return the names similar to ``value`` in any case, nearest first."""
    capitals: dict[str, list[str]] = {}
    for name in names:
        capitals.setdefault(name.upper(), []).append(name)
    found = difflib.get_close_matches(value.upper(), capitals, len(names) or 1, likeness)
    return [name for x in found for name in capitals[x]]

"""Text of messages: names nearest to what a user wrote, and lines on stderr."""

import difflib
import sys
from collections.abc import Iterable, Sequence


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


def nearest(value: object, valid: Iterable[str], most: int = 12) -> str:
    """Return the valid names for a message, nearest first, and at most ``most`` of them."""
    names = choices(str(value), valid).split(", ")
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def one_line(text: object) -> str:
    """The text with every run of white space replaced by one blank."""
    return " ".join(str(text).split())


def printable(text: str) -> str:
    """The text with escapes for what no terminal shows: file names may hold half a character."""
    return text.encode("utf-8", "backslashreplace").decode()


def print_error(sentence: object) -> None:
    """Print the line on stderr that says why a command ends with exit code 2."""
    print(f"error: {one_line(sentence)}", file=sys.stderr, flush=True)

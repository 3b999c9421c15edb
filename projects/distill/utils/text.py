"""Text of messages: names nearest to what a user wrote, and lines on stderr."""

import difflib
import sys
from collections.abc import Iterable, Sequence


def choices(value: str, valid: Iterable[str]) -> str:
    """Return the valid names for a message, nearest to ``value`` first."""
    names = sorted(valid)
    near = similar(value, names, 0.5)
    return ", ".join(near + [n for n in names if n not in near])


def shortened(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """Return the first ``most`` names, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def quoted(names: Sequence[str], most: int = 10) -> str:
    """Return the first ``most`` names in quotes, and the number of the others."""
    return shortened([f"'{name}'" for name in names], most)


def similar(value: str, names: Sequence[str], likeness: float = 0.6) -> list[str]:
    """Return the names similar to ``value`` in any case, nearest first."""
    capitals: dict[str, list[str]] = {}
    for name in names:
        capitals.setdefault(name.upper(), []).append(name)
    found = difflib.get_close_matches(value.upper(), capitals, len(names) or 1, likeness)
    return [name for x in found for name in capitals[x]]


def nearest(value: object, valid: Iterable[str], most: int = 12) -> str:
    """Return the valid names for a message, nearest first, and at most ``most`` of them."""
    return shortened(choices(str(value), valid).split(", "), most)


def one_line(text: object) -> str:
    """Replace every run of white space by one space."""
    return " ".join(str(text).split())


def clause(error: BaseException) -> str:
    """Return the message of an exception in one line, at most 200 characters, to be embedded."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return one_line(text)[:200].rstrip(".!")


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an exception's message, or its type if it has no message."""
    return one_line(error).split(". ")[0][:200] or type(error).__name__


def printable(text: str) -> str:
    """Escape characters that cannot be printed: file names may hold half a character."""
    return text.encode("utf-8", "backslashreplace").decode()


def print_error(sentence: object) -> None:
    """Print on stderr why a command ends with exit code 2, without control characters.

    A sentence may repeat names of a stranger's file.
    """
    text = "".join(x if x.isprintable() else repr(x)[1:-1] for x in one_line(sentence))
    print(f"error: {text}", file=sys.stderr, flush=True)

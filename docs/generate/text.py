"""Markdown made of docstrings and tables."""

import re
from collections.abc import Iterable, Sequence
from inspect import cleandoc
from typing import Any

ROLE = re.compile(r":\w+:`~?([\w.]+)`")
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):$", re.MULTILINE)


def markdown(docstring: str) -> str:
    """Return a docstring with links instead of roles, and with Markdown's code blocks."""
    return re.sub(r"::$", ":", ROLE.sub(_link, docstring), flags=re.MULTILINE)


def _link(match: re.Match[str]) -> str:
    """Link a full name to its place in the API, if it has one."""
    name = match[1]
    if not name.startswith("distill."):
        return f"`{name}`"
    short = name.rpartition(".")[2]
    return f'<autoref identifier="{name}" optional><code>{short}</code></autoref>'


def description(cls: type) -> str:
    """Return the docstring of a head without its name and without its arguments."""
    text = SECTION.split(cleandoc(cls.__doc__ or ""), maxsplit=1)[0].strip()
    text = text.removeprefix(f"{cls.__name__}: ")
    return markdown(text[:1].upper() + text[1:])


def table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return the lines of a table, with an empty line after it."""
    lines = [names, ["---"] * len(names), *rows]
    return [*("| " + " | ".join(map(cell, line)) + " |" for line in lines), ""]


def cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def code(value: Any) -> str:
    """Return a value as code, as a config file has it."""
    return f"`{value!r}`"

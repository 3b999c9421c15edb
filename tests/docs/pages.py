"""The Markdown pages and the blocks of code in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
TOP = sorted(ROOT.glob("*.md"))
DOCS = sorted((ROOT / "docs").rglob("*.md"))

BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ASSIGNMENT = re.compile(r"\w+=")


class Block(NamedTuple):
    """A block of code: its language, its title or "", and its text."""

    language: str
    title: str
    text: str


class Command(NamedTuple):
    """A line of a shell, such as ``NAME=value distill train --resume``."""

    variables: dict[str, str]
    program: str
    arguments: list[str]


def blocks(page: Path, *languages: str) -> list[Block]:
    found = (Block(*(x or "" for x in m.groups())) for m in BLOCK.finditer(page.read_text()))
    return [x for x in found if x.language in languages]


def commands(page: Path, *languages: str) -> Iterator[Command]:
    """Yield the commands of a page's blocks, with continued lines joined and comments left out.

    Blocks of ``text`` have other things, too: only their lines with ``distill`` are commands.
    """
    for block in blocks(page, *languages):
        for line in block.text.replace("\\\n", " ").splitlines():
            if block.language == "text" and not line.startswith("distill "):
                continue
            words = shlex.split(line, comments=True)
            variables = {}
            while words and ASSIGNMENT.match(words[0]):
                name, _, variables[name] = words.pop(0).partition("=")
            if words:
                yield Command(variables, words[0], words[1:])

"""Fuzzing: for any input, a command works or ends with one sentence of the project."""

import contextlib
import copy
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from distill import cli
from distill.errors import DistillError
from distill.launch.main import main

LOGGERS = ("detectron2", "fvcore", "distill")
CASES: Counter[str] = Counter()
"""Number of cases in this session, by the fuzzed input."""


def fuzz(examples: int) -> settings:
    """Return settings of a fuzz test with the same cases every time, and no database."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def works(what: str, run: Callable[[], Any]) -> bool:
    """Run a case, and return False if it ends with a sentence of the project.

    Args:
        what: name of the fuzzed input, for the count.
        run: the case.
    """
    CASES[what] += 1
    with clean_slate():
        try:
            run()
        except DistillError as e:
            assert str(e).strip(), f"{type(e).__name__} has no message"
            return False
    return True


def command_works(
    what: str, argv: Sequence[str], command: Callable[[Sequence[str]], int] = main
) -> bool:
    """Run a command line, and return False if it ends with code 2 and one line on stderr.

    Args:
        what: name of the fuzzed input, for the count.
        argv: arguments of the command.
        command: function that runs the command. Another command than the training may end with
            code 1, if it has findings.
    """
    CASES[what] += 1
    stderr = io.StringIO()
    with clean_slate(), contextlib.redirect_stderr(stderr):
        code = command(argv)
    text = stderr.getvalue()
    assert code in ((0, 2) if command is main else (0, 1, 2)), f"exit code {code}: {text}"
    if code == 2:
        lines = text.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), text
    assert "Traceback" not in text
    return code != 2


def check_data(argv: Sequence[str]) -> int:
    """Run ``distill check-data``."""
    return cli.main(["check-data", *argv])


@contextlib.contextmanager
def clean_slate() -> Iterator[None]:
    """Suppress stdout in this context, and then reset data sets, log handlers and torch."""
    before = set(DatasetCatalog.list())
    for name in LOGGERS:  # detectron2 sets them up once; without a handler they write to stderr
        logging.getLogger(name).addHandler(logging.NullHandler())
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            yield
        finally:
            for name in set(DatasetCatalog.list()) - before:
                DatasetCatalog.remove(name)
                MetadataCatalog.pop(name, None)
            for name in LOGGERS:
                logging.getLogger(name).handlers.clear()
            torch.use_deterministic_algorithms(False)
            torch.set_float32_matmul_precision("highest")
            torch.set_num_threads(1)


# ---- Values.

WHOLE = st.sampled_from([0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, -(2**63), 10**30])
REAL = st.sampled_from(
    [0.0, -1.0, 0.5, 1.0, 1.5, 1e-45, 1e30, -1e30, 1e308]
    + [float("nan"), float("inf"), float("-inf")]
)
TEXT = st.text(max_size=6) | st.sampled_from(
    ["", " ", "x", "None", "-1", "%s {0}", "../..", "/dev/null", "a\0b", "λ\n\t", "é" * 3000]
)
SCALARS = st.none() | st.booleans() | WHOLE | REAL | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda x: st.lists(x, max_size=4) | st.dictionaries(TEXT, x, max_size=3),
    max_leaves=6,
)


def like(value: Any, text: st.SearchStrategy[str] = TEXT) -> st.SearchStrategy[Any]:
    """Return values of the same type as ``value``, including extremes; strings from ``text``."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return WHOLE | st.integers(0, 2 * min(abs(value), 10**6) + 2)
    if isinstance(value, float):
        return REAL | (st.floats(0, 2 * abs(value) + 1) if abs(value) < 1e6 else REAL)
    if isinstance(value, str):
        return text
    if isinstance(value, list | tuple):
        part = like(value[0], text) if value else SCALARS | text
        return st.lists(part, max_size=len(value) + 1) | altered(value, part)
    return SCALARS


@st.composite
def altered(draw: st.DrawFn, values: Sequence[Any], part: st.SearchStrategy[Any]) -> list[Any]:
    """Replace, drop or repeat one entry of a list, and sometimes repeat the whole list."""
    index = draw(st.integers(0, max(len(values) - 1, 0)))
    head, tail = list(values[:index]), list(values[index + 1 :])
    middle = draw(
        st.sampled_from([[draw(part)], [draw(VALUES)], [], [*values[index : index + 1]] * 2])
    )
    return draw(st.sampled_from([1, 1, 1, 40])) * [*head, *middle, *tail]


# ---- Contents of files.


@st.composite
def spoilt(draw: st.DrawFn, content: Any, names: st.SearchStrategy[str] = TEXT) -> Any:
    """Change one to three values in nested dictionaries and lists.

    Args:
        draw: given by Hypothesis.
        content: nested dictionaries and lists.
        names: keys to add to a dictionary.
    """
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        holder, key = _entry(draw, content)
        if holder is None:
            return draw(VALUES)
        value = holder[key]
        act = draw(st.sampled_from(["other", "extreme", "remove", "nest", "add", "repeat", "move"]))
        if act == "other":
            holder[key] = draw(VALUES)
        elif act == "extreme":
            holder[key] = draw(like(value))
        elif act == "remove":
            del holder[key]
        elif act == "nest":
            holder[key] = draw(st.sampled_from([[value], {"x": value}, [[[value] * 2]]]))
        elif act == "add" and isinstance(holder, dict):
            holder[draw(names | st.sampled_from(list(holder)))] = draw(VALUES)
        elif act == "repeat" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(value))
        else:
            other, name = _entry(draw, content)
            other[name] = copy.deepcopy(value)
    return content


def _entry(draw: st.DrawFn, content: Any) -> tuple[Any, Any]:
    """Draw a dictionary or list anywhere inside, and one of its keys; None without an entry."""
    holder, key = None, None
    while isinstance(content, dict | list) and content:
        if holder is not None and draw(st.integers(0, 4)) == 0:
            break
        keys = list(content) if isinstance(content, dict) else range(len(content))
        holder, key = content, draw(st.sampled_from(keys))
        content = holder[key]
    return holder, key


@st.composite
def garbled(draw: st.DrawFn, data: bytes) -> bytes:
    """Change one to three pieces of a file, and sometimes cut its end off."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = start + draw(st.sampled_from([1, 1, 4, 64, 1000]))
        piece = data[start:stop]
        bit = 1 << draw(st.integers(0, 7))
        new = draw(
            st.sampled_from([bytes(x ^ bit for x in piece), b"", piece * 2, bytes(len(piece))])
            | st.sampled_from([data[: len(piece)], data[-len(piece) :]])
            | st.binary(max_size=8)
        )
        rest = draw(st.sampled_from([data[stop:]] * 9 + [b""]))
        data = data[:start] + new + rest
    return data


def encoded(text: str) -> st.SearchStrategy[bytes]:
    """Encode a text in different ways, most of them wrong."""
    names = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-7", "cp037"]
    return st.sampled_from(names).map(lambda name: text.encode(name, "replace"))

"""The environment and the warnings in the ``log.txt`` of a run."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_RECORD = re.compile(r"\[\d\d/\d\d \d\d:\d\d:\d\d\] (\S+) ([A-Z]+): (.*)")  # detectron2's format
_ENVIRONMENT = "Environment info:"
_LOUD = ("WARNING", "ERROR", "CRITICAL")


class Record(NamedTuple):
    """Record of a log; the message may have several lines."""

    logger: str
    level: str
    message: str


class Log(NamedTuple):
    """Content of a log.

    Attributes:
        environment: the versions and devices of the last start, by name; empty if not logged.
        warnings: different messages of level WARNING and above, with their number.
    """

    environment: dict[str, str]
    warnings: dict[str, int]


def read_log(path: Path) -> Log:
    """Read a log; without a file it is empty."""
    environment: dict[str, str] = {}
    warnings: Counter[str] = Counter()
    for record in _records(path) if path.is_file() else ():
        if record.message.startswith(_ENVIRONMENT):
            environment = _environment(record.message)
        elif record.level in _LOUD:
            warnings[record.message.strip()] += 1
    return Log(environment, dict(warnings))


def _records(path: Path) -> Iterator[Record]:
    last: Record | None = None
    with path.open(encoding="utf-8", errors="replace") as f:
        for line in f:
            if match := _RECORD.match(line):
                if last:
                    yield last
                last = Record(*match.groups())
            elif last:
                last = last._replace(message=f"{last.message}\n{line.rstrip()}")
    if last:
        yield last


def _environment(message: str) -> dict[str, str]:
    """Read the rows of detectron2's table, whose two columns at least two spaces separate."""
    rows = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in message.splitlines()[1:])
    return {row[0]: row[1] for row in rows if len(row) == 2 and not row[0].startswith("---")}

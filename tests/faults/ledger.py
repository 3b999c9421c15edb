"""Counts of faults: injected, recovered, lost, hung."""

import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .fuzzing import CASES


class Hung(Exception):
    """A process that did not end in time."""


@dataclass
class Row:
    """What became of the faults of one kind.

    Every injected one is either recovered, lost (the run ended otherwise than an undisturbed one,
    or a checkpoint is gone), or hung.
    """

    kind: str
    injected: int = 0
    recovered: int = 0
    lost: int = 0
    hung: int = 0


Case = Callable[[Path], int | None]
"""A fault and its recovery in an empty folder. Returns how many faults it injected; None: one."""


@dataclass
class Ledger:
    """The rows of a session, in the order of their injection."""

    rows: list[Row] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def inject(self, kind: str, cases: Mapping[str, Case], folder: Path) -> Row:
        """Run cases, as many at a time as there are cores, and note what became of them.

        Args:
            kind: of fault.
            cases: by what distinguishes them.
            folder: each case gets one below; it stays if the case fails.

        Raises:
            AssertionError: with the reason of each case that did not recover.
        """
        row = Row(kind)
        self.rows.append(row)

        def run(name: str) -> tuple[str, int, str]:
            """The outcome, its number of faults, and the reason of a failure."""
            place = folder / re.sub(r"[^\w.]+", "_", f"{kind} {name}")
            place.mkdir()
            try:
                number = cases[name](place) or 1
            except Hung as e:
                return "hung", 1, f"{name}: hung: {e}"
            except Exception as e:
                return "lost", 1, f"{name} ({place}): {type(e).__name__}: {e}"
            shutil.rmtree(place)
            return "recovered", number, ""

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            outcomes = list(pool.map(run, cases))
        for outcome, number, _ in outcomes:
            row.injected += number
            setattr(row, outcome, getattr(row, outcome) + number)
        failures = [reason for _, _, reason in outcomes if reason]
        assert not failures, f"{kind}: " + "\n".join(failures)
        return row

    def table(self) -> Table:
        table = Table("fault", "injected", "recovered", "lost", "hung")
        for row in [*self.rows, self.total()]:
            table.add_row(*map(str, asdict(row).values()), end_section=row is self.rows[-1])
        return table

    def total(self) -> Row:
        counts = [list(asdict(row).values())[1:] for row in self.rows]
        return Row("all", *(sum(x) for x in zip(*counts)))

    def print(self) -> None:
        Console().print(self.table())

    def write(self, path: Path) -> None:
        """The rows as json, and what they were measured on."""
        content = {
            "machine": {
                "cores": len(os.sched_getaffinity(0)),
                "system": platform.platform(),
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "seconds": round(time.monotonic() - self.started),
            "faults": [asdict(row) for row in self.rows],
            "total": asdict(self.total()),
            "fuzzed": dict(sorted(CASES.items())),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")

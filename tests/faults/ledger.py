"""Counts of faults: injected, recovered, lost, hung."""

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


class Hung(Exception):
    """Error for a process that did not end in time."""


@dataclass
class Row:
    """Outcomes of the faults of one kind.

    Every injected fault is recovered, lost or hung. It is lost if the run did not end like an
    undisturbed run, or if a checkpoint is missing.
    """

    kind: str
    injected: int = 0
    recovered: int = 0
    lost: int = 0
    hung: int = 0


Case = Callable[[Path], int | None]
"""Function that injects faults in an empty folder and recovers; returns their number, None: one."""


class Ledger:
    """Injector of faults, which counts the outcomes.

    Args:
        record: function that records a row of the report, such as pytest's ``record_property``.
    """

    def __init__(self, record: Callable[[str, object], None]):
        self.record = record

    def inject(self, kind: str, cases: Mapping[str, Case], folder: Path) -> Row:
        """Run one case per core at a time, and record their outcomes.

        Args:
            kind: kind of the faults.
            cases: cases by name.
            folder: parent of one folder per case, which is kept if the case fails.

        Raises:
            AssertionError: some cases did not recover; the message has their reasons.
        """
        row = Row(kind)

        def run(name: str) -> tuple[str, int, str]:
            """Return the outcome, the number of faults, and the reason of a failure."""
            own = folder / re.sub(r"[^\w.]+", "_", f"{kind} {name}")
            own.mkdir()
            try:
                number = cases[name](own) or 1
            except Hung as e:
                return "hung", 1, f"{name}: hung: {e}"
            except Exception as e:
                return "lost", 1, f"{name} ({own}): {type(e).__name__}: {e}"
            shutil.rmtree(own)
            return "recovered", number, ""

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            outcomes = list(pool.map(run, cases))
        for outcome, number, _ in outcomes:
            row.injected += number
            setattr(row, outcome, getattr(row, outcome) + number)
        self.record("faults", asdict(row))
        failures = [reason for _, _, reason in outcomes if reason]
        assert not failures, f"{kind}: " + "\n".join(failures)
        return row


@dataclass
class FaultReport:
    """Outcomes of a test session in all its workers.

    Args:
        rows: one row per kind of fault.
        fuzzed: number of cases by fuzzed input.
        seconds: duration of the session.
    """

    rows: list[Row]
    fuzzed: dict[str, int]
    seconds: float

    def total(self) -> Row:
        counts = [list(asdict(row).values())[1:] for row in self.rows]
        return Row("all", *(sum(x) for x in zip(*counts)))

    def print(self) -> None:
        table = Table("fault", "injected", "recovered", "lost", "hung")
        for row in [*self.rows, self.total()]:
            table.add_row(*map(str, asdict(row).values()), end_section=row is self.rows[-1])
        Console().print(table)

    def write(self, path: Path) -> None:
        """Write the rows and a description of the machine as JSON."""
        content = {
            "machine": {
                "cores": len(os.sched_getaffinity(0)),
                "system": platform.platform(),
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "seconds": round(self.seconds),
            "faults": [asdict(row) for row in self.rows],
            "total": asdict(self.total()),
            "fuzzed": dict(sorted(self.fuzzed.items())),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")

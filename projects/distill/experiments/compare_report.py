"""Report of a comparison of methods: a table, raw values, and a figure of gains over costs."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table

from .runner import MEMORY, SECONDS, THREADS, Result
from .summary import mean_std
from .verdict import Gain, verdicts

TABLE_WIDTH = 120  # characters; what a narrower terminal wraps is still whole
Values = dict[int, float]
"""Values by seed, of the seeds that have one."""


@dataclass(eq=False)
class Row:
    """Results of a method, of the baseline or of the teacher.

    Args:
        extra_parameters: number of parameters of the heads, or None if there are no heads.
        results: results of the finished runs, by seed.
        failures: reasons of the failed runs, by seed.
        notes: remarks about the values.
    """

    name: str
    extra_parameters: int | None = None
    results: dict[int, Result] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def values(self, key: str) -> Values:
        found = {seed: result.get(key) for seed, result in self.results.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    @property
    def remark(self) -> str:
        """The notes and the reasons of failures, with their seeds unless all seeds share one."""
        seeds: dict[str, list[str]] = {}
        for seed, reason in self.failures.items():
            seeds.setdefault(reason, []).append(str(seed))
        if not self.results and len(seeds) == 1:
            return next(iter(seeds))
        failures = [f"Seed {', '.join(s)}: {reason}" for reason, s in seeds.items()]
        return " ".join([*self.notes, *failures])


@dataclass(eq=False)
class MethodTable:
    """All rows, and the metric by which they are compared: "" until a run has finished.

    Args:
        screening: seeds of all methods.
        fresh: further seeds, of the baseline and the flagged methods, which decide about these.
    """

    metric: str = ""
    teacher: Row | None = None
    baseline: Row = field(default_factory=lambda: Row("baseline"))
    methods: list[Row] = field(default_factory=list)
    screening: Sequence[int] = ()
    fresh: Sequence[int] = ()

    @property
    def rows(self) -> list[Row]:
        """The teacher, the baseline, and the methods from the best to the worst."""
        gains = {row.name: self.gain(row) for row in self.methods}
        best = sorted(
            self.methods,
            key=lambda row: x.mean if (x := gains[row.name]) else float("-inf"),
            reverse=True,
        )
        return [*([self.teacher] if self.teacher else []), self.baseline, *best]

    def gains(self, row: Row) -> Values:
        """Return the differences of the metric to the baseline of the same seed."""
        alone = self.baseline.values(self.metric)
        return {s: x - alone[s] for s, x in row.values(self.metric).items() if s in alone}

    def flagged(self) -> list[Row]:
        """Return the methods whose mean gain over the screening seeds is below 0."""
        return [
            row for row in self.methods if (x := self._gain(row, self.screening)) and x.mean < 0
        ]

    def gain(self, row: Row) -> Gain | None:
        """Return the gain that is reported: over fresh seeds, which did not choose the row, if any.

        None: no seed has finished.
        """
        return self._gain(row, self.fresh) or self._gain(row, self.screening)

    def _gain(self, row: Row, seeds: Sequence[int]) -> Gain | None:
        values = tuple(x for seed, x in self.gains(row).items() if seed in seeds)
        return Gain(values) if values else None

    def verdicts(self) -> dict[str, str]:
        """Return the verdict about each method that has a gain.

        Methods that were decided with fresh seeds are corrected apart from the others.
        """
        found: dict[str, str] = {}
        for decided in (True, False):
            gains = {
                row.name: gain
                for row in self.methods
                if (gain := self.gain(row)) and bool(self._gain(row, self.fresh)) == decided
            }
            found |= verdicts(gains)
        return found

    def costs(self, row: Row) -> Values:
        """Return the time of a step relative to the baseline of the same seed and threads."""
        alone, threads = self.baseline.values(SECONDS), self.baseline.values(THREADS)
        own = row.values(THREADS)
        seconds = {s: x for s, x in row.values(SECONDS).items() if own.get(s) == threads.get(s)}
        return {s: x / alone[s] for s, x in seconds.items() if s in alone}

    def columns(self) -> dict[str, list[str]]:
        """Return the cells of the table by column, without names and remarks."""
        rows, verdict = self.rows, self.verdicts()
        gains = [self.gain(row) if row in self.methods else None for row in rows]
        students = [row is not self.teacher for row in rows]
        columns = {
            self.metric or "metric": [cell(row.values(self.metric), 1) for row in rows],
            "- baseline [95 %]": [
                str(gain or "-") if row in self.methods else "" for row, gain in zip(rows, gains)
            ],
            "seeds": [str(len(gain.values)) if gain else "" for gain in gains],
            "verdict": [verdict.get(row.name, "") for row in rows],
            "s/step": [cell(row.values(SECONDS), 3) for row in rows],
            "x baseline": [cell(self.costs(r), 2) if s else "" for r, s in zip(rows, students)],
            "GPU MiB": [cell(row.values(MEMORY), 0) for row in rows],
            "head parameters": [
                "" if row.extra_parameters is None else f"{row.extra_parameters:,}" for row in rows
            ],
        }
        if not any(row.values(MEMORY) for row in rows):
            del columns["GPU MiB"]
        return columns

    def markdown(self) -> str:
        columns = {"": [row.name for row in self.rows], **self.columns()}
        columns["remark"] = [row.remark.replace("|", "\\|") for row in self.rows]
        lines = [list(columns), ["---"] * len(columns), *map(list, zip(*columns.values()))]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def print(self) -> None:
        console = Console(width=TABLE_WIDTH)
        columns = {"": [row.name for row in self.rows], **self.columns()}
        table = Table(box=box.SIMPLE)
        for name in columns:
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        for line in zip(*columns.values()):
            table.add_row(*line)
        console.print(table)
        for row in self.rows:
            if row.remark:
                console.print(f"{row.name}: {row.remark}", highlight=False, soft_wrap=True)

    def raw(self) -> dict[str, Any]:
        """Return all values by seed with their mean and deviation, for JSON."""
        verdict, gains = self.verdicts(), {row.name: self.gain(row) for row in self.methods}
        flagged = [row.name for row in self.flagged()]
        return {
            row.name: {
                "verdict": verdict.get(row.name),
                "flagged": row.name in flagged,
                "gain": x.raw() if (x := gains.get(row.name)) else None,
                "extra_parameters": row.extra_parameters,
                "summary": {name: summary(values) for name, values in self._measured(row)},
                "results": row.results,
                "failures": row.failures,
                "notes": row.notes,
            }
            for row in self.rows
        }

    def _measured(self, row: Row) -> Iterator[tuple[str, Values]]:
        if self.metric:
            yield self.metric, row.values(self.metric)
        yield SECONDS, row.values(SECONDS)
        if row in self.methods:
            yield "gain", self.gains(row)
            yield "relative_cost", self.costs(row)

    def draw(self, path: Path) -> None:
        """Write a figure of each method's mean gain over its mean cost; the baseline is (1, 0)."""
        figure, ax = plt.subplots(figsize=(9, 6), layout="constrained")
        ax.axhline(0, color="0.8", zorder=0)
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9}
        ax.plot(1, 0, "s", color="0.5")
        ax.annotate("baseline", (1, 0), xytext=(6, -12), color="0.4", **style)
        for row in self.methods:
            gains, costs = list(self.gains(row).values()), list(self.costs(row).values())
            if gains and costs:
                x, y = statistics.mean(costs), statistics.mean(gains)
                spread = statistics.stdev(gains) if gains[1:] else None
                color = ax.errorbar(x, y, yerr=spread, fmt="o", capsize=3).lines[0].get_color()
                ax.annotate(row.name, (x, y), xytext=(6, 5), color=color, **style)
        ax.set_xlabel("seconds per step / those of the baseline")
        ax.set_ylabel(f"{self.metric} - that of the baseline")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def cell(values: Values, digits: int) -> str:
    return mean_std(list(values.values()), digits)


def summary(values: Values) -> dict[str, Any]:
    x = list(values.values())
    return {
        "mean": statistics.mean(x) if x else None,
        "std": statistics.stdev(x) if x[1:] else None,
        "values": values,
    }

"""Results of runs: the sentence on top of the report, its numbers, its tables and its classes."""

from collections.abc import Sequence
from typing import NamedTuple

from ..utils.html import Table
from .charts import Chart, bar_chart, style
from .runs import Metric, Run, main_metric


class Number(NamedTuple):
    """Value of a metric, with its change from the baseline as text."""

    name: str
    value: str
    change: str
    better: bool | None


class Results:
    """Results of runs, of which the first of several is the baseline.

    They are those at the last evaluation of the last run. A run that has no evaluation there counts
    with its own last one. So a running training is compared with the baseline at its iteration.

    Args:
        runs: at least one run.
    """

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs
        self.main = main_metric(runs)
        self.at = max(runs[-1].series(self.main.full), default=-1) if self.main else -1

    def value(self, run: Run, metric: Metric) -> float | None:
        values = run.series(metric.full)
        return values[self._iteration(run, metric)] if values else None

    def gain(self, run: Run, metric: Metric) -> float | None:
        """Return the difference to the baseline, or None if it or one of the values is missing."""
        if run is self.runs[0]:
            return None
        value, other = (self.value(x, metric) for x in (run, self.runs[0]))
        return None if value is None or other is None else value - other

    def _iteration(self, run: Run, metric: Metric) -> int:
        values = run.series(metric.full)
        return self.at if self.at in values else max(values)

    @property
    def comparable(self) -> bool:
        """False if the configs name different test sets."""
        tests = [x.config["DATASETS.TEST"] for x in self.runs if "DATASETS.TEST" in x.config]
        return all(x == tests[0] for x in tests)

    # ---- The result

    def verdict(self) -> str:
        """Return the result in one sentence."""
        run, metric = self.runs[-1], self.main
        done = f"{run.last + 1:,}" + (f" of {run.max_iter:,}" if run.max_iter else "")
        if metric is None:
            return f"{run.name} has no result after {done} iterations."
        if len(self.runs) > 2:
            best = max(self.runs, key=lambda x: self.value(x, metric) or 0)
            text = self._against_baseline(best, metric)
            return f"{best.name} is the best of {len(self.runs)} runs: {text}."
        return f"{run.name} has {self._against_baseline(run, metric)} after {done} iterations."

    def _against_baseline(self, run: Run, metric: Metric) -> str:
        value, gain, baseline = self.value(run, metric), self.gain(run, metric), self.runs[0]
        text = f"{value or 0:.1f} {metric.title}"
        if gain is None:
            return text
        relation = f"{abs(gain):.1f} {'more' if gain > 0 else 'less'} than"
        relation = "as much as" if _is_zero(gain) else relation
        iteration = self._iteration(baseline, metric)
        place = "" if iteration == self.at else f" after {iteration + 1:,} iterations"
        return f"{text}, {relation} {baseline.name} ({(value or 0) - gain:.1f}{place})"

    def numbers(self) -> list[Number]:
        """Return the overall metrics of the last run's task, except its recalls."""
        run, numbers = self.runs[-1], []
        for metric in run.metrics:
            value, gain = self.value(run, metric), self.gain(run, metric)
            shown = self.main and metric.task == self.main.task and metric.name[:2] != "AR"
            if value is not None and shown and not metric.of_class:
                better = None if gain is None or _is_zero(gain) else gain > 0
                numbers.append(Number(metric.title, f"{value:.1f}", signed(gain) or "", better))
        return numbers

    def tables(self) -> list[Table]:
        """Return a table of the overall metrics for each task."""
        metrics = dict.fromkeys(x for run in self.runs for x in run.metrics if not x.of_class)
        tables = []
        for task in dict.fromkeys(x.task for x in metrics):
            own = [x for x in metrics if x.task == task]
            rows = [[run.name, *(self.value(run, x) for x in own)] for run in self.runs]
            title = f"Last results: {own[0].task_title}"
            tables.append(Table(title, ["", *(x.name for x in own)], rows))
        return tables

    def curves(self) -> list[Metric]:
        """Return the main metric and the first one of each other task, such as AP."""
        first = {self.main.task: self.main} if self.main else {}
        for metric in (x for run in self.runs for x in run.metrics if not x.of_class):
            first.setdefault(metric.task, metric)
        return list(first.values())

    # ---- Classes

    def classes(self) -> dict[str, Metric]:
        """Return the metrics of single classes by class: those of the main task, or of another."""
        found = [x for run in self.runs for x in run.metrics if x.name.startswith(("AP-", "IoU-"))]
        own = [x for x in found if self.main and x.task == self.main.task] or found
        return {x.name.partition("-")[2]: x for x in sorted(own) if x.task == own[0].task}

    def class_chart(self) -> Chart | None:
        """Return the bars of the change of each class, or of its value without a baseline."""
        classes = self.classes()
        if not classes:
            return None
        kind = next(iter(classes.values())).name.partition("-")[0]
        shown = self.runs[1:] or self.runs
        of_run = self.gain if len(self.runs) > 1 else self.value
        bars = {x.name: {k: of_run(x, metric) for k, metric in classes.items()} for x in shown}
        ranks = bars[shown[-1].name]
        ranked = sorted(classes, key=lambda k: -(ranks[k] or 0))
        bars = {name: {k: values[k] for k in ranked} for name, values in bars.items()}
        title = f"Change of the {kind} of each class" if self.runs[1:] else f"{kind} of each class"
        return bar_chart("classes", title, bars, [style(k)[0] for k in range(len(bars))])

    def class_table(self) -> Table:
        others = self.runs[1:]
        columns = [*(x.name for x in self.runs), *(f"change of {x.name}" for x in others)]
        rows = [
            [
                *(name, *(self.value(x, metric) for x in self.runs)),
                *(signed(self.gain(x, metric)) for x in others),
            ]
            for name, metric in self.classes().items()
        ]
        return Table("Classes", ["class", *columns], rows)


def signed(value: float | None) -> str | None:
    return None if value is None else f"{value:+.1f}"


def _is_zero(gain: float) -> bool:
    """Return whether a gain is 0 at the precision of the page."""
    return abs(gain) < 0.05

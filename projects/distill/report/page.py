"""The report: one HTML page about a run, or about several of which the first is the baseline."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ..config import get_distill_cfg
from ..config.detectron2_rules import leaves
from ..evaluation.coco_format import AnnotatedSet
from ..utils.html import Table, cell, render
from ..utils.io import write_text
from .charts import GREY, Chart, Line, library, line_chart, stacked_chart, style
from .detections import MIN_SCORE, Comparison, ErrorKinds, compare
from .panels import STYLES
from .results import Results
from .runs import COSINE, FACTOR, RATIO, Run

NAME = "report.html"  # in OUTPUT_DIR
# Parts of the bars of errors: each CURVE less the one before it.
PARTS = (
    *("right at IoU 0.75", "right at IoU 0.5", "location", "similar class", "other class"),
    *("background", "missed"),
)
PART_COLORS = ("#08519c", "#6baed6", "#fdd49e", "#fdbb84", "#ef6548", "#b30000", "#d9d9d9")
PLACES = ("OUTPUT_DIR", "REPORT.BASELINE")  # keys that differ between any two runs
MOST_WARNINGS = 50


class Section(NamedTuple):
    """Heading with a sentence and charts."""

    title: str
    text: str
    charts: list[Chart]


def write_report(
    path: Path,
    runs: Sequence[Run],
    data: AnnotatedSet | None,
    *,
    shown: int,
    most: int,
    problem: str = "",
) -> None:
    """Write the page, which needs no other file.

    Args:
        path: file of the page.
        runs: the runs; the first of several is the baseline.
        data: their test set, for kinds of errors and images; None if it has no boxes.
        shown: number of images to show for each reason.
        most: number of images to analyze.
        problem: sentence that says why there is no test set.
    """
    comparison = compare(data, runs, shown, most) if data else None
    write_text(path, page(runs, comparison, problem))


def page(runs: Sequence[Run], comparison: Comparison | None, problem: str = "") -> str:
    """Return the page, see :func:`write_report`."""
    results = Results(runs)
    logged = [x for x in runs if x.log.environment]
    return render(
        "report.html",
        title=f"Report of {runs[-1].name}" if len(runs) < 3 else f"Comparison of {len(runs)} runs",
        runs=runs,
        results=results,
        sections=[x for x in _sections(runs, results) if x.charts],
        comparison=comparison or Comparison(0, 0, [], [], []),
        errors=[_error_chart(x) for x in (comparison.errors if comparison else ()) if x.areas],
        problem=problem,
        styles=STYLES,
        min_score=MIN_SCORE,
        cost=_cost(runs),
        differences=_differences(runs),
        environments=[
            Table(
                f"Environment of {x.name}", ["", ""], [[*row] for row in x.log.environment.items()]
            )
            for x in logged
        ],
        most_warnings=MOST_WARNINGS,
        library=library(),
    )


# ---- Curves


def _sections(runs: Sequence[Run], results: Results) -> Iterator[Section]:
    looks = _looks(runs)

    def over_runs(id: str, title: str, key: str, **options: Any) -> list[Chart]:
        lines = [Line(x.name, x.series(key), *looks[x.name]) for x in runs if x.series(key)]
        return [line_chart(id, title, lines, **options)] if lines else []

    progress = [
        chart
        for k, x in enumerate(results.curves())
        for chart in over_runs(f"metric-{k}", f"{x.title}, %", x.full, dots=True)
    ]
    yield Section("Results over iterations", "", progress)
    tasks = sorted({x for run in runs for x in run.losses()})
    losses = [c for k, x in enumerate(tasks) for c in over_runs(f"task-{k}", x, x)]
    yield Section("Task losses", "Medians of 20 iterations, as the log has them.", losses)
    distilled = [run for run in runs if run.heads]
    for number, run in enumerate(distilled):
        yield from _distillation(run, f"run-{number}", several=len(distilled) > 1)
    rates = over_runs("lr", "learning rate", "lr")
    norms = over_runs("norm", "norm of the gradient", "grad_norm")
    yield Section("Schedule", "", [*rates, *norms])


def _looks(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Return colour and dash of each run; the baseline is grey and dashed."""
    if len(runs) == 1:
        return {runs[0].name: style(0)}
    return {x.name: style(k - 1) if k else (GREY, "dash") for k, x in enumerate(runs)}


def _distillation(run: Run, id: str, several: bool) -> Iterator[Section]:
    """Yield one section for each head of a run."""
    for number, head in enumerate(run.heads):
        kinds: dict[str, dict[str, Mapping[int, float]]] = {
            "loss": {x.partition("/")[2] or head: run.series(x) for x in run.losses(head)},
            "ratio to the task": _by_level(run, RATIO, head),
            "cosine to the task's gradient": _by_level(run, COSINE, head),
            "factor of the balance": _by_level(run, FACTOR, head),
        }
        charts = []
        for k, (title, values) in enumerate(kinds.items()):
            lines = [Line(x, y, *style(n)) for n, (x, y) in enumerate(values.items()) if y]
            if lines:
                charts.append(line_chart(f"{id}-{number}-{k}", title, lines))
        of_run = f" of {run.name}" if several else ""
        text = (
            "By level or part. The ratio is that of the gradients if the weights set themselves, "
            "else that of the losses. A negative cosine pulls against the task."
        )
        yield Section(f"Distillation by {head}{of_run}", text, charts)


def _by_level(run: Run, prefix: str, head: str) -> dict[str, Mapping[int, float]]:
    """Return the series of a head, by level."""
    start = f"{prefix}{head}"
    keys = [x for x in run.keys if x == start or x.startswith(f"{start}/")]
    return {x.removeprefix(start).strip("/") or head: run.series(x) for x in keys}


# ---- Errors, cost and settings


def _error_chart(errors: ErrorKinds) -> Chart:
    """Return the bars of right detections and of the kinds of errors, which add up to 100 %."""
    parts = {}
    for name, areas in errors.areas.items():
        steps = pairwise([0.0, *areas.values()])
        parts[name] = dict(zip(PARTS, (max(b - a, 0.0) for a, b in steps)))
    return stacked_chart(f"errors-{errors.kind}", f"Errors of {errors.kind}", parts, PART_COLORS)


def _cost(runs: Sequence[Run]) -> Table:
    columns = ["iterations", "s/iteration", "images/s", "waiting for data", "memory, MiB", "hours"]
    rows: list[list[Any]] = []
    for run in runs:
        x = run.cost
        share = None if x.data_share is None else f"{x.data_share:.0%}"
        hours = x.seconds and x.seconds * (run.last + 1) / 3600
        numbers = cell(x.seconds, 3), x.images, share, cell(x.memory, 0), cell(hours, 2)
        rows.append([run.name, f"{run.last + 1:,}", *numbers])
    first = runs[0].cost.seconds
    if runs[1:] and first:
        columns.append("time over the first")
        for run, row in zip(runs, rows):
            row.append(cell(run.cost.seconds and run.cost.seconds / first, 2))
    return Table("Cost", ["", *columns], rows)


def _differences(runs: Sequence[Run]) -> Table:
    """Return the keys whose values differ between the runs, or from the defaults for one run."""
    configs = {x.name: x.config for x in runs}
    if len(runs) == 1:
        configs = {"default": dict(leaves(get_distill_cfg())), **configs}
    known = set.intersection(*(set(x) for x in configs.values())) - {*PLACES}
    values = {key: [_plain(x[key]) for x in configs.values()] for key in sorted(known)}
    rows = [[key, *x] for key, x in values.items() if len(set(x)) > 1]
    return Table("Config", ["key", *configs], rows)


def _plain(value: Any) -> str:
    """Return a value as text; yaml makes lists of tuples."""
    return str(_as_list(value)) if value not in ("", None) else "-"


def _as_list(value: Any) -> Any:
    return [_as_list(x) for x in value] if isinstance(value, list | tuple) else value

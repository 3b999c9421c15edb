"""The report: one HTML page about a run, or about several of which the first is the baseline."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config import get_distill_cfg
from ..config.detectron2_rules import leaves
from ..evaluation.coco_format import AnnotatedSet
from ..utils.html import Table, cell, render
from ..utils.io import write_text
from .charts import GREY, Chart, Line, bar_chart, library, line_chart, stacked_chart, style
from .detections import MIN_SCORE, Comparison, ErrorKinds, compare
from .panels import STYLES
from .runs import COSINE, FACTOR, RATIO, Metric, Run, main_metric

NAME = "report.html"  # in OUTPUT_DIR
PARTS = ("right at 0.75", "right at 0.5", "location", "similar class", "other class")
PARTS += ("background", "missed")  # of the bars of errors, from the differences of CURVES
PART_COLORS = ("#08519c", "#6baed6", "#fdd49e", "#fdbb84", "#ef6548", "#b30000", "#d9d9d9")
PLACES = ("OUTPUT_DIR", "REPORT.BASELINE")  # keys that differ between any two runs
MOST_WARNINGS = 50


class Number(NamedTuple):
    """Value of a metric, with its change from the baseline in words."""

    name: str
    value: str
    change: str
    better: bool | None


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
        data: their test set, for kinds of errors and images; None if there is none with boxes.
        shown: number of images to show for each reason.
        most: number of images to analyze.
        problem: sentence that says why there is no test set.
    """
    comparison = compare(data, runs, shown, most) if data else None
    write_text(path, page(runs, comparison, problem))


def page(runs: Sequence[Run], comparison: Comparison | None, problem: str = "") -> str:
    """Return the page, see :func:`write_report`."""
    main = main_metric(runs)
    classes = _class_metrics(runs, main)
    return render(
        "report.html",
        title=f"Report of {runs[-1].name}" if len(runs) < 3 else f"Comparison of {len(runs)} runs",
        verdict=verdict(runs, main),
        numbers=_numbers(runs, main),
        results=_results(runs),
        sections=[x for x in _sections(runs) if x.charts],
        classes=_class_chart(runs, classes),
        class_table=_class_table(runs, classes),
        errors=[x for k in (comparison.errors if comparison else ()) if (x := _error_chart(k))],
        comparison=comparison,
        left_out=comparison.problems if comparison else [],
        problem=problem,
        styles=STYLES,
        min_score=MIN_SCORE,
        cost=_cost(runs),
        differences=_differences(runs),
        environments=[
            Table(
                f"Environment of {x.name}", ["", ""], [list(k) for k in x.log.environment.items()]
            )
            for x in runs
            if x.log.environment
        ],
        warnings=[(x.name, list(x.log.warnings.items())) for x in runs if x.log.warnings],
        most_warnings=MOST_WARNINGS,
        library=library(),
    )


# ---- The result


def verdict(runs: Sequence[Run], metric: Metric | None) -> str:
    """Return the result in one sentence."""
    run = runs[-1]
    done = f"{run.last + 1:,}" + (f" of {run.max_iter:,}" if run.max_iter else "") + " iterations"
    if metric is None:
        return f"{run.name} has no result after {done}."
    if len(runs) > 2:
        best = max(runs, key=lambda x: x.final(metric.full) or 0)
        return f"{best.name} is the best of {len(runs)} runs: {_against(runs[0], best, metric)}."
    return f"{run.name} has {_against(runs[0], run, metric)} after {done}."


def _against(baseline: Run, run: Run, metric: Metric) -> str:
    """Return the last value of a metric, and its difference to that of the baseline."""
    value = run.final(metric.full) or 0.0
    text = f"{value:.1f} {metric.title}"
    other, place = _reference(baseline, run, metric)
    if run is baseline or other is None:
        return text
    gain = value - other
    relation = (
        "as much as" if _equal(gain) else f"{abs(gain):.1f} {'more' if gain > 0 else 'less'} than"
    )
    return f"{text}, {relation} {baseline.name} ({other:.1f}{place})"


def _reference(baseline: Run, run: Run, metric: Metric) -> tuple[float | None, str]:
    """Return the baseline's value to compare with, and its place in words.

    It is that at the last evaluation of the run, or the last one.
    """
    values = baseline.series(metric.full)
    if not values:
        return None, ""
    last, final = max(run.series(metric.full)), max(values)
    if last in values:
        return values[last], "" if last == final else " at that iteration"
    return values[final], f" at its iteration {final + 1:,}"


def _equal(gain: float) -> bool:
    """Return whether a gain is 0 at the precision of the page."""
    return abs(gain) < 0.05


def _numbers(runs: Sequence[Run], main: Metric | None) -> list[Number]:
    """Return the overall metrics of the last run's task, except its recalls."""
    run, baseline = runs[-1], runs[0]
    numbers = []
    for metric in run.metrics:
        if main is None or metric.task != main.task or metric.of_class or metric.name[:2] == "AR":
            continue
        value = run.final(metric.full) or 0.0
        other, _ = _reference(baseline, run, metric)
        gain = None if run is baseline or other is None else value - other
        better = None if gain is None or _equal(gain) else gain > 0
        numbers.append(Number(metric.title, f"{value:.1f}", _signed(gain) or "", better))
    return numbers


def _results(runs: Sequence[Run]) -> list[Table]:
    """Return a table of the last overall metrics for each task."""
    metrics = dict.fromkeys(x for run in runs for x in run.metrics if not x.of_class)
    tables = []
    for task in dict.fromkeys(x.task for x in metrics):
        own = [x for x in metrics if x.task == task]
        rows = [[run.name, *(run.final(x.full) for x in own)] for run in runs]
        title = f"Last results: {own[0].task_title}"
        tables.append(Table(title, ["", *(x.name for x in own)], rows))
    return tables


# ---- Curves


def _sections(runs: Sequence[Run]) -> Iterator[Section]:
    looks = _looks(runs)

    def over_runs(id: str, title: str, key: str, **options: Any) -> list[Chart]:
        lines = [Line(x.name, x.series(key), *looks[x.name]) for x in runs if x.series(key)]
        return [line_chart(id, title, lines, **options)] if lines else []

    progress = [
        chart
        for k, x in enumerate(_main_of_tasks(runs))
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


def _main_of_tasks(runs: Sequence[Run]) -> list[Metric]:
    """Return the first metric of each task, such as AP, and the main one."""
    first: dict[str, Metric] = {}
    for metric in (x for run in runs for x in run.metrics if not x.of_class):
        first.setdefault(metric.task, metric)
    main = main_metric(runs)
    return list(dict.fromkeys([*([main] if main else []), *first.values()]))


def _distillation(run: Run, id: str, several: bool) -> Iterator[Section]:
    """Yield one section for each head of a run."""
    for head in run.heads:
        kinds = {
            "loss": {x.partition("/")[2] or head: run.series(x) for x in run.losses(head)},
            "ratio to the task": _by_level(run, RATIO, head),
            "cosine to the task's gradient": {head: run.series(COSINE + head)},
            "factor of the balance": _by_level(run, FACTOR, head),
        }
        charts = []
        for k, (title, values) in enumerate(kinds.items()):
            lines = [Line(x, y, *style(n)) for n, (x, y) in enumerate(values.items()) if y]
            if lines:
                charts.append(line_chart(f"{id}-{head}-{k}", title, lines))
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


# ---- Classes and errors


def _class_metrics(runs: Sequence[Run], main: Metric | None) -> dict[str, Metric]:
    """Return the metrics of single classes by class: those of the main task, or of the first."""
    found = [x for run in runs for x in run.metrics if x.name.startswith(("AP-", "IoU-"))]
    own = [x for x in found if main and x.task == main.task] or found
    return {x.name.partition("-")[2]: x for x in sorted(own) if x.task == own[0].task}


def _class_chart(runs: Sequence[Run], classes: Mapping[str, Metric]) -> Chart | None:
    """Return the bars of the change of each class, or of its value without a baseline."""
    if not classes:
        return None
    values = {x.name: {k: x.final(m.full) for k, m in classes.items()} for x in runs}
    kind = next(iter(classes.values())).name.partition("-")[0]
    if len(runs) == 1:
        ranked = sorted(classes, key=lambda k: -(values[runs[0].name][k] or 0))
        bars = {runs[0].name: {k: values[runs[0].name][k] for k in ranked}}
        return bar_chart("classes", f"{kind} of each class", bars, [style(0)[0]])
    first, *others = values
    changes = {
        name: {k: _difference(values[name][k], values[first][k]) for k in classes}
        for name in others
    }
    ranked = sorted(classes, key=lambda k: -(changes[others[-1]][k] or 0))
    bars = {name: {k: x[k] for k in ranked} for name, x in changes.items()}
    colors = [style(k)[0] for k in range(len(others))]
    return bar_chart("classes", f"Change of the {kind} of each class", bars, colors)


def _class_table(runs: Sequence[Run], classes: Mapping[str, Metric]) -> Table:
    columns = ["class", *(x.name for x in runs), *(f"change of {x.name}" for x in runs[1:])]
    rows = []
    for name, metric in classes.items():
        first, *others = values = [x.final(metric.full) for x in runs]
        rows.append([name, *values, *(_signed(_difference(x, first)) for x in others)])
    return Table("Classes", columns, rows)


def _difference(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _signed(value: float | None) -> str | None:
    return None if value is None else f"{value:+.1f}"


def _error_chart(errors: ErrorKinds) -> Chart | None:
    """Return the bars of right detections and of the kinds of errors, which add up to 100 %."""
    parts = {}
    for name, areas in errors.areas.items():
        values = list(areas.values())
        steps = [max(b - a, 0.0) for a, b in zip([0.0, *values], values)]
        parts[name] = dict(zip(PARTS, steps))
    parts = {name: sizes for name, sizes in parts.items() if sizes}
    if not parts:
        return None
    return stacked_chart(f"errors-{errors.kind}", f"Errors of {errors.kind}", parts, PART_COLORS)


# ---- Cost and settings


def _cost(runs: Sequence[Run]) -> Table:
    columns = ["", "iterations", "s/iteration", "images/s", "waiting for data", "memory, MiB"]
    rows = []
    for run in runs:
        x = run.cost
        share = None if x.data_share is None else f"{x.data_share:.0%}"
        hours = x.seconds and x.seconds * (run.last + 1) / 3600
        slower = x.seconds and runs[0].cost.seconds and x.seconds / runs[0].cost.seconds
        rows.append(
            [
                *(run.name, f"{run.last + 1:,}", cell(x.seconds, 3), x.images, share),
                *(cell(x.memory, 0), cell(hours, 2), cell(slower, 2)),
            ]
        )
    return Table("Cost", [*columns, "hours", "times the first"], rows)


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

"""Page of a proof: its verdict, its rule, and all values, in one HTML file that needs no other."""

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..evaluation.coco_errors import CURVES
from ..utils.html import Table, render
from .runner import COST, SECONDS
from .summary import mean_std
from .verdict import Gain

ALONE, EQUAL_TIME, RANDOM = "baseline", "equal-time", "random-teacher"
REFERENCES = (ALONE, EQUAL_TIME)  # both must be beaten
LABELS = {
    ALONE: "student alone",
    EQUAL_TIME: "student alone for equal time",
    RANDOM: "random teacher",
}
Report = Mapping[str, Any]
Values = Mapping[str, list[float | None]]  # by arm; one value per seed


def page(report: Report) -> str:
    """Return the page.

    Args:
        report: content of the JSON file.
    """
    gains = {k: Gain(tuple(x)) for k, x in report["gains"].items() if x}
    facts = [[k, str(report[k])] for k in ("command", "commit", "device", "threads")]
    return render(
        "proof.html",
        title=f"{report['verdict'] or 'no verdict yet'}: {report['distilled']}",
        report=report,
        gains=_gains(report, gains) if gains else None,
        drawing=draw(report, gains) if gains and report["decision"] else b"",
        trainings=_trainings(report),
        control=_control(report),
        metrics=_metrics(report),
        facts=Table("How to repeat it", ["", ""], facts),
    )


def label(report: Report, arm: str) -> str:
    return LABELS.get(arm) or f"distilled ({report['distilled']})"


def _gains(report: Report, gains: Mapping[str, Gain]) -> Table:
    decision, boot = report["decision"], report["details"].get("bootstrap", {})
    ends = decision["bounds"] if decision else {}
    rows = [
        [
            label(report, k),
            f"{gain.mean:+.2f}",
            interval(*ends[k]) if k in ends else "-",
            interval(boot[k]["low"], boot[k]["high"]) if k in boot else "-",
            ", ".join(f"{x:+.2f}" for x in gain.values),
        ]
        for k, gain in gains.items()
    ]
    columns = ["over", "mean", "interval over seeds", "interval over test images", "seeds"]
    return Table(f"Gain in {report['metric']}", columns, rows)


def draw(report: Report, gains: Mapping[str, Gain]) -> bytes:
    """Draw a PNG of the gain of each seed, both intervals and the margin, after the decision."""
    figure = Figure((7, 1 + 0.9 * len(gains)), layout="constrained")
    ax = figure.add_subplot()
    ends, boot = report["decision"]["bounds"], report["details"].get("bootstrap", {})
    for y, (name, gain) in enumerate(gains.items()):
        ax.plot(ends[name], (y, y), color="#2171b5", lw=3, label=None if y else "seeds")
        if name in boot:
            bounds = boot[name]["low"], boot[name]["high"]
            ax.plot(bounds, [y + 0.2] * 2, color="#d94801", lw=3, label=None if y else "images")
        ax.plot(gain.values, [y] * len(gain.values), "o", color="k", ms=4)
    ax.axvline(report["plan"]["margin"], color="0.5", ls="--")
    ax.set(yticks=range(len(gains)), ylim=(-0.5, len(gains) - 0.3))
    ax.set_yticklabels([f"over {label(report, x)}" for x in gains])
    ax.set_xlabel(f"gain in {report['metric']}; dashed: margin", parse_math=False)
    ax.legend(fontsize=8)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def _trainings(report: Report) -> Table:
    rows = []
    for arm, row in report["rows"].items():
        results = list(row["results"].values())
        iterations = report["plan"]["iterations"][arm]
        steps = [x[SECONDS] for x in results if x[SECONDS] is not None]
        rows.append(
            [
                label(report, arm),
                mean_std([x[report["metric"]] for x in results], 2),
                f"{iterations:,}",
                mean_std(steps, 3),
                f"{statistics.mean(steps) * iterations / 60:.1f}" if steps else "-",
                " ".join(f"Seed {k}: {x}" for k, x in row["failures"].items()),
            ]
        )
    columns = ["", report["metric"] or "metric", "iterations", "s/step", "minutes", "failures"]
    return Table("Trainings", columns, rows)


def _control(report: Report) -> str:
    """Return the gains of the random teacher in words, or "" without one."""
    control = report["random_teacher"]
    if control is None:
        return ""
    means = [f"{statistics.mean(x):+.2f} over {LABELS[k]}" for k, x in control["gains"].items()]
    return ", ".join(means)


# ---- All metrics.


def _metrics(report: Report) -> list[Table]:
    """Return the tables of all metrics, of the classes and of the kinds of errors."""
    metric, arms = report["metric"], (*REFERENCES, report["distilled"])
    if not metric or not all(report["gains"].values()):
        return []
    results = {arm: report["rows"][arm]["results"] for arm in arms}
    seeds = [seed for seed in results[ALONE] if all(seed in x for x in results.values())]
    found = {arm: [x[seed] for seed in seeds] for arm, x in results.items()}
    task = f"{metric.rpartition('/')[0]}/"
    names = [x for x in found[ALONE][0] if x.startswith(task) and x not in COST]
    values = {
        name.removeprefix(task): {arm: [x.get(name) for x in found[arm]] for arm in arms}
        for name in names
    }
    classes = {k: x for k, x in values.items() if "-" in k}
    tables = {"All metrics": {k: x for k, x in values.items() if k not in classes}}
    tables["Classes"] = classes
    if "errors" in report["details"]:
        errors = report["details"]["errors"]
        tables["Kinds of errors"] = {
            f"{kind}: {meaning}": {arm: [x[kind] for x in errors[arm]] for arm in arms}
            for kind, meaning in CURVES.items()
        }
    return [_metric_table(report, name, x) for name, x in tables.items() if x]


def _metric_table(report: Report, caption: str, values: Mapping[str, Values]) -> Table:
    arms = (*REFERENCES, report["distilled"])
    columns = ["", *(label(report, x) for x in arms)]
    columns += [f"gain over {LABELS[x]}" for x in REFERENCES]
    rows: list[list[Any]] = []
    for name, arm in values.items():
        gains = [gain_text(arm[report["distilled"]], arm[x]) for x in REFERENCES]
        rows.append([name, *(mean_std(arm[x]) for x in arms), *gains])
    return Table(caption, columns, rows)


def gain_text(values: Sequence[float | None], others: Sequence[float | None]) -> str:
    """Return the mean of paired gains with its interval, or "-" if a value is not defined."""
    gains = [a - b for a, b in zip(values, others) if a is not None and b is not None]
    return str(Gain(tuple(gains))) if gains and len(gains) == len(values) else "-"


def interval(low: float, high: float) -> str:
    return f"[{low:.2f}, {high:.2f}]"

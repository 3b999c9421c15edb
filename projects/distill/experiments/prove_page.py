"""Page of a proof: its verdict, its rule, and all values, in one HTML file that needs no other."""

import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..evaluation.coco_errors import CURVES
from ..utils.html import heading, image, page, paragraph, table
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


def render(report: Report) -> str:
    """Write the page.

    Args:
        report: content of the JSON file.
    """
    verdict = report["verdict"] or "no verdict yet"
    body = [
        paragraph(report["plan"]["rule"]),
        *map(paragraph, report["plan"]["notes"]),
        *_gains(report),
        heading("Trainings"),
        _trainings(report),
        *_control(report),
        *_metrics(report),
        heading("How to repeat it"),
        table(["", ""], [[k, str(report[k])] for k in ("command", "commit", "device", "threads")]),
    ]
    return page(f"{verdict}: {report['distilled']}", body)


def label(report: Report, arm: str) -> str:
    return LABELS.get(arm) or f"distilled ({report['distilled']})"


def _gains(report: Report) -> Iterator[str]:
    gains = {k: Gain(tuple(x)) for k, x in report["gains"].items() if x}
    if not gains:
        return
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
    yield heading(f"Gain in {report['metric']}")
    columns = ("over", "mean", "interval over seeds", "interval over test images", "seeds")
    yield table(columns, rows)
    if decision:
        yield image(draw(report, gains), "png", "gain of each seed, with the intervals")
    yield paragraph(
        "The verdict uses the interval over seeds only. The interval over test images has 95 %. It "
        "is a bootstrap of the same runs on resampled images: another source of error."
    )
    if "problem" in report["details"]:
        yield paragraph(f"There is no bootstrap. {report['details']['problem']}")
    if decision and decision["fresh_seeds"]:
        yield paragraph(
            f"With {decision['fresh_seeds']} fresh seeds, another proof would decide if means and "
            "deviations stay as they are."
        )


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


def _trainings(report: Report) -> str:
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
    columns = ("", report["metric"] or "metric", "iterations", "s/step", "minutes", "failures")
    return table(columns, rows)


def _control(report: Report) -> Iterator[str]:
    control = report["random_teacher"]
    if control is None:
        return
    means = [f"{statistics.mean(x):+.2f} over {LABELS[k]}" for k, x in control["gains"].items()]
    yield paragraph(
        f"The same rule about the random teacher says {control['verdict']}: {', '.join(means)}. If "
        "it says GO, the gain does not come from what the teacher has learned."
    )


# ---- All metrics.


def _metrics(report: Report) -> Iterator[str]:
    metric, arms = report["metric"], (*REFERENCES, report["distilled"])
    if not metric or not all(report["gains"].values()):
        return
    results = {arm: report["rows"][arm]["results"] for arm in arms}
    seeds = [seed for seed in results[ALONE] if all(seed in x for x in results.values())]
    found = {arm: [x[seed] for seed in seeds] for arm, x in results.items()}
    task = f"{metric.rpartition('/')[0]}/"
    names = [x for x in found[ALONE][0] if x.startswith(task) and x not in COST]
    values = {
        name.removeprefix(task): {arm: [x.get(name) for x in found[arm]] for arm in arms}
        for name in names
    }
    yield heading("All metrics")
    yield paragraph(
        "The gains have 95 % intervals over seeds, each for itself: one in twenty is wrong."
    )
    classes = [x for x in values if "-" in x]
    yield _metric_table(report, {k: x for k, x in values.items() if k not in classes})
    if classes:
        yield heading("Classes")
        yield _metric_table(report, {k: values[k] for k in classes})
    if "errors" in report["details"]:
        yield heading("Kinds of errors")
        yield paragraph(
            "COCO's analysis of boxes: the area below the curve of precision over recall, as one "
            "kind of error after another is ignored. The step from one row to the next is the cost "
            "of that kind."
        )
        errors = report["details"]["errors"]
        kinds = {
            f"{kind}: {meaning}": {arm: [x[kind] for x in errors[arm]] for arm in arms}
            for kind, meaning in CURVES.items()
        }
        yield _metric_table(report, kinds)


def _metric_table(report: Report, values: Mapping[str, Values]) -> str:
    arms = (*REFERENCES, report["distilled"])
    columns = ["", *(label(report, x) for x in arms)]
    columns += [f"gain over {LABELS[x]}" for x in REFERENCES]
    rows = []
    for name, arm in values.items():
        gains = [gain_text(arm[report["distilled"]], arm[x]) for x in REFERENCES]
        rows.append([name, *(mean_std(arm[x]) for x in arms), *gains])
    return table(columns, rows)


def gain_text(values: Sequence[float | None], others: Sequence[float | None]) -> str:
    """Return the mean of paired gains with its interval, or "-" if a value is not defined."""
    gains = [a - b for a, b in zip(values, others) if a is not None and b is not None]
    return str(Gain(tuple(gains))) if gains and len(gains) == len(values) else "-"


def interval(low: float, high: float) -> str:
    return f"[{low:.2f}, {high:.2f}]"

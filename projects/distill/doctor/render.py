"""Text of a report, at most 100 columns wide."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..engine.health import HIGHEST_RATIO, LOWEST_COSINE, LOWEST_RATIO
from ..utils.text import shortened
from .report import (
    BalanceRow,
    Classes,
    Cost,
    DoctorReport,
    HeadRow,
    LossRow,
    OutputRow,
    Setting,
    TensorInfo,
    Weights,
)

WIDTH = 100
MOST_NAMES = 8


def render(report: DoctorReport) -> None:
    """Print the sections that the report has, and the number of errors and warnings at the end."""
    columns = min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH)
    console = Console(file=sys.stdout, width=columns, highlight=False, markup=False)
    for title, content in sections(report):
        console.print(title, style="bold")
        for part in content:
            console.print(part)
        console.print()
    console.print(f"{plural(report.errors, 'error')}, {plural(report.warnings, 'warning')}")


def sections(report: DoctorReport) -> Iterator[tuple[str, Sequence[Any]]]:
    yield "Networks", network_lines(report)
    for name, teacher in report.teachers.items():
        yield from ((f"{title} of {name}", content) for title, content in sections(teacher))
    if report.preprocessing:
        yield "Preprocessing", [setting_table(report.preprocessing)]
    if report.classes:
        yield "Classes", class_lines(report.classes)
    if report.outputs:
        yield "Outputs", [output_table(report.outputs)]
    if report.losses:
        yield "Losses", [loss_table(report.losses, balanced=bool(report.balance))]
    if report.balance:
        yield "Balance", [balance_table(report.balance)]
    if report.teacher_check or report.teacher_ap or report.teacher_cost:
        yield "Teacher", teacher_lines(report)
    if unlabeled := report.unlabeled:
        text = f"{unlabeled.objects} objects in {unlabeled.images} images, {unlabeled.empty} empty"
        yield "Unlabelled images", [text]
    if report.cost:
        yield "Cost", cost_lines(report.cost)
    if report.registered_heads:
        yield "Heads", [head_table(report.registered_heads)]
    for title in ("Notes", "Warnings", "Errors"):
        sentences = getattr(report, title.lower())
        if sentences:
            yield title, [bullets(sentences)]


def network_lines(report: DoctorReport) -> list[Any]:
    table = Table.grid(padding=(0, 2))
    table.add_row("student", report.student + weights_text(report.weights))
    filled = f", every tensor filled by {report.teacher_weights}"
    several = ", ".join(report.teachers) or "none"
    table.add_row("teacher", report.teacher + filled if report.teacher else several)
    if not report.registered_heads:
        table.add_row("heads", ", ".join(report.heads) or "none")
    return [table]


def weights_text(weights: Weights | None) -> str:
    if weights is None:
        return ""
    if not weights.file:
        return ", random weights"
    text = f", {weights.filled} of {weights.total} tensors filled by {weights.file}"
    if weights.unfilled:
        groups = ", ".join(f"{name} {number}" for name, number in weights.unfilled.items())
        text += f"; random: {groups}"
    return text


def setting_table(settings: Sequence[Setting]) -> Table:
    table = plain_table("", "student", "teacher", "")
    for x in settings:
        differs = x.teacher is not None and x.teacher != x.student
        table.add_row(x.name, x.student, x.teacher or "", "differs" if differs else "")
    return table


def class_lines(classes: Classes) -> list[str]:
    number = f"{classes.shared} of {len(classes.student)}"
    texts = {
        "same": f"the same {len(classes.student)} in the same order",
        "other order": f"the same {len(classes.student)} in another order",
        "mapped": f"the teacher knows {number} of the student's, by name",
    }
    lines = [texts.get(classes.relation, classes.relation)]
    if classes.only_student:
        lines.append(f"only the student's: {shortened(classes.only_student, MOST_NAMES)}")
    if classes.only_teacher:
        lines.append(f"only the teacher's: {shortened(classes.only_teacher, MOST_NAMES)}")
    return lines


def output_table(rows: Sequence[OutputRow]) -> Table:
    table = plain_table("output", "student", "teacher", "compared by")
    for row in rows:
        by_adapter: dict[str, list[str]] = {}
        for x in row.heads:
            by_adapter.setdefault(x.adapter, []).append(x.head)
        heads = [f"{', '.join(names)}: {adapter}" for adapter, names in by_adapter.items()]
        student, teacher = tensor_text(row.student), tensor_text(row.teacher)
        table.add_row(row.output, student, teacher, "\n".join(heads))
    return table


def tensor_text(x: TensorInfo | None) -> str:
    if x is None:
        return "-"
    stride = f" /{x.stride:g}" if x.stride else ""
    return f"{x.name} {'x'.join(map(str, x.shape))}{stride} {x.dtype}"


def balance_table(rows: Sequence[BalanceRow]) -> Table:
    table = plain_table("head", "tensor of the student", "factor", right=(2,))
    for row in rows:
        table.add_row(row.head, row.tensor, f"{row.factor:.3g}")
    return table


def loss_table(rows: Sequence[LossRow], balanced: bool = False) -> Table:
    table = plain_table("loss", "value", "of task", "gradient", "cosine", "", right=(1, 2, 3, 4))
    for row in rows:
        part = "/" in row.loss
        name = ("  " if part else "") + row.loss.removeprefix("loss_")
        cosine = "" if row.cosine is None else f"{round(row.cosine, 2) + 0.0:.2f}"  # no -0.00
        ratio = f"{row.ratio:.3g}" if row.head else ""
        values = (f"{row.value:.4g}", ratio, f"{row.gradient:.3g}", cosine if row.head else "")
        table.add_row(name, *values, remark(row, balanced))
    return table


def remark(row: LossRow, balanced: bool) -> str:
    """Return one or two words if a value is out of bounds."""
    if row.value == 0 or row.gradient == 0:
        return "no loss" if row.value == 0 else "no gradient"
    if row.head and not balanced and not LOWEST_RATIO <= row.ratio <= HIGHEST_RATIO:
        return "small" if row.ratio < LOWEST_RATIO else "large"
    return "against" if (row.cosine or 0) < LOWEST_COSINE else ""


def teacher_lines(report: DoctorReport) -> list[str]:
    lines = []
    if check := report.teacher_check:
        text = f"{check.measure}: {check.value:.1%} of {check.count} (chance {check.chance:.1%})"
        lines.append(text if check.by_class else f"{text}, classes not compared")
    if measured := report.teacher_ap:
        lines.append(f"on the first {measured.images} images of {measured.dataset}:")
        shown = [k for k in measured.metrics if k.split("/")[1] in ("AP", "AP50", "mIoU", "pACC")]
        lines.append("  " + ", ".join(f"{k} {measured.metrics[k]:.1f}" for k in shown))
    if cost := report.teacher_cost:
        lines.append(
            f"{cost.seconds:.3g} s per batch, {cost.parameters_mb:,.1f} MiB of parameters, "
            f"{cost.outputs_mb:,.1f} MiB of outputs"
        )
    return lines


def cost_lines(cost: Cost) -> list[str]:
    return [
        f"{cost.step_seconds:.3g} s per step of {cost.batch} images on {cost.device}, "
        f"{cost.memory_mb:,.0f} MiB at most"
        + (" in the whole process" if cost.device == "cpu" else ""),
        f"{cost.data_seconds:.3g} s to load a batch in one process",
        f"{cost.hours:.3g} h for {cost.iterations:,} iterations, without evaluation",
    ]


def head_table(rows: Sequence[HeadRow]) -> Table:
    table = plain_table("head", "compares", "here")
    for row in rows:
        name = row.head + (" *" if row.configured else "")
        outputs = ", ".join(row.compares) + ("" if row.needs_teacher else " (with itself)")
        table.add_row(name, outputs, f"no: {row.problem}" if row.problem else "works")
    if any(row.configured for row in rows):
        table.caption = "* in MODEL.DISTILL.HEADS"
    return table


def plain_table(*columns: str, right: Sequence[int] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, caption_justify="left")
    for k, column in enumerate(columns):
        table.add_column(column, justify="right" if k in right else "left", overflow="fold")
    return table


def bullets(sentences: Sequence[str]) -> Table:
    table = Table.grid(padding=(0, 1))
    for sentence in sentences:
        table.add_row("-", sentence)
    return table


def plural(things: Sequence[Any], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"

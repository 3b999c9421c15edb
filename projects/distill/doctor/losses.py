"""Values and gradients of all losses, compared with those of the task."""

import math
import os
import traceback
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..engine.health import cosine_warning, dead_warning, ratio_warning
from ..engine.telemetry import dot
from ..errors import DistillError, NumericalError
from ..heads import DistillHead
from ..heads.base import head_of
from ..modeling.balance import GradientBalance
from ..utils.text import clause, shortened
from .dry_run import DryRun, Inputs, full_weight
from .report import BalanceRow, LossRow

Gradient = list[Tensor | None]
TASK = "task"
SCALE = 1024.0  # keeps small float16 gradients, as the training's gradient scaler does


class Measured:
    """Values, gradient norms and cosines of one loss, by batch."""

    def __init__(self, head: str | None):
        self.head = head
        self.values: list[float] = []
        self.norms: list[float] = []
        self.cosines: list[float] = []

    def add(self, value: float, gradient: Gradient, task: Gradient) -> None:
        self.values.append(value)
        self.norms.append(norm(gradient))
        scale = self.norms[-1] * norm(task)
        if scale > 0 and math.isfinite(scale):
            self.cosines.append(dot(gradient, task) / scale)

    def row(self, loss: str, task: "Measured", balanced: bool) -> LossRow:
        value, gradient = mean(self.values), mean(self.norms)
        cosine = mean(self.cosines) if self.cosines else None
        own, whole = (gradient, task.norms) if balanced else (value, task.values)
        return LossRow(loss, self.head, value, own / max(mean(whole), 1e-12), gradient, cosine)


def loss_table(dry_run: DryRun, batches: Sequence[Inputs]) -> tuple[list[LossRow], list[str]]:
    """Measure every loss on the batches, with every head at its full weight.

    Returns:
        rows: the task first, then the losses by head.
        errors: one sentence per loss or gradient that is not finite.

    Raises:
        NumericalError: the student's forward raised an error for a number that is not finite.
    """
    measured: dict[str, Measured] = {}
    errors: list[str] = []
    if dry_run.balance:
        for k, batch in enumerate(batches):
            follow(dry_run, dry_run.balance, batch, seed=k)
    for k, batch in enumerate(batches):
        losses = losses_of(dry_run, batch, seed=k)
        where = f"in batch {k + 1} ({file_names(batch)})"
        values = {name: x.item() for name, x in losses.items()}
        bad = {name: x for name, x in values.items() if not math.isfinite(x)}
        errors += [f"{name} is {x} {where}" for name, x in bad.items()]
        measure(losses, dry_run, measured)
        if not bad:
            wrong = [name for name, m in measured.items() if not math.isfinite(m.norms[-1])]
            errors += [f"the gradient of {name} is not finite {where}" for name in wrong]
    task, balanced = measured[TASK], dry_run.balance is not None
    advice = "check the images, MODEL.WEIGHTS and the head's WEIGHT"
    rows = [m.row(name, task, balanced) for name, m in measured.items()]
    return rows, [f"{error}; {advice}." for error in errors]


def follow(dry_run: DryRun, balance: GradientBalance, batch: Inputs, seed: int) -> None:
    """Let the balance follow one batch, as in a step of the training."""
    with full_weight(dry_run), balance.step():
        losses = losses_of(dry_run, batch, seed)
        (torch.stack(list(losses.values())).sum() * SCALE).backward()
    dry_run.optimizer.zero_grad()


def balance_rows(balance: GradientBalance) -> list[BalanceRow]:
    """Return the factor of each head's gradient at each tensor that it compares."""
    return [
        BalanceRow(head, place, balance.factor(place, head))
        for place, heads in balance.measured.items()
        for head in heads
    ]


def losses_of(dry_run: DryRun, batch: Inputs, seed: int) -> dict[str, Tensor]:
    """Return the named losses of one training forward with their graph.

    Raises:
        NumericalError, DistillError: the forward fails for this batch.
    """
    torch.manual_seed(seed)  # for the proposals that the student samples
    images = file_names(batch)
    with full_weight(dry_run), dry_run.autocast():
        try:
            return dry_run.model(batch)
        except DistillError:
            raise
        except FloatingPointError as e:  # by detectron2's own check
            raise NumericalError(
                f"The student's forward is not finite ({clause(e)}; images {images}); check "
                "MODEL.WEIGHTS and the images."
            ) from e
        except (AssertionError, KeyError, ValueError) as e:
            frame = traceback.extract_tb(e.__traceback__)[-1]
            where = f"{os.path.basename(frame.filename)}:{frame.lineno} `{frame.line}`"
            raise DistillError(
                f"The training step fails at {where} ({type(e).__name__} {clause(e)}; images "
                f"{images}); check that the data have the labels for MODEL.META_ARCHITECTURE."
            ) from e


def measure(losses: dict[str, Tensor], dry_run: DryRun, measured: dict[str, Measured]) -> None:
    """Add the value and the gradient of every loss of one batch to ``measured``."""
    parameters = [p for p in dry_run.student.parameters() if p.requires_grad]
    by_head: dict[str | None, dict[str, Tensor]] = {None: {}}
    for name, loss in losses.items():
        by_head.setdefault(head_of(name, list(dry_run.heads)), {})[name] = loss
    total = torch.stack(list(by_head.pop(None).values())).sum()
    task = gradient_of(total, parameters)
    measured.setdefault(TASK, Measured(None)).add(total.item(), task, task)
    for head, parts in by_head.items():
        name = f"loss_{str(head).lower()}"
        whole = measured.setdefault(name, Measured(head))  # the sum comes before its parts
        summed: Gradient = [None] * len(parameters)
        for part, loss in parts.items():
            own = gradient_of(loss, parameters)
            summed = [y if x is None else x if y is None else x + y for x, y in zip(summed, own)]
            if part != name:
                measured.setdefault(part, Measured(head)).add(loss.item(), own, task)
        whole.add(sum(x.item() for x in parts.values()), summed, task)


def loss_warnings(
    rows: Sequence[LossRow], heads: Mapping[str, DistillHead], balanced: bool = False
) -> list[str]:
    """Return warnings about losses that are out of bounds, one sentence each.

    A head is judged by the sum of its losses, because a single level may have nothing to compare.

    Args:
        balanced: the weights of the heads set themselves, so that no ratio is out of bounds.
    """
    warnings: list[str | None] = []
    for name, head in heads.items():
        own = next(row for row in rows if row.head == name)  # the sum comes first
        if head.weight == 0 or not math.isfinite(own.value):
            continue
        if own.value == 0 or own.gradient == 0:
            warnings.append(dead_warning(own.loss, "loss" if own.value == 0 else "gradient"))
        elif not balanced:
            warnings.append(ratio_warning(own.loss, own.ratio))
        if own.cosine is not None:
            warnings.append(cosine_warning(own.loss, own.cosine))
    return [sentence for sentence in warnings if sentence]


def gradient_of(loss: Tensor, parameters: Sequence[Tensor]) -> Gradient:
    """Return the gradient of a scalar by parameter; None if it does not depend on the parameter."""
    if not loss.requires_grad:
        return [None] * len(parameters)
    scaled = torch.autograd.grad(loss * SCALE, parameters, retain_graph=True, allow_unused=True)
    return [None if g is None else g.float() / SCALE for g in scaled]


def norm(x: Gradient) -> float:
    return math.sqrt(dot(x, x))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def file_names(batch: Inputs) -> str:
    return shortened([str(x.get("file_name", "unnamed")) for x in batch], 4)

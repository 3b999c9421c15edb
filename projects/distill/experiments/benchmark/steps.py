"""Seconds and memory of steps: the student alone, its teachers, and the distilled step."""

import functools
import statistics
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from detectron2.utils.events import get_event_storage
from torch import nn

from ...modeling.balance import balance_of
from ...utils.progress import Progress
from ...utils.timing import seconds, spread
from .memory import peak_mebibytes
from .networks import Networks, answers, said

ALL = "all"  # the row of all heads together


def step(
    model: nn.Module, inputs: list[Any], autocast: AbstractContextManager[Any] | None = None
) -> None:
    """Run the forward and the backward of a step.

    Args:
        autocast: context of the forward; None: none.
    """
    model.zero_grad(set_to_none=True)
    balance = balance_of(model)
    with balance.step() if balance is not None else nullcontext():
        with autocast or nullcontext():
            losses = model(inputs)
        sum(losses.values()).backward()


def measure_steps(
    networks: Networks, inputs: list[Any], repeats: int, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Return the costs of each head by itself, and of :data:`ALL` heads together, by name.

    The parts of a round take turns, so that they share the machine's slow moments. A row has

    - ``plain``, ``teacher`` and ``distilled``: the :func:`~distill.utils.timing.spread` of seconds,
    - ``ratio``: that of distilled / (plain + teacher) of the rounds,
    - ``plain_mib`` and ``distilled_mib``: MiB at the peak of a step,
    - with a balance, ``balanced``: seconds of the distilled step with it, and ``overhead``,
      balanced / distilled. They are means, because terms are measured in every tenth step only.

    Args:
        repeats: rounds, after one that warms up.
    """
    sets = {name: [name] for name in networks.heads}
    if len(sets) > 1:
        sets[ALL] = list(networks.heads)
    models = {key: networks.model(names) for key, names in sets.items()}
    balanced = {key: networks.model(names, balanced=True) for key, names in sets.items()}
    balanced = {key: model for key, model in balanced.items() if model.balance is not None}
    cuda = networks.cfg.MODEL.DEVICE.startswith("cuda")

    def time(function: Any, *args: Any) -> float:
        return seconds(functools.partial(function, *args), cuda)

    def peak(model: nn.Module) -> float:
        model.zero_grad(set_to_none=True)
        return peak_mebibytes(functools.partial(step, model, inputs), cuda)

    plain_mib = peak(networks.student)
    peaks = {key: peak(model) for key, model in models.items()}
    recorded = {key: said(model, inputs) for key, model in models.items()}
    plain: list[float] = []
    asked: dict[str, list[float]] = {key: [] for key in models}
    distilled: dict[str, list[float]] = {key: [] for key in models}
    scaled: dict[str, list[float]] = {key: [] for key in balanced}
    for _ in progress.track(range(repeats + 1), description="steps"):
        get_event_storage().step()
        plain.append(time(step, networks.student, inputs))
        for key, model in models.items():
            asked[key].append(time(answers, model, recorded[key]))
            distilled[key].append(time(step, model, inputs))
            if key in balanced:
                scaled[key].append(time(step, balanced[key], inputs))
    rows = {key: _row(plain[1:], asked[key][1:], distilled[key][1:]) for key in models}
    for key, row in rows.items():
        row |= {"plain_mib": plain_mib, "distilled_mib": peaks[key]}
    for key, times in scaled.items():
        mean = statistics.fmean(times[1:])
        rows[key] |= {"balanced": mean, "overhead": mean / statistics.fmean(distilled[key][1:])}
    return rows


def _row(
    plain: list[float], teacher: list[float], distilled: list[float]
) -> dict[str, dict[str, float] | float]:
    """Return the spreads of the seconds of each round, and of their ratio."""
    return {
        "plain": spread(plain),
        "teacher": spread(teacher),
        "distilled": spread(distilled),
        "ratio": spread([d / (p + t) for p, t, d in zip(plain, teacher, distilled)]),
    }

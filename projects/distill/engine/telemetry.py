"""Measurements of a training other than its losses."""

import json
import math
import os
from collections.abc import Mapping, Sequence

import torch
from detectron2.utils.events import JSONWriter, get_event_storage
from torch import Tensor

from ..heads.base import head_of
from ..utils.io import replacing
from ..utils.old_names import LOSSES, log_old_names, renamed

Gradient = Sequence[Tensor | None]
"""Gradients by parameter; None if the loss does not depend on the parameter."""


def drop_torn_row(path: str) -> None:
    """Cut a ``metrics.json`` after its last complete row: a full disk may leave half of a row."""
    if os.path.isfile(path):
        with open(path, "rb+") as f:
            f.truncate(f.read().rfind(b"\n") + 1)


def take_new(scalars: Mapping[str, tuple[float, int]], written: dict[str, int]) -> dict[str, int]:
    """Return the iterations of the scalars that are new, and note them as written.

    Args:
        scalars: latest value and iteration of each scalar.
        written: last iteration of each scalar that has been written; changed in place.
    """
    latest = {name: iteration for name, (_, iteration) in scalars.items()}
    new = {
        name: iteration for name, iteration in latest.items() if iteration > written.get(name, -1)
    }
    written |= new
    return new


class RowWriter(JSONWriter):
    """detectron2's writer of ``metrics.json``, which may write an iteration twice.

    detectron2's own would lose the scalars that come after the row of their iteration, such as
    those of an evaluation after the final checkpoint. Here the second row has all of them.
    """

    def __init__(self, path: str):
        super().__init__(path)
        self._written: dict[str, int] = {}  # last iteration of each scalar

    def write(self) -> None:
        scalars = get_event_storage().latest_with_smoothing_hint(self._window_size)
        new = take_new(scalars, self._written)
        for iteration in sorted(set(new.values())):
            row = {name: value for name, (value, at) in scalars.items() if at == iteration}
            text = json.dumps({**row, "iteration": iteration}, sort_keys=True)
            self._file_handle.write(f"{text}\n")
        self._file_handle.flush()
        os.fsync(self._file_handle.fileno())


def add_row(path: str, iteration: int, scalars: Mapping[str, float]) -> None:
    """Add a row to a ``metrics.json`` unless it has the scalars of this iteration."""
    rows: list[dict[str, float]] = []
    if os.path.isfile(path):
        drop_torn_row(path)
        with open(path) as f:
            rows = [json.loads(line) for line in f]
    same = [row for row in rows if row["iteration"] == iteration]
    if not any(scalars.keys() <= row.keys() for row in same):
        row = {**(same[-1] if same else {"iteration": iteration}), **scalars}
        with open(path, "a") as f:
            f.write(json.dumps(row, sort_keys=True) + "\n")


def rename_losses(path: str) -> None:
    """Rename losses of an earlier version in a ``metrics.json``, for one name per loss in a run."""
    if os.path.isfile(path):
        with open(path) as f:
            text = f.read()
        log_old_names([text], LOSSES, f"'{path}'")
        if (new := renamed(text, LOSSES)) != text:
            with replacing(path) as f:
                f.write(new.encode())


def gradient_cosines(
    losses: dict[str, Tensor], heads: Sequence[str], parameters: Sequence[Tensor]
) -> dict[str, float]:
    """Return the cosine in [-1, 1] between the gradients of each head and of the task.

    A negative cosine means that the head pulls against the task. The graph of the losses stays
    usable.

    Args:
        losses: named losses with their graph.
        heads: names of the heads.
        parameters: parameters of the student.

    Returns:
        Cosines by the name ``kd_cosine/<head>``. A cosine is 0 if one of its gradients is 0. It is
        left out if one of them is not finite.
    """
    sums: dict[str | None, Tensor] = {}
    for name, loss in losses.items():
        head = head_of(name, heads)
        sums[head] = sums[head] + loss if head in sums else loss
    if None not in sums:
        return {}
    task = _gradient(sums.pop(None), parameters)
    cosines = {}
    for head, loss in sums.items():
        own = _gradient(loss, parameters)
        scale = math.sqrt(dot(own, own) * dot(task, task))
        if math.isfinite(scale):
            cosines[f"kd_cosine/{str(head).lower()}"] = dot(own, task) / scale if scale else 0.0
    return cosines


def _gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Gradient:
    if not loss.requires_grad:
        return [None] * len(parameters)
    return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)


def dot(a: Gradient, b: Gradient) -> float:
    """Return the inner product in float64, in which squares of float32 numbers do not overflow."""
    products = [
        (x.double() * y.double()).sum() for x, y in zip(a, b) if x is not None and y is not None
    ]
    return torch.stack(products).sum().item() if products else 0.0

"""Detection of training steps that are not finite, before they change a weight.

A step is not finite if a loss or a gradient has infinite or NaN values. The guard names the loss or
weight, and saves the step for a replay.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.structures import (
    BitMasks,
    Boxes,
    Instances,
    Keypoints,
    PolygonMasks,
    RotatedBoxes,
)
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ..checkpoint.save import StudentState, write_checked
from ..errors import NumericalError
from ..modeling.balance import balance_of
from ..modeling.quantization import PART, Quantization
from ..utils.text import shortened

logger = logging.getLogger(__name__)

Losses = Mapping[str, Tensor]


@runtime_checkable
class Undoable(Protocol):
    """Module that undoes its own last step, because its buffers are too large to copy."""

    def mark(self) -> None: ...

    def undo(self) -> None: ...


class FiniteGuard:
    """Allow only finite steps to change the weights.

    Every process takes the same decision. If a step is not allowed, the model is restored to the
    state before it, including running statistics.

    Args:
        cfg: config with ``SOLVER.ON_NONFINITE``, ``SOLVER.MAX_SKIPS`` and ``OUTPUT_DIR``.
        model: model to train, with student and heads.
        student: student of that model, which may have state outside its buffers.
        seed: seed of the run, for the reproducer.
        quantization: that of the student, for the reproducer.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        student: nn.Module,
        seed: int,
        quantization: Quantization | None = None,
    ):
        self.cfg = cfg
        self.model = model
        self.student = student
        self.seed = seed
        self.quantization = quantization
        self.skips = 0
        self._state = StudentState(student)
        modules = list(model.modules())
        self._undoable = [x for x in modules if isinstance(x, Undoable)]
        self._copied = [x for x in modules if not isinstance(x, Undoable)]
        self._numbers: dict[str, float] = {}
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self._batch: list[dict[str, Any]] = []

    def before_step(self, batch: list[dict[str, Any]]) -> None:
        """Keep a copy of the state that the forward may change."""
        self._batch = batch
        self._numbers = self._state.state_dict()
        for module in self._undoable:
            module.mark()
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in self._copied
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def allows(
        self, losses: Losses, scaler: torch.amp.GradScaler, repeat_forward: Callable[[], Losses]
    ) -> bool:
        """Return True if this step may change the weights; waits for the device.

        Args:
            losses: losses of this process by name.
            scaler: scaler that has unscaled the gradients. While it scales, it handles gradients
                that overflow float16, and only the losses are checked here.
            repeat_forward: computes the losses again, to find the one whose gradient is not
                finite. It is called in all processes or in no process.

        Raises:
            NumericalError: the step is not finite, and the config says stop or too many steps were
                skipped.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        values = torch.stack([x.detach().float() for x in losses.values()])
        norm, finite = get_total_norm(gradients), values.isfinite().all()
        judged = scaler.get_scale() <= 1  # 1: it is disabled
        # Squares of finite gradients may overflow. Their maximum does not, but it is slower.
        if _in_all_processes(finite & norm.isfinite() if judged else finite) or (
            judged and _in_all_processes(finite & get_total_norm(gradients, math.inf).isfinite())
        ):
            if math.isfinite(norm):
                get_event_storage().put_scalar("grad_norm", float(norm))
            return True
        self._reject(dict(zip(losses, values.tolist())), repeat_forward)
        return False

    def failed(self, error: Exception) -> None:
        """Handle an error of detectron2's own check in the forward of this process.

        Args:
            error: error that :func:`says_nonfinite` accepts.

        Raises:
            NumericalError: as in :meth:`allows`; always with several processes, since the others
                are waiting for the gradients of this one.
        """
        self._restore()
        what = " ".join(str(error).split()).rstrip(".!")
        self._decide([self._finding(what, {})], only_here=comm.get_world_size() > 1)

    @torch.no_grad()
    def _restore(self) -> None:
        for module, name, buffer, content in self._buffers:
            setattr(module, name, buffer.copy_(content))
        for module in self._undoable:
            module.undo()
        self._state.load_state_dict(self._numbers)

    def _reject(self, losses: dict[str, float], repeat_forward: Callable[[], Losses]) -> None:
        self._restore()
        what = ", ".join(f"{k} is {v}" for k, v in losses.items() if not math.isfinite(v))
        if not any(comm.all_gather(bool(what))):
            what = _describe(bad_gradients(repeat_forward(), self.model))
            self._restore()
        if not any(comm.all_gather(bool(what))):  # only the sum or the mean over processes is bad
            bad = [k for k, p in self.model.named_parameters() if _is_bad(p.grad)]
            what = _describe({"the losses": bad})
        finding = self._finding(what, losses) if what else None
        for parameter in self.model.parameters():
            parameter.grad = None
        self._decide([x for x in comm.all_gather(finding) if x])

    def _finding(self, what: str, losses: dict[str, float]) -> tuple[str, str]:
        """Return a description of what this process found, and the path of its reproducer."""
        names = [str(x.get("file_name", "unnamed")) for x in self._batch]
        return f"{what} (images {shortened(names, 16)})", self._reproducer(what, losses)

    def _decide(self, findings: list[tuple[str, str]], only_here: bool = False) -> None:
        """Log the skipped step, or raise a NumericalError.

        Args:
            findings: findings of all processes.
            only_here: the other processes do not know of the error.
        """
        text = "; ".join(what for what, _ in findings)
        text = f"Iteration {get_event_storage().iter}: {text}; no weight was changed"
        if file := next((file for _, file in findings if file), ""):
            text += f"; `distill replay {file}` repeats the step"
        self.skips += 1
        most = self.cfg.SOLVER.MAX_SKIPS
        if self.cfg.SOLVER.ON_NONFINITE != "skip":
            advice = "lower SOLVER.BASE_LR or the head's WEIGHT, or set SOLVER.ON_NONFINITE skip"
        elif only_here:
            advice = (
                "the step cannot be skipped, because the other processes wait for its gradients; "
                "lower SOLVER.BASE_LR"
            )
        elif self.skips > most:
            advice = (
                f"{most} steps were skipped before, as many as SOLVER.MAX_SKIPS allows; lower "
                "SOLVER.BASE_LR"
            )
        else:
            logger.warning("%s. Skipped, %d so far.", text, self.skips)
            return
        raise NumericalError(f"{text}; {advice}.")

    def _reproducer(self, what: str, losses: dict[str, float]) -> str:
        """Save the step for a replay, and return the path, or "" if it cannot be written."""
        iteration, rank = get_event_storage().iter, comm.get_rank()
        folder = os.path.join(self.cfg.OUTPUT_DIR, "nonfinite")
        balance = balance_of(self.model)
        path = os.path.join(folder, f"iteration_{iteration:07d}_rank_{rank}.pth")
        saved = {
            "what": what,
            "losses": losses,
            "config": self.cfg.dump(),
            "seed": self.seed,
            "iteration": iteration,
            "rank": rank,
            "model": self.model.state_dict(),
            "student_state": self._numbers,
            "balance": balance.state_dict() if balance else {},
            "batch": to_plain(self._batch),
        }
        if self.quantization is not None:
            saved[PART] = self.quantization.state_dict()
        try:
            os.makedirs(folder, exist_ok=True)
            write_checked(path, saved)
        except (OSError, RuntimeError) as e:  # torch's writer raises a RuntimeError
            logger.warning("There is no reproducer: %s cannot be written: %s", path, e)
            return ""
        return path


def says_nonfinite(error: Exception) -> bool:
    """Return True for an error of detectron2's own checks for numbers that are not finite."""
    if isinstance(error, AssertionError):
        return "NaN" in str(error)
    return isinstance(error, FloatingPointError)


def bad_gradients(losses: Losses, model: nn.Module) -> dict[str, list[str]]:
    """Find the weights in which the gradient of a loss is not finite.

    Args:
        losses: named losses with their graph, which stays usable.

    Returns:
        Names of the weights in the order of the backward, by name of the loss. Losses whose
        gradients are finite are left out.
    """
    found: dict[str, list[str]] = {}
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for loss, value in losses.items():
        bad: list[str] = []

        def watch(gradient: Tensor, name: str, bad: list[str] = bad) -> None:
            if _is_bad(gradient):
                bad.append(name)

        handles = [p.register_hook(partial(watch, name=name)) for name, p in names.items()]
        if value.requires_grad:
            parameters = list(names.values())
            torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        for handle in handles:
            handle.remove()
        if bad:
            found[loss] = bad
    return found


def _is_bad(gradient: Tensor | None) -> bool:
    return gradient is not None and not bool(gradient.isfinite().all())


def _in_all_processes(condition: Tensor) -> bool:
    """Return True if ``condition`` holds in all processes; waits for the device."""
    failed = (~condition).float()
    if comm.get_world_size() > 1:
        dist.all_reduce(failed, dist.ReduceOp.MAX)
    return not failed


def _describe(found: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(
        f"the gradient of {loss} in {shortened(weights, 1)} is not finite"
        for loss, weights in found.items()
    )


_TENSORS = {kind.__name__: kind for kind in (Boxes, RotatedBoxes, BitMasks, Keypoints)}


def to_plain(value: Any) -> Any:
    """Convert a batch to tensors and plain types for ``torch.load(..., weights_only=True)``.

    Values of unknown types become text.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
    if isinstance(value, Instances):
        fields = {k: to_plain(v) for k, v in value.get_fields().items()}
        return {"is": "Instances", "size": list(value.image_size), "fields": fields}
    if isinstance(value, PolygonMasks):
        return {"is": "PolygonMasks", "polygons": to_plain(value.polygons)}
    if type(value).__name__ in _TENSORS:
        return {"is": type(value).__name__, "tensor": to_plain(value.tensor)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(x) for x in value]
    for plain in (bool, int, float):  # their subclasses, such as IntEnum, are not plain
        if isinstance(value, plain):
            return plain(value)
    return None if value is None else str(value)


def from_plain(value: Any) -> Any:
    """Invert :func:`to_plain`, except that tuples stay lists and arrays stay tensors."""
    if isinstance(value, list):
        return [from_plain(x) for x in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("is")
    if kind == "Instances":
        fields = {k: from_plain(v) for k, v in value["fields"].items()}
        return Instances(tuple(value["size"]), **fields)
    if kind == "PolygonMasks":
        return PolygonMasks([[p.numpy() for p in ps] for ps in value["polygons"]])
    if kind in _TENSORS:
        return _TENSORS[kind](value["tensor"])
    return {k: from_plain(v) for k, v in value.items()}

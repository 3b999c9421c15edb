"""Steps that are not finite: found before they change a weight, named, and saved for a replay."""

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

logger = logging.getLogger(__name__)

Losses = Mapping[str, Tensor]


@runtime_checkable
class Undoable(Protocol):
    """A module whose buffers are too large for a copy at every step."""

    def mark(self) -> None: ...

    def undo(self) -> None: ...


class FiniteGuard:
    """Lets only finite steps change the weights.

    Every process takes the same decision. A step that is not allowed leaves no trace in the model:
    running statistics are put back as they were before it.

    Args:
        cfg: the run's; ``SOLVER.ON_NONFINITE``, ``SOLVER.MAX_SKIPS`` and ``OUTPUT_DIR`` are read.
        model: what trains, student and heads.
        student: of that model; keeps numbers outside of its buffers.
        seed: of the run, for the reproducer.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, student: nn.Module, seed: int):
        self.cfg = cfg
        self.model = model
        self.student = student
        self.seed = seed
        self.skips = 0
        self._state = StudentState(student)
        modules = list(model.modules())
        self._undoable = [x for x in modules if isinstance(x, Undoable)]
        self._copied = [x for x in modules if not isinstance(x, Undoable)]
        self._numbers: dict[str, float] = {}
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self._batch: list[dict[str, Any]] = []

    def before_step(self, batch: list[dict[str, Any]]) -> None:
        """Remember what the forward may change."""
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
        self, losses: Losses, scaler: torch.amp.GradScaler, again: Callable[[], Losses]
    ) -> bool:
        """Whether this step may change the weights; waits for the device.

        Args:
            losses: of this process, by name.
            scaler: has unscaled the gradients. Gradients that overflow float16 while it still
                scales them are its own to handle, not a fault.
            again: repeats the forward, to find the loss of a gradient that is not finite. It
                happens in all processes or in none.

        Raises:
            NumericalError: the step is not finite, and the config says stop or too many steps were
                skipped.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        values = torch.stack([x.detach().float() for x in losses.values()])
        norm, finite = get_total_norm(gradients), values.isfinite().all()
        judged = scaler.get_scale() <= 1  # 1: it is disabled
        # The squares of finite gradients may overflow; their maximum, which is slower, does not.
        if _everywhere(finite & norm.isfinite() if judged else finite) or (
            judged and _everywhere(finite & get_total_norm(gradients, math.inf).isfinite())
        ):
            if math.isfinite(norm):
                get_event_storage().put_scalar("grad_norm", float(norm))
            return True
        self._refuse(dict(zip(losses, values.tolist())), again)
        return False

    def failed(self, error: Exception) -> None:
        """The forward itself found a number that is not finite, in this process alone.

        Args:
            error: of which :func:`says_nonfinite` is true.

        Raises:
            NumericalError: as in :meth:`allows`; always with several processes, since the others
                are waiting for this one's gradients.
        """
        self._restore()
        what = " ".join(str(error).split()).rstrip(".!")
        self._decide([self._found(what, {})], alone=comm.get_world_size() > 1)

    @torch.no_grad()
    def _restore(self) -> None:
        for module, name, buffer, content in self._buffers:
            setattr(module, name, buffer.copy_(content))
        for module in self._undoable:
            module.undo()
        self._state.load_state_dict(self._numbers)

    def _refuse(self, losses: dict[str, float], again: Callable[[], Losses]) -> None:
        self._restore()
        what = ", ".join(f"{k} is {v}" for k, v in losses.items() if not math.isfinite(v))
        if not any(comm.all_gather(bool(what))):
            what = _blamed(bad_gradients(again(), self.model))
            self._restore()
        if not any(comm.all_gather(bool(what))):  # only their sum, or mean over the processes, is
            bad = [k for k, p in self.model.named_parameters() if _is_bad(p.grad)]
            what = _blamed({"the losses": bad})
        mine = self._found(what, losses) if what else None
        for parameter in self.model.parameters():
            parameter.grad = None
        self._decide([x for x in comm.all_gather(mine) if x])

    def _found(self, what: str, losses: dict[str, float]) -> tuple[str, str]:
        """What this process has to say, and its reproducer."""
        names = [str(x.get("file_name", "unnamed")) for x in self._batch]
        return f"{what} (pictures {_shortened(names, 16)})", self._reproducer(what, losses)

    def _decide(self, found: list[tuple[str, str]], alone: bool = False) -> None:
        """Count and log, or raise.

        Args:
            found: by the processes that have found something.
            alone: the other processes do not know of it.
        """
        text = "; ".join(what for what, _ in found)
        text = f"Iteration {get_event_storage().iter}: {text}; no weight was changed"
        if file := next((file for _, file in found if file), ""):
            text += f"; `distill replay {file}` repeats the step"
        self.skips += 1
        most = self.cfg.SOLVER.MAX_SKIPS
        if self.cfg.SOLVER.ON_NONFINITE != "skip":
            advice = "lower SOLVER.BASE_LR or the head's WEIGHT, or set SOLVER.ON_NONFINITE skip"
        elif alone:
            advice = "it cannot be skipped, as the other processes wait; lower SOLVER.BASE_LR"
        elif self.skips > most:
            advice = f"{most} steps were skipped, as many as SOLVER.MAX_SKIPS allows"
        else:
            logger.warning("%s. Skipped, %d so far.", text, self.skips)
            return
        raise NumericalError(f"{text}; {advice}.")

    def _reproducer(self, what: str, losses: dict[str, float]) -> str:
        """Save what repeats the step; returns the file, or "" if it cannot be written."""
        iteration, rank = get_event_storage().iter, comm.get_rank()
        folder = os.path.join(self.cfg.OUTPUT_DIR, "nonfinite")
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
            "batch": to_plain(self._batch),
        }
        try:
            os.makedirs(folder, exist_ok=True)
            write_checked(path, saved)
        except (OSError, RuntimeError) as e:  # torch's own writer raises the latter
            logger.warning("Without a reproducer, for %s cannot be written: %s", path, e)
            return ""
        return path


def says_nonfinite(error: Exception) -> bool:
    """Whether an error is that of detectron2's own checks for numbers that are not finite."""
    if isinstance(error, AssertionError):
        return "NaN" in str(error)
    return isinstance(error, FloatingPointError)


def bad_gradients(losses: Losses, model: nn.Module) -> dict[str, list[str]]:
    """The weights in which the gradient of a loss is not finite, in the order of its backward.

    Args:
        losses: named losses with their graph, which stays usable.

    Returns:
        Names of weights by name of the loss, of those losses alone that have some.
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


def _everywhere(condition: Tensor) -> bool:
    """Whether it holds in all processes; waits for the device."""
    failed = (~condition).float()
    if comm.get_world_size() > 1:
        dist.all_reduce(failed, dist.ReduceOp.MAX)
    return not failed


def _blamed(found: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(
        f"the gradient of {loss} in {_shortened(weights, 1)} is not finite"
        for loss, weights in found.items()
    )


def _shortened(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


_TENSORS = {kind.__name__: kind for kind in (Boxes, RotatedBoxes, BitMasks, Keypoints)}


def to_plain(value: Any) -> Any:
    """A batch as tensors and plain types, which ``torch.load(..., weights_only=True)`` reads.

    What it does not know becomes text.
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
    for plain in (bool, int, float):  # an IntEnum, say, is an int of a type of its own
        if isinstance(value, plain):
            return plain(value)
    return None if value is None else str(value)


def from_plain(value: Any) -> Any:
    """The inverse of :func:`to_plain`; lists stand for tuples, tensors for arrays."""
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

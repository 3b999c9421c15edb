"""Training step."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..heads.base import StepGenerator
from ..modeling.balance import balance_of
from ..modeling.unlabeled import Unlabeled, is_unlabeled, unlabeled_of
from ..utils.seeding import derived_seed, seed_globally
from .nonfinite import FiniteGuard, says_nonfinite
from .telemetry import gradient_cosines


@dataclass(frozen=True)
class Piece:
    """Images that a model computes at once: all labelled, or all unlabelled.

    Attributes:
        images: entries of ``batched_inputs``.
        number: number of the piece, which determines its random numbers.
        share: returns the share of these images in a loss, by its name; None: all of it.
    """

    images: Sequence[Any]
    number: int
    share: Callable[[str], float] | None = None

    def weighted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses of the images, multiplied by their shares."""
        if self.share is None:
            return losses
        return {name: x * self.share(name) for name, x in losses.items()}


class TrainLoop(SimpleTrainer):
    """``SimpleTrainer`` that is seeded by iteration and has mixed precision on every device.

    Mixed precision is float16 with a gradient scaler on CUDA, and bfloat16 without one on CPUs;
    detectron2's ``AMPTrainer`` requires CUDA. A step that is not finite changes no weight.

    Unlabelled images of a batch have a forward and a backward of their own in the same step.

    Args:
        seed: seed of the run. Seed and iteration determine all random numbers of a step.
        guard: decides about steps that are not finite.
        heads: names of the distillation heads.
        cosine_period: iterations between two logs of the heads' gradient cosines; 0: never.
        accumulate: number of parts of a batch, which are computed one after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        optimizer: Any,
        *,
        amp: bool,
        device: str,
        seed: int,
        guard: FiniteGuard,
        heads: Sequence[str] = (),
        cosine_period: int = 0,
        accumulate: int = 1,
    ):
        super().__init__(model, loader, optimizer)
        self.autocast = lambda: forward_context(device, amp)
        self.scaler = torch.amp.GradScaler(enabled=amp and device.startswith("cuda"))
        self.seed = seed
        self.guard = guard
        self.heads = heads
        self.cosine_period = cosine_period
        self.accumulate = accumulate
        self.balance = balance_of(guard.model)
        self.unlabeled = unlabeled_of(guard.model)

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.guard.before_step(data)
        if self.balance is not None:
            self.balance.before_step()
        parts = pieces(data, self.accumulate, self.unlabeled)
        self.optimizer.zero_grad()
        try:
            losses = mean_losses(self._backward(parts), self.accumulate)
        except Exception as e:
            if not says_nonfinite(e):
                raise
            return self.guard.failed(e)
        self.after_backward()
        self.scaler.unscale_(self.optimizer)  # detectron2 clips inside the optimizer's step
        if self.guard.allows(losses, self.scaler, partial(self._repeated, parts)):
            self._write_metrics(losses, data_time)
            if self.balance is not None:
                scalars = self.balance.after_step()
                get_event_storage().put_scalars(**scalars, smoothing_hint=True)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.scaler.update(self.scaler.get_scale())  # keep the scale

    def close(self) -> None:
        """End the data workers.

        If the garbage collector does it, each worker takes 5 s to end. It may delete the queues of
        the workers first, and then the workers cannot be told to stop.
        """
        self._data_loader_iter_obj = None

    def _backward(self, parts: Sequence[Piece]) -> Iterator[dict[str, Tensor]]:
        """Add the gradients of each piece of the batch, and yield its losses.

        Processes exchange their gradients once, in the backward of the last piece.
        """
        for piece in parts:
            alone = isinstance(self.model, DistributedDataParallel) and piece is not parts[-1]
            with self.model.no_sync() if alone else nullcontext():
                losses = self._forward(piece, self.model)
                if piece.number == 0:
                    self._write_cosines(losses)
                total: Any = sum(losses.values())
                with self.balance.measure() if self.balance is not None else nullcontext():
                    self.scaler.scale(total / self.accumulate).backward()
            yield {name: x.detach() for name, x in losses.items()}

    def _repeated(self, parts: Sequence[Piece]) -> dict[str, Tensor]:
        """Return the losses of this iteration once more, with their graph."""
        found = (self._forward(piece, self.guard.model) for piece in parts)
        return mean_losses(found, self.accumulate)

    def _forward(self, piece: Piece, model: nn.Module) -> dict[str, Tensor]:
        """Return the weighted losses of a piece of a batch, which are the same at every call.

        Args:
            model: model to train, with or without DistributedDataParallel around it.
        """
        seed_step(model, self.seed, self.iter, part=piece.number)
        with self.autocast():
            losses: dict[str, Tensor] = model(piece.images)
        return piece.weighted(losses)

    def _write_cosines(self, losses: dict[str, Tensor]) -> None:
        if self.heads and self.cosine_period and self.iter % self.cosine_period == 0:
            scaled = {name: self.scaler.scale(loss) for name, loss in losses.items()}
            parameters = [p for p in self.guard.student.parameters() if p.requires_grad]
            cosines = gradient_cosines(scaled, self.heads, parameters)
            get_event_storage().put_scalars(**cosines, smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        ours = {"grad_scaler": self.scaler.state_dict(), "skips": self.guard.skips}
        return {**super().state_dict(), **ours}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved, own = state_dict["optimizer"], self.optimizer.state_dict()["param_groups"]
        # The groups have the values of this training's config. Schedules change the learning rate.
        groups = [{**new, "lr": old["lr"]} for new, old in zip(own, saved["param_groups"])]
        optimizer = {**saved, "param_groups": groups}
        super().load_state_dict({**state_dict, "optimizer": optimizer})
        if state_dict.get("grad_scaler"):  # absent if the saved run did not scale
            self.scaler.load_state_dict(state_dict["grad_scaler"])
        self.guard.skips = state_dict.get("skips", 0)


def repeatable(device: str) -> AbstractContextManager[None]:
    """Turn off TorchScript's optimisation at run time, so that all calls give the same result.

    With it, the first calls of a scripted function in a process differ from later ones.
    detectron2's focal loss is such a function. On CUDA its speed is worth more, unless
    deterministic algorithms are asked for.
    """
    exact = not device.startswith("cuda") or torch.are_deterministic_algorithms_enabled()
    return torch.jit.optimized_execution(not exact)


@contextmanager
def forward_context(device: str, amp: bool) -> Iterator[None]:
    """Open the context of a forward: mixed precision if ``amp``, and :func:`repeatable`."""
    dtype = torch.float16 if device.startswith("cuda") else torch.bfloat16
    with torch.autocast(device.split(":")[0], dtype, enabled=amp), repeatable(device):
        yield


def seed_step(
    model: nn.Module, seed: int, iteration: int, rank: int | None = None, part: int = 0
) -> None:
    """Seed all random numbers of a step by the run's seed, the iteration and the process.

    Args:
        rank: rank of the process; None: of this process.
        part: number of the piece of the batch.
    """
    step = (seed, iteration, comm.get_rank() if rank is None else rank)
    later = (part,) if part else ()
    seed_globally(*step, 0, *later)  # four numbers at least, since three are the seed of a sample
    for k, module in enumerate((m for m in model.modules() if isinstance(m, StepGenerator)), 1):
        module.reseed(derived_seed(*step, k, *later))


def pieces(batch: Sequence[Any], parts: int, unlabeled: Unlabeled | None) -> list[Piece]:
    """Split a batch into parts of the same size, and each part by its labels.

    The labelled images of a part come last: their backward reaches every parameter, which
    DistributedDataParallel needs where processes exchange gradients. Their random numbers are
    those of a training without unlabelled images.

    Args:
        batch: labelled and unlabelled images.
        parts: ``SOLVER.ACCUMULATE``.
        unlabeled: that of the model; None if it has no unlabelled images.
    """
    if unlabeled is None or not any(map(is_unlabeled, batch)):
        return [Piece(images, k) for k, images in enumerate(micro_batches(batch, parts))]
    labeled = micro_batches([x for x in batch if not is_unlabeled(x)], parts)
    others = micro_batches([x for x in batch if is_unlabeled(x)], parts)
    numbers = len(labeled[0]), len(others[0])
    found = []
    for k, (own, other) in enumerate(zip(labeled, others)):
        found.append(Piece(other, parts + k, lambda loss: unlabeled.share(loss, *numbers)))
        found.append(Piece(own, k, lambda loss: 1 - unlabeled.share(loss, *numbers)))
    return found


def micro_batches(batch: Sequence[Any], number: int) -> list[Sequence[Any]]:
    """Split a batch into ``number`` parts of the same size."""
    size = len(batch) // number
    return [batch[k * size : (k + 1) * size] for k in range(number)]


def mean_losses(parts: Iterable[dict[str, Tensor]], number: int | None = None) -> dict[str, Tensor]:
    """Return the mean of each loss over the parts of a batch.

    Args:
        parts: losses of each piece of the batch, multiplied by the piece's shares.
        number: number of parts if they have several pieces each; None: a piece is a part.
    """
    found = list(parts)
    if len(found) == 1:
        return found[0]
    names = dict.fromkeys(name for losses in found for name in losses)
    own = {name: torch.stack([x[name] for x in found if name in x]) for name in names}
    return {name: x.mean(0) * (len(x) / (number or len(found))) for name, x in own.items()}

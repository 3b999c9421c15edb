"""Training step."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from ..utils.seeding import derived_seed, seed_globally
from .nonfinite import FiniteGuard, says_nonfinite
from .telemetry import gradient_cosines


class TrainLoop(SimpleTrainer):
    """``SimpleTrainer`` that is seeded by iteration and has mixed precision on every device.

    Mixed precision is float16 with a gradient scaler on CUDA, and bfloat16 without one on CPUs;
    detectron2's ``AMPTrainer`` requires CUDA. A step that is not finite changes no weight.

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

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.guard.before_step(data)
        if self.balance is not None:
            self.balance.before_step()
        parts = micro_batches(data, self.accumulate)
        self.optimizer.zero_grad()
        try:
            losses = mean_losses(self._backward(parts))
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

    def _backward(self, parts: Sequence[Any]) -> Iterator[dict[str, Tensor]]:
        """Add the gradients of each part, and yield its losses.

        Processes exchange their gradients once, in the backward of the last part.
        """
        for k, part in enumerate(parts):
            last = k == len(parts) - 1
            alone = isinstance(self.model, DistributedDataParallel) and not last
            with self.model.no_sync() if alone else nullcontext():
                losses = self._forward(part, k, self.model)
                if k == 0:
                    self._write_cosines(losses)
                total: Any = sum(losses.values())
                with self.balance.measure() if self.balance is not None else nullcontext():
                    self.scaler.scale(total / len(parts)).backward()
            yield {name: x.detach() for name, x in losses.items()}

    def _repeated(self, parts: Sequence[Any]) -> dict[str, Tensor]:
        """Return the losses of this iteration once more, with their graph."""
        return mean_losses(self._forward(x, k, self.guard.model) for k, x in enumerate(parts))

    def _forward(self, data: Any, part: int, model: nn.Module) -> dict[str, Tensor]:
        """Return the losses of a part of a batch, which are the same at every call.

        Args:
            model: model to train, with or without DistributedDataParallel around it.
        """
        seed_step(model, self.seed, self.iter, part=part)
        with self.autocast():
            losses: dict[str, Tensor] = model(data)
        return losses

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
        part: number of the part of the batch.
    """
    step = (seed, iteration, comm.get_rank() if rank is None else rank)
    later = (part,) if part else ()
    seed_globally(*step, 0, *later)  # four numbers at least, since three are the seed of a sample
    for k, module in enumerate((m for m in model.modules() if isinstance(m, StepGenerator)), 1):
        module.reseed(derived_seed(*step, k, *later))


def micro_batches(batch: Sequence[Any], number: int) -> list[Sequence[Any]]:
    """Split a batch into ``number`` parts of the same size."""
    size = len(batch) // number
    return [batch[k * size : (k + 1) * size] for k in range(number)]


def mean_losses(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each loss over the parts of a batch."""
    found = list(parts)
    if len(found) == 1:
        return found[0]
    return {name: torch.stack([x[name] for x in found]).mean(0) for name in found[0]}

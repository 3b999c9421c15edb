"""The training step."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..heads.base import StepGenerator
from ..utils.seeding import derived_seed, seed_globally
from .nonfinite import FiniteGuard, says_nonfinite
from .telemetry import gradient_cosines


class TrainLoop(SimpleTrainer):
    """detectron2's training step, seeded by iteration, in mixed precision on every device.

    CUDA computes in float16 with a gradient scaler, the CPU in bfloat16 without one;
    detectron2's ``AMPTrainer`` insists on CUDA. A step that is not finite changes no weight.

    Args:
        seed: of the run; with the iteration it determines all random numbers of the step.
        guard: decides what happens to a step that is not finite.
        heads: names of the distillation heads.
        cosine_period: iterations between two logs of the heads' gradient cosines; 0: none.
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
    ):
        super().__init__(model, loader, optimizer)
        self.autocast = lambda: arithmetic(device, amp)
        self.scaler = torch.amp.GradScaler(enabled=amp and device.startswith("cuda"))
        self.seed = seed
        self.guard = guard
        self.heads = heads
        self.cosine_period = cosine_period

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.guard.before_step(data)
        forward = partial(self._forward, data)
        try:
            losses = forward(self.model)
        except Exception as e:
            if not says_nonfinite(e):
                raise
            return self.guard.failed(e)
        self._write_cosines(losses)
        self.optimizer.zero_grad()
        total: Any = sum(losses.values())
        self.scaler.scale(total).backward()
        self.after_backward()
        self.scaler.unscale_(self.optimizer)  # detectron2 clips inside the optimizer's step
        if self.guard.allows(losses, self.scaler, partial(forward, self.guard.model)):
            self._write_metrics(losses, data_time)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.scaler.update(self.scaler.get_scale())  # as it is

    def close(self) -> None:
        """End the data workers.

        Left to the garbage collector, which breaks the cycle of trainer and hooks at the queues,
        their end takes 5 s each: nobody can tell them any more.
        """
        self._data_loader_iter_obj = None

    def _forward(self, data: Any, model: nn.Module) -> dict[str, Tensor]:
        """The losses of this iteration; every time the same.

        Args:
            model: to train, or what is inside of DistributedDataParallel.
        """
        seed_step(model, self.seed, self.iter)
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
        super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler"):  # none if the saved run did not scale
            self.scaler.load_state_dict(state_dict["grad_scaler"])
        self.guard.skips = state_dict.get("skips", 0)


def repeatable(device: str) -> AbstractContextManager[None]:
    """Keep TorchScript from optimising while it runs, where results should not depend on the past.

    Its executor computes the first calls in a process otherwise than later ones, and detectron2's
    focal loss is such a function. On CUDA its fusion is worth more, unless asked for determinism.
    """
    exact = not device.startswith("cuda") or torch.are_deterministic_algorithms_enabled()
    return torch.jit.optimized_execution(not exact)


@contextmanager
def arithmetic(device: str, amp: bool) -> Iterator[None]:
    """The context of a forward: in mixed precision or not, and :func:`repeatable`."""
    dtype = torch.float16 if device.startswith("cuda") else torch.bfloat16
    with torch.autocast(device.split(":")[0], dtype, enabled=amp), repeatable(device):
        yield


def seed_step(model: nn.Module, seed: int, iteration: int, rank: int | None = None) -> None:
    """Make all randomness of a step a function of the run's seed, the iteration and the process.

    Args:
        rank: of the process; None: this one's.
    """
    place = (seed, iteration, comm.get_rank() if rank is None else rank)
    seed_globally(*place, 0)  # four numbers: three are the place of a sample
    for k, module in enumerate((m for m in model.modules() if isinstance(m, StepGenerator)), 1):
        module.reseed(derived_seed(*place, k))

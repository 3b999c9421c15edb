"""A moving average of the student's weights, which is what is evaluated and kept."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn


class EMAHook(HookBase):
    """Exponential moving average of a network's parameters and floating-point buffers.

    After step t (from 1 on) average ← d·average + (1 − d)·weights, with d = ``decay`` ·
    (1 − exp(−t / ``warmup_iters``)). Within :meth:`applied` the network has the averaged weights,
    and this object keeps the trained ones; so in a checkpoint ``model`` is the average, and the
    state of this object the weights that training goes on with.

    Args:
        model: the student.
        decay: in (0, 1).
        warmup_iters: time constant of the rise of d from 0, in iterations.
    """

    def __init__(self, model: nn.Module, decay: float, warmup_iters: int):
        self.model = model
        self.decay = decay
        self.warmup_iters = warmup_iters
        self.is_applied = False
        self.resumed = False
        self.kept: dict[str, Tensor] = {}
        self._keep_current()

    def _state(self) -> dict[str, Tensor]:
        """The tensors that are averaged, as they are in the network."""
        return {k: v for k, v in self.model.state_dict().items() if v.is_floating_point()}

    def _keep_current(self) -> None:
        self.kept = {name: x.clone() for name, x in self._state().items()}

    def before_train(self) -> None:
        if not self.resumed:
            self._keep_current()  # the weights have been loaded meanwhile

    @torch.no_grad()
    def after_step(self) -> None:
        done = self.trainer.iter + 1
        rise = -math.expm1(-done / self.warmup_iters) if self.warmup_iters else 1.0
        now = self._state()
        torch._foreach_lerp_(
            list(self.kept.values()), [now[name] for name in self.kept], 1 - self.decay * rise
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the network has the averaged weights."""
        self._swap()
        self.is_applied = True
        try:
            yield
        finally:
            self.is_applied = False
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, x in self._state().items():
            trained = x.clone()
            x.copy_(self.kept[name])
            self.kept[name].copy_(trained)

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights, while a checkpoint is written within :meth:`applied`."""
        assert self.is_applied, "checkpoints are written with the averaged weights in place"
        return dict(self.kept)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the network's weights as the average, and go on training with those of ``state``."""
        self._keep_current()
        for name, x in self._state().items():
            x.copy_(state[name])
        self.resumed = True

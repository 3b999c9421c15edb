"""Exponential moving average of the student's weights, which is evaluated and saved."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn

from ..checkpoint.compare import tensor_misfits


class EMAHook(HookBase):
    """Hook that averages a network's parameters and floating-point buffers exponentially.

    After step t = 1, 2, ...: average ← d·average + (1 − d)·weights, with d = ``decay`` ·
    (1 − exp(−t / ``warmup_iters``)).

    Within :meth:`applied`, the network has the averaged weights, and the hook keeps the trained
    ones. So ``model`` of a checkpoint is the average, and the state of the hook has the weights
    with which the training continues.

    Args:
        model: the student.
        decay: weight of the old average, in (0, 1).
        warmup_iters: time constant, in iterations, with which d rises from 0; 0: d is constant.
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
        """Return the averaged tensors of the network."""
        return {k: v for k, v in self.model.state_dict().items() if v.is_floating_point()}

    def _keep_current(self) -> None:
        self.kept = {name: x.clone() for name, x in self._state().items()}

    def before_train(self) -> None:
        if not self.resumed:
            self._keep_current()  # the weights were loaded after __init__

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
        """Give the network the averaged weights in this context."""
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
        """Return the trained weights; call it within :meth:`applied`, as every checkpoint does."""
        assert self.is_applied, "checkpoints are written with the averaged weights in place"
        return dict(self.kept)

    def misfits(self, state: dict[str, Any]) -> Iterator[str]:
        """Yield how the trained weights of a checkpoint differ from the network's tensors.

        Args:
            state: state of this hook in the checkpoint.
        """
        yield from tensor_misfits(state, self._state())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Use the network's weights as the average, and continue training with ``state``."""
        self._keep_current()
        for name, x in self._state().items():
            x.copy_(state[name])
        self.resumed = True

"""The training step."""

import time
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from torch import nn


class TrainLoop(SimpleTrainer):
    """detectron2's training step with automatic mixed precision on every device.

    CUDA computes in float16 with a gradient scaler, the CPU in bfloat16 without one;
    detectron2's ``AMPTrainer`` insists on CUDA.
    """

    def __init__(self, model: nn.Module, loader: Any, optimizer: Any, *, amp: bool, device: str):
        super().__init__(model, loader, optimizer)
        cuda = device.startswith("cuda")
        dtype = torch.float16 if cuda else torch.bfloat16
        self.autocast = lambda: torch.autocast(device.split(":")[0], dtype, enabled=amp)
        self.scaler = torch.amp.GradScaler(enabled=amp and cuda)

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with self.autocast():
            losses = self.model(data)
        self.optimizer.zero_grad()
        self.scaler.scale(sum(losses.values())).backward()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.scaler.unscale_(self.optimizer)  # detectron2 clips inside the optimizer's step
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler"):  # none if the saved run did not scale
            self.scaler.load_state_dict(state_dict["grad_scaler"])

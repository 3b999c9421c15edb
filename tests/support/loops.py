"""Training loops without a trainer, whose gradients stay in the model."""

from pathlib import Path
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from distill.config import get_distill_cfg
from distill.engine.nonfinite import FiniteGuard
from distill.engine.train_loop import TrainLoop

Gradients = dict[str, Tensor]


def loop_of(
    model: nn.Module, batches: list[Any], parts: int, folder: Path, module: nn.Module | None = None
) -> TrainLoop:
    """Return a loop with a learning rate of 0, whose gradients stay in ``model``."""
    cfg = get_distill_cfg()
    cfg.OUTPUT_DIR = str(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = FiniteGuard(cfg, model, getattr(model, "student", model), seed=0)
    loop = TrainLoop(
        module or model,
        batches,
        optimizer,
        amp=False,
        device="cpu",
        seed=0,
        guard=guard,
        accumulate=parts,
    )
    loop.iter = 0
    return loop


def gradients(model: nn.Module, batch: list[Any], parts: int, folder: Path) -> Gradients:
    with EventStorage():
        loop_of(model, [batch], parts, folder).run_step()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

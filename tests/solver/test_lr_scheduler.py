"""Test the learning-rate schedule that detectron2 lacks."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from distill.solver.lr_scheduler import build_lr_scheduler
from tests.support.networks import tiny_cfg


def rates(*opts: Any) -> list[float]:
    """Return the factors of BASE_LR over 100 iterations."""
    flat = ("SOLVER.LR_SCHEDULER_NAME", "WarmupFlatCosineLR", "SOLVER.MAX_ITER", 100)
    plain = ("SOLVER.BASE_LR", 0.2, "SOLVER.BASE_LR_END", 0.02, "SOLVER.WARMUP_ITERS", 0)
    cfg = tiny_cfg("faster", *flat, *plain, *opts)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(100):
        found.append(optimizer.param_groups[0]["lr"] / cfg.SOLVER.BASE_LR)
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("flat", [0.0, 0.5, 0.8])
def test_flat_then_half_a_cosine(flat: float) -> None:
    def expected(t: int) -> float:
        after = (t / 100 - flat) / (1 - flat)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * max(after, 0.0))) / 2

    found = rates("SOLVER.FLAT_FRACTION", flat)
    assert found == pytest.approx([expected(t) for t in range(100)])
    assert found[-1] < 0.11


def test_warmup() -> None:
    found = rates("SOLVER.WARMUP_ITERS", 10, "SOLVER.WARMUP_FACTOR", 0.2)
    assert found[:10] == pytest.approx([0.2 + 0.08 * t for t in range(10)])
    assert found[10:51] == pytest.approx([1.0] * 41)

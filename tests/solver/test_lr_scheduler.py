"""Test the learning-rate schedules that detectron2 lacks."""

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from distill.config.validate import check_values
from distill.errors import ConfigError
from distill.solver.lr_scheduler import build_lr_scheduler
from tests.support.cases import for_each
from tests.support.networks import tiny_cfg

# Learning rates that the authors' code sets (float64), by iteration.
YOLOX = {
    **{1: 4e-08, 250: 0.0025, 500: 0.01, 501: 0.01, 10_000: 0.00754766, 20_000: 0.00250131},
    **{28_499: 0.0005, 28_500: 0.0005, 29_999: 0.0005},
}
RTMDET = {
    **{0: 4e-08, 500: 0.00200202, 998: 0.003996, 1000: 0.004, 14_999: 0.004, 15_001: 0.004},
    **{22_500: 0.0021, 29_000: 0.00024152, 29_999: 0.0002},
}


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


def rates_at(iterations: Iterable[int], *opts: Any) -> list[float]:
    """Return the learning rates at some of 30 000 iterations."""
    flat = ("SOLVER.LR_SCHEDULER_NAME", "WarmupFlatCosineLR", "SOLVER.MAX_ITER", 30_000)
    cfg = tiny_cfg("faster", *flat, "SOLVER.STEPS", (), *opts)
    check_values(cfg)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for iteration in iterations:
        scheduler.last_epoch = iteration
        found += scheduler.get_lr()
    return found


def test_yolox() -> None:
    """Five of 300 epochs of 100 iterations warm up, and the last 15 are constant."""
    schedule = ("SOLVER.FLAT_FRACTION", 5 / 300, "SOLVER.TAIL_FRACTION", 15 / 300)
    rise = ("SOLVER.WARMUP_METHOD", "quadratic", "SOLVER.WARMUP_FACTOR", 0.0)
    rise += ("SOLVER.WARMUP_ITERS", 500, "SOLVER.BASE_LR", 0.01, "SOLVER.BASE_LR_END", 0.0005)
    found = rates_at(YOLOX, *schedule, *rise)
    assert found == pytest.approx([*YOLOX.values()], rel=1e-5)
    after = ("SOLVER.RESCALE_INTERVAL", True, "SOLVER.FLAT_FRACTION", 0.0)
    assert rates_at(YOLOX, *rise, *after, "SOLVER.TAIL_FRACTION", 15 / 295) == pytest.approx(found)


def test_rtmdet() -> None:
    rise = ("SOLVER.WARMUP_FACTOR", 1e-5, "SOLVER.WARMUP_ITERS", 1000)
    ends = ("SOLVER.BASE_LR", 0.004, "SOLVER.BASE_LR_END", 0.0002)
    found = rates_at(RTMDET, *rise, *ends)
    # The authors' warm-up is complete one iteration earlier, after 999.
    assert found == pytest.approx([*RTMDET.values()], rel=2e-3)


def test_the_tail_is_constant() -> None:
    found = rates("SOLVER.FLAT_FRACTION", 0.2, "SOLVER.TAIL_FRACTION", 0.3)
    assert found[:21] == pytest.approx([1.0] * 21)
    assert found[70:] == pytest.approx([0.1] * 30) and found[69] > 0.1


@for_each(
    "opts, message",
    [
        (("SOLVER.WARMUP_METHOD", "quadratic"), "WarmupMultiStepLR does not have"),
        (("SOLVER.FLAT_FRACTION", 0.5, "SOLVER.TAIL_FRACTION", 0.5), "no iteration to the cosine"),
        (("SOLVER.TAIL_FRACTION", -0.1), r"TAIL_FRACTION is -0.1; it must be in \[0, 1\)"),
        (("SOLVER.WARMUP_METHOD", "cubic"), "linear | constant | quadratic"),
    ],
)
def test_what_no_schedule_has(opts: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_values(tiny_cfg("faster", *opts))

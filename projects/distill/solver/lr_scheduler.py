"""Learning-rate schedules: those of detectron2, its DeepLab's, and a cosine between flat parts."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.projects.deeplab.lr_scheduler import WarmupPolyLR
from detectron2.solver import LRMultiplier, LRScheduler, WarmupParamScheduler
from detectron2.solver import build_lr_scheduler as build_detectron2s
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    ParamScheduler,
)
from torch.optim import Optimizer


class ResumablePolyLR(WarmupPolyLR):
    """``WarmupPolyLR`` whose state is only the current iteration, so training can be extended.

    The state of ``WarmupPolyLR`` has the length of the schedule too. A resumed training with a
    larger ``MAX_ITER`` would fail beyond that length.
    """

    def state_dict(self) -> dict[str, Any]:
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def get_lr(self) -> list[float]:
        if self.last_epoch <= self.max_iters:
            return super().get_lr()
        # A finished training that continues with fewer processes may be past its end by rounding.
        return [rate * self.constant_ending for rate in self.base_lrs]


class QuadraticParamScheduler(ParamScheduler):
    """Values from ``start`` to ``end``, with the square of the time: YOLOX's warm-up (as released).

    Args:
        start, end: value at time 0 and at time 1.
    """

    def __init__(self, start: float, end: float):
        self.start = start
        self.end = end

    def __call__(self, where: float) -> float:
        return self.start + (self.end - self.start) * where**2


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """Build the schedule of ``SOLVER.LR_SCHEDULER_NAME``, as detectron2 does for its own names.

    There are two more names. ``WarmupPolyLR`` is the schedule of detectron2's DeepLab.
    ``WarmupFlatCosineLR`` stays at ``BASE_LR`` for ``FLAT_FRACTION`` of the training, then falls to
    ``BASE_LR_END`` along half a cosine. It stays there for ``TAIL_FRACTION`` of the training. With
    ``RESCALE_INTERVAL`` these are shares of what follows the warm-up. Its ``WARMUP_METHOD`` may
    also be "quadratic".
    """
    node = cfg.SOLVER
    if node.LR_SCHEDULER_NAME == "WarmupFlatCosineLR":
        multiplier = _warmed_up(cfg, _flat_cosine(cfg))
        return LRMultiplier(optimizer, multiplier=multiplier, max_iter=node.MAX_ITER)
    if node.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return build_detectron2s(cfg, optimizer)
    return ResumablePolyLR(
        optimizer,
        node.MAX_ITER,
        warmup_factor=node.WARMUP_FACTOR,
        warmup_iters=node.WARMUP_ITERS,
        warmup_method=node.WARMUP_METHOD,
        power=node.POLY_LR_POWER,
        constant_ending=node.POLY_LR_CONSTANT_ENDING,
    )


def _flat_cosine(cfg: CfgNode) -> ParamScheduler:
    node = cfg.SOLVER
    end, cosine = node.BASE_LR_END / node.BASE_LR, 1 - node.FLAT_FRACTION - node.TAIL_FRACTION
    parts: list[tuple[ParamScheduler, float]] = [
        (ConstantParamScheduler(1.0), node.FLAT_FRACTION),
        (CosineParamScheduler(1.0, end), cosine),
        (CosineParamScheduler(end, end), node.TAIL_FRACTION),  # a constant refuses the time 1
    ]
    schedules, shares = zip(*((schedule, share) for schedule, share in parts if share))
    if len(schedules) == 1:
        return schedules[0]
    return CompositeParamScheduler(schedules, list(shares), ["rescaled"] * len(schedules))


def _warmed_up(cfg: CfgNode, schedule: ParamScheduler) -> ParamScheduler:
    """Return a schedule after the warm-up of ``WARMUP_METHOD``, as detectron2 joins them."""
    node = cfg.SOLVER
    share = min(node.WARMUP_ITERS / node.MAX_ITER, 1.0)
    if node.WARMUP_METHOD != "quadratic":
        return WarmupParamScheduler(
            schedule, node.WARMUP_FACTOR, share, node.WARMUP_METHOD, node.RESCALE_INTERVAL
        )
    after = schedule(0.0 if node.RESCALE_INTERVAL else share)
    rise = QuadraticParamScheduler(node.WARMUP_FACTOR * schedule(0.0), after)
    scaling = ["rescaled", "rescaled" if node.RESCALE_INTERVAL else "fixed"]
    return CompositeParamScheduler([rise, schedule], [share, 1 - share], scaling)

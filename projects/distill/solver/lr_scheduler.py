"""Learning-rate schedules: those of detectron2, its DeepLab's, and flat with a cosine end."""

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


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """Build the schedule of ``SOLVER.LR_SCHEDULER_NAME``, as detectron2 does for its own names.

    There are two more names. ``WarmupPolyLR`` is the schedule of detectron2's DeepLab.
    ``WarmupFlatCosineLR`` stays at ``BASE_LR`` for ``FLAT_FRACTION`` of the training, then falls to
    ``BASE_LR_END`` along half a cosine.
    """
    node = cfg.SOLVER
    if node.LR_SCHEDULER_NAME == "WarmupFlatCosineLR":
        return LRMultiplier(optimizer, multiplier=_flat_cosine(cfg), max_iter=node.MAX_ITER)
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
    cosine = CosineParamScheduler(1.0, node.BASE_LR_END / node.BASE_LR)
    flat = ConstantParamScheduler(1.0)
    shares = [node.FLAT_FRACTION, 1 - node.FLAT_FRACTION]
    schedule = (
        CompositeParamScheduler([flat, cosine], shares, ["rescaled", "rescaled"])
        if node.FLAT_FRACTION
        else cosine
    )
    return WarmupParamScheduler(
        schedule,
        node.WARMUP_FACTOR,
        min(node.WARMUP_ITERS / node.MAX_ITER, 1.0),
        node.WARMUP_METHOD,
        node.RESCALE_INTERVAL,
    )

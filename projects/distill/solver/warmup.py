"""Warm-up of the biases' learning rate and of the momentum, as YOLOv5 has it (as released)."""

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim import Optimizer

from .groups import split_groups

EXTRA_LR = "extra_lr"
"""Key of an optimizer's groups of biases: what their learning rate has more at iteration 0."""


class WarmupHook(HookBase):
    """Hook that warms up the learning rate of biases, and the momentum.

    At iteration t of w, biases have the schedule's learning rate plus (1 − t / w) · ``extra_lr`` of
    their group. The momentum is (1 − t / w) · first + (t / w) · last. Both are functions of the
    iteration, so a checkpoint needs no state of this hook.

    Args:
        iters: w.
        momentum: first and last momentum; None: it is constant.
    """

    def __init__(self, iters: int, momentum: tuple[float, float] | None = None):
        self.iters = iters
        self.momentum = momentum

    def before_step(self) -> None:
        done = min(self.trainer.iter / self.iters, 1.0)
        for group in self.trainer.optimizer.param_groups:
            group["lr"] += (1 - done) * group.get(EXTRA_LR, 0.0)  # the schedule sets it anew
            if self.momentum:
                first, last = self.momentum
                group["momentum"] = (1 - done) * first + done * last


def build_warmup(cfg: CfgNode) -> WarmupHook | None:
    """Return the hook of ``SOLVER.WARMUP_BIAS_FACTOR`` and ``WARMUP_MOMENTUM``, or None."""
    node = cfg.SOLVER
    if not node.WARMUP_ITERS or max(node.WARMUP_BIAS_FACTOR, node.WARMUP_MOMENTUM) < 0:
        return None
    first = node.WARMUP_MOMENTUM
    return WarmupHook(node.WARMUP_ITERS, (first, node.MOMENTUM) if first >= 0 else None)


def split_biases(cfg: CfgNode, optimizer: Optimizer, model: nn.Module) -> None:
    """Give biases groups of their own if ``SOLVER.WARMUP_BIAS_FACTOR`` sets their learning rate.

    Args:
        optimizer: optimizer before its first step, which is changed in place.
        model: network that has its parameters. Biases of norms are biases, too.
    """
    extra = cfg.SOLVER.WARMUP_BIAS_FACTOR - cfg.SOLVER.WARMUP_FACTOR
    if cfg.SOLVER.WARMUP_BIAS_FACTOR < 0:
        return
    named = model.named_parameters()
    biases: set[Tensor] = {x for name, x in named if name.rpartition(".")[2] == "bias"}
    split_groups(optimizer, biases, lambda group: {EXTRA_LR: extra * group["lr"]})

"""Groups of an optimizer's parameters."""

from collections.abc import Callable, Iterator
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.optim import Optimizer

Group = dict[str, Any]


def split_groups(
    optimizer: Optimizer, chosen: set[Tensor], changes: Callable[[Group], Group]
) -> None:
    """Give some parameters groups of their own; no group is empty.

    Args:
        optimizer: optimizer before its first step, which is changed in place.
        chosen: the parameters.
        changes: function of their old group that returns the values that differ in the new one.
    """

    def parts(group: Group) -> Iterator[Group]:
        for own in (False, True):
            if params := [x for x in group["params"] if (x in chosen) == own]:
                yield {**group, "params": params} | (changes(group) if own else {})

    optimizer.param_groups[:] = [part for group in optimizer.param_groups for part in parts(group)]


def split_implicit(cfg: CfgNode, optimizer: Optimizer, model: nn.Module) -> None:
    """Give YOLOv7's implicit parameters the weight decay of norms.

    A module names such parameters in an attribute ``implicit``.
    """
    chosen: set[Tensor] = {
        getattr(x, name) for x in model.modules() for name in getattr(x, "implicit", ())
    }
    if chosen:
        decay = cfg.SOLVER.WEIGHT_DECAY_NORM
        split_groups(optimizer, chosen, lambda group: {"weight_decay": decay})

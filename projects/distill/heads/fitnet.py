"""Mean squared error of feature maps (FitNet)."""

from torch import Tensor

from ..losses import fitnet
from ..structures import Batch
from .base import DISTILL_HEAD_REGISTRY
from .fpn import FPNDistillHead


@DISTILL_HEAD_REGISTRY.register()
class FitNet(FPNDistillHead):
    """FitNet: mean squared error of feature maps; see :func:`distill.losses.fitnet`."""

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        return fitnet(student, teacher)

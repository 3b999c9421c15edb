"""Attention transfer (AT) of feature maps."""

from torch import Tensor

from ..losses import at
from ..structures import Batch
from .base import DISTILL_HEAD_REGISTRY
from .fpn import FPNDistillHead


@DISTILL_HEAD_REGISTRY.register()
class AT(FPNDistillHead):
    """AT: compare where the features are large; see :func:`distill.losses.at`.

    The paper has no version for detection, and its weight is for classification. Maps of different
    channels need no adapter.
    """

    adapts = False
    balance_share = 0.1

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        return at(student, teacher)

"""Distillation by the Pearson correlation of channels (PKD)."""

from torch import Tensor

from ..losses import pkd
from ..structures import Batch
from .base import DISTILL_HEAD_REGISTRY
from .fpn import AuthorsFPNHead


@DISTILL_HEAD_REGISTRY.register()
class PKD(AuthorsFPNHead):
    """Correlation of channels; see :func:`distill.losses.pkd`.

    The authors compare the four finest levels, of the same channels; others are adapted here.
    """

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        return pkd(student, teacher)

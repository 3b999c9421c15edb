"""Distillation by the Pearson correlation of channels (PKD)."""

from torch import Tensor

from ..losses import pkd
from ..section import Presets, Section
from ..structures import Batch
from .base import DISTILL_HEAD_REGISTRY
from .fpn import FPNDistillHead


@DISTILL_HEAD_REGISTRY.register()
class PKD(FPNDistillHead):
    """PKD: compare maps by the Pearson correlation of channels; see :func:`distill.losses.pkd`.

    The authors compare the four finest levels of networks with the same channels. Others are
    adapted here.
    """

    section = Section(WEIGHT=Presets(DenseDetector=10.0, GeneralizedRCNN=6.0))
    summed = True

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        return pkd(student, teacher)

"""Divergence of instance mask logits."""

from torch import Tensor

from ..losses import binary_kl
from ..utils.distributed import reduce_mean
from .base import DISTILL_HEAD_REGISTRY
from .mask import InstanceMaskDistillHead


@DISTILL_HEAD_REGISTRY.register()
class MaskLogitKD(InstanceMaskDistillHead):
    """T² KL(σ(t/T) || σ(s/T)) of the mask logits, averaged over cells and instances."""

    def loss(self, student: Tensor, teacher: Tensor, known: Tensor) -> Tensor:
        divergence = binary_kl(student, teacher, self.temperature).mean(dim=(1, 2))
        weight = known.to(divergence.dtype)
        return (weight * divergence).sum() / reduce_mean(weight.sum())

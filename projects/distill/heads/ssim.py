"""Structural distillation (SSIM) of feature maps."""

from torch import Tensor

from ..losses import ssim
from ..structures import Batch
from .base import DISTILL_HEAD_REGISTRY
from .fpn import FPNDistillHead


@DISTILL_HEAD_REGISTRY.register()
class SSIM(FPNDistillHead):
    """SSIM: compare the structure of maps channel by channel; see :func:`distill.losses.ssim`.

    The IMA paper's tables call it SKD. Levels are averaged, which leaves the authors' weight open.
    """

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        return ssim(student, teacher)

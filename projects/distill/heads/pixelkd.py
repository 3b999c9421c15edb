"""Divergence of the class probabilities of every cell (PixelKD)."""

from torch import Tensor

from ..losses import pixel_kd
from .base import DISTILL_HEAD_REGISTRY
from .semantic import SemSegDistillHead


@DISTILL_HEAD_REGISTRY.register()
class PixelKD(SemSegDistillHead):
    """PixelKD: compare class probabilities of every cell; see :func:`distill.losses.pixel_kd`."""

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return pixel_kd(student, teacher, self.temperature)

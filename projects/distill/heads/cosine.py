"""Distillation of the directions of cells (Cosine)."""

from torch import Tensor

from ..losses import cosine
from ..structures import Batch
from .base import DISTILL_HEAD_REGISTRY
from .fpn import FPNDistillHead


@DISTILL_HEAD_REGISTRY.register()
class Cosine(FPNDistillHead):
    """Cosine: compare the direction of each cell's channels; see :func:`distill.losses.cosine`.

    It is for teachers whose lengths say little, such as the tokens of DINOv2.
    """

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        return cosine(student, teacher)

"""Channel-wise distillation (CWD) of feature maps and of semantic logits."""

from typing import Any

from detectron2.config import configurable
from torch import Tensor

from ..losses import cwd
from ..section import POSITIVE, Key, Section
from ..structures import Batch
from .base import DISTILL_HEAD_REGISTRY
from .fpn import FPNDistillHead
from .semantic import SemSegDistillHead


@DISTILL_HEAD_REGISTRY.register()
class CWD(FPNDistillHead):
    """CWD of feature maps: compare where each channel is active; see :func:`distill.losses.cwd`.

    Levels are summed, as in MMRazor's detectors, whose weight is the default.

    Args:
        temperature: 𝒯 > 0 of the softmax over cells.
    """

    section = Section(
        WEIGHT=10.0, TEMPERATURE=Key(1.0, "temperature 𝒯 of the softmax over cells", POSITIVE)
    )
    summed = True

    @configurable
    def __init__(self, *, temperature: float = 1.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.temperature = temperature

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        return cwd(student, teacher, self.temperature)


@DISTILL_HEAD_REGISTRY.register()
class CWDLogits(SemSegDistillHead):
    """CWD of semantic logits: compare where each class is; see :func:`distill.losses.cwd`."""

    section = Section(WEIGHT=3.0, TEMPERATURE=4.0)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cwd(student, teacher, self.temperature)

"""Channel-wise distillation (CWD) of feature maps and of semantic logits."""

from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..losses import cwd
from ..structures import Batch, NetworkInfo
from .base import DISTILL_HEAD_REGISTRY
from .fpn import FPNDistillHead
from .semantic import SemSegDistillHead


@DISTILL_HEAD_REGISTRY.register()
class CWD(FPNDistillHead):
    """Where each channel is active; see :func:`distill.losses.cwd`.

    Levels are summed, as in the detectors of MMRazor whose weight is the default.

    Args:
        temperature: 𝒯 > 0.
    """

    summed = True

    @configurable
    def __init__(self, *, temperature: float = 1.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.temperature = temperature

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        return {**ret, "temperature": cls.section(cfg).TEMPERATURE}

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        return cwd(student, teacher, self.temperature)


@DISTILL_HEAD_REGISTRY.register()
class CWDLogits(SemSegDistillHead):
    """Where each class is, of the logits; see :func:`distill.losses.cwd`."""

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cwd(student, teacher, self.temperature)

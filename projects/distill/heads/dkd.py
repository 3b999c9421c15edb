"""Decoupled knowledge distillation on the student's sampled boxes (DKD)."""

from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..losses import dkd_rows
from ..structures import NetworkInfo
from .base import DISTILL_HEAD_REGISTRY
from .kd import KD
from .roi import ROIPair


@DISTILL_HEAD_REGISTRY.register()
class DKD(KD):
    """Target and other classes apart, see :func:`distill.losses.dkd`.

    Args:
        alpha, beta: factors of both parts.
    """

    @configurable
    def __init__(self, *, alpha: float, beta: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.alpha = alpha
        self.beta = beta

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        node = cls.section(cfg)
        ret = super().from_config(cfg, student, teacher)
        return {**ret, "alpha": node.ALPHA, "beta": node.BETA}

    def divergence(self, rois: ROIPair) -> Tensor:
        target = rois.labels.clamp(min=0)
        logits = rois.student_logits, rois.teacher_logits
        return dkd_rows(*logits, target, self.alpha, self.beta, self.temperature)

"""Decoupled knowledge distillation on the student's sampled boxes (DKD)."""

from typing import Any

from detectron2.config import configurable
from torch import Tensor

from ..losses import dkd_rows
from ..section import Key, Section, at_least
from .base import DISTILL_HEAD_REGISTRY
from .kd import KD
from .roi import ROIPair


@DISTILL_HEAD_REGISTRY.register()
class DKD(KD):
    """DKD: compare the label's class and the others apart; see :func:`distill.losses.dkd`.

    Args:
        alpha, beta: factors of both parts.
    """

    section = Section(
        ALPHA=Key(1.0, "factor α of the label's class (TCKD)", at_least(0), term="target"),
        BETA=Key(0.25, "factor β of the other classes (NCKD)", at_least(0), term="others"),
    )

    @configurable
    def __init__(self, *, alpha: float, beta: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.alpha = alpha
        self.beta = beta

    def divergence(self, rois: ROIPair) -> Tensor:
        target = rois.labels.clamp(min=0)
        logits = rois.student_logits, rois.teacher_logits
        return dkd_rows(*logits, target, self.alpha, self.beta, self.temperature)

"""Class and box distillation on the student's sampled boxes (ROIKD)."""

from typing import Any

from detectron2.config import configurable
from torch import Tensor

from ..losses import categorical_kl
from ..losses.reduce import full_precision
from ..section import Key, Section, at_least
from ..utils.distributed import reduce_mean
from .base import DISTILL_HEAD_REGISTRY
from .roi import ROIDistillHead, ROIPair


@DISTILL_HEAD_REGISTRY.register()
class ROIKD(ROIDistillHead):
    """ROIKD: compare classes and boxes of an R-CNN.

    After Chen et al., "Learning efficient object detection models with knowledge distillation",
    2017, Sec. 3::

        cls = Σ_r w_r T² KL(teacher || student) / ΣRi, w = foreground or background weight
        box = Σ_fg |δ_s − δ_t|₁ / number of foreground boxes

    δ are the deltas of the box's own class, without the transform's weights. The paper bounds the
    regression by the error of the ground truth. Here the teacher's deltas are the targets.

    Args:
        foreground_weight, background_weight: w of boxes with and without an object.
        box_weight: factor of ``box``; 0 leaves it out.
    """

    section = Section(
        FOREGROUND_WEIGHT=Key(1.0, "factor of the classes of boxes with an object", at_least(0)),
        BACKGROUND_WEIGHT=Key(1.0, "factor of the classes of background boxes", at_least(0)),
        BOX_WEIGHT=Key(1.0, "factor of the box deltas of boxes with an object", at_least(0)),
    )
    parts = ("cls", "box")

    @configurable
    def __init__(
        self,
        *,
        foreground_weight: float,
        background_weight: float,
        box_weight: float,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.foreground_weight = foreground_weight
        self.background_weight = background_weight
        self.box_weight = box_weight

    def loss(self, rois: ROIPair) -> dict[str, Tensor]:
        divergence = categorical_kl(rois.student_logits, rois.teacher_logits, self.temperature)
        foreground = rois.foreground.to(divergence.dtype)
        weight = self.foreground_weight * foreground + self.background_weight * rois.background
        count = divergence.new_full((), len(divergence))
        gap = (full_precision(rois.student_deltas) - full_precision(rois.teacher_deltas)).abs()
        return {
            "cls": (weight * divergence).sum() / reduce_mean(count),
            "box": self.box_weight
            * (foreground * gap.sum(dim=1)).sum()
            / reduce_mean(foreground.sum()),
        }

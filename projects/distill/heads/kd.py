"""Hinton's knowledge distillation on the student's sampled boxes (KD)."""

from torch import Tensor

from ..losses import categorical_kl
from ..utils.distributed import reduce_mean
from .base import DISTILL_HEAD_REGISTRY
from .roi import ROIDistillHead, ROIPair


@DISTILL_HEAD_REGISTRY.register()
class KD(ROIDistillHead):
    """Hinton's divergence of the class logits, see :func:`distill.losses.kd`.

    The mean over all boxes that the student sampled, those of classes that the teacher lacks
    excepted.
    """

    parts = ("",)

    def loss(self, rois: ROIPair) -> dict[str, Tensor]:
        return {"": _mean(self.divergence(rois), rois.labels >= 0)}

    def divergence(self, rois: ROIPair) -> Tensor:
        """(ΣRi,) of the boxes."""
        return categorical_kl(rois.student_logits, rois.teacher_logits, self.temperature)


def _mean(values: Tensor, of: Tensor) -> Tensor:
    """Mean of those values that are chosen, over all processes."""
    chosen = of.to(values.dtype)
    return (chosen * values).sum() / reduce_mean(chosen.sum())

"""Hinton's knowledge distillation on the student's sampled boxes (KD)."""

from torch import Tensor

from ..losses import categorical_kl
from ..utils.distributed import reduce_mean
from .base import DISTILL_HEAD_REGISTRY
from .roi import ROIDistillHead, ROIPair


@DISTILL_HEAD_REGISTRY.register()
class KD(ROIDistillHead):
    """KD: Hinton's divergence of the class logits; see :func:`distill.losses.kd`.

    It is the mean over the boxes that the student sampled, without those of classes that the
    teacher lacks.
    """

    parts = ("",)

    def loss(self, rois: ROIPair) -> dict[str, Tensor]:
        return {"": _mean(self.divergence(rois), rois.labels >= 0)}

    def divergence(self, rois: ROIPair) -> Tensor:
        """Return the (ΣRi,) divergences of the boxes."""
        return categorical_kl(rois.student_logits, rois.teacher_logits, self.temperature)


def _mean(values: Tensor, known: Tensor) -> Tensor:
    """Return the mean over all processes of the values whose class is known."""
    chosen = known.to(values.dtype)
    return (chosen * values).sum() / reduce_mean(chosen.sum())

"""Divergence of instance mask logits."""

from torch import Tensor

from ..losses import binary_kl
from ..structures import NetworkInfo, NetworkOutputs
from ..utils.distributed import reduce_mean
from .base import DISTILL_HEAD_REGISTRY
from .classes import PredictionDistillHead
from .dense import anchor_problem, grid_problem
from .mask import InstanceMaskDistillHead


@DISTILL_HEAD_REGISTRY.register()
class MaskLogitKD(InstanceMaskDistillHead):
    """T² KL(σ(t/T) || σ(s/T)) of the mask logits, averaged over cells and instances."""

    def loss(self, student: Tensor, teacher: Tensor, known: Tensor) -> Tensor:
        return mean_divergence(student, teacher, known, self.temperature)


@DISTILL_HEAD_REGISTRY.register()
class PointMaskKD(PredictionDistillHead):
    """:class:`MaskLogitKD` of RTMDet-Ins, whose masks are of the whole image.

    The student's masks are those on which it trains: of the points that match an object. The
    teacher's are those of the same points.
    """

    needs = frozenset({"point_masks"})
    reads_labels = True

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        return (
            super().problem(student, teacher)
            or grid_problem(student, teacher)
            or anchor_problem(student, teacher)
        )

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        own, theirs = student.point_masks, teacher.point_masks
        assert own is not None and theirs is not None
        known = self.classes.shared_labels(own.labels) >= 0
        return {"": mean_divergence(own.logits, theirs.logits, known, self.temperature)}


def mean_divergence(student: Tensor, teacher: Tensor, known: Tensor, temperature: float) -> Tensor:
    """Return the mean of T² KL(σ(t/T) || σ(s/T)) over the cells of the masks that count.

    Args:
        student, teacher: (R, H, W) logits.
        known: (R,) bool, True for masks that count.
        temperature: T.
    """
    divergence = binary_kl(student, teacher, temperature).mean(dim=(1, 2))
    weight = known.to(divergence.dtype)
    return (weight * divergence).sum() / reduce_mean(weight.sum())

"""Heads that compare box predictions on the student's sampled boxes."""

from typing import Any, NamedTuple

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..losses import categorical_kl, dkd_rows
from ..losses.reduce import full_precision
from ..structures import NetworkInfo, NetworkOutputs, ROIs
from ..utils.distributed import reduce_mean
from .base import DISTILL_HEAD_REGISTRY
from .classes import PredictionDistillHead


class ROIPair(NamedTuple):
    """Both networks' predictions on the same boxes, in the classes that both know (K').

    Attributes:
        student_logits, teacher_logits: (ΣRi, K' + 1), background last.
        student_deltas, teacher_deltas: (ΣRi, 4) at the box's class.
        labels: (ΣRi,) in [0, K'], K' is background; -1: a class that the teacher lacks.
        foreground, background: (ΣRi,) bool; boxes of a class the teacher lacks are neither.
    """

    student_logits: Tensor
    teacher_logits: Tensor
    student_deltas: Tensor
    teacher_deltas: Tensor
    labels: Tensor
    foreground: Tensor
    background: Tensor


class ROIDistillHead(PredictionDistillHead):
    """Box predictions of both networks on the boxes that the *student* sampled.

    A subclass writes :meth:`loss` for one box stage. Stages of a Cascade are averaged.
    """

    needs = frozenset({"rois"})

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        problem = super().problem(student, teacher)
        if problem:
            return problem
        for net in (student, teacher):
            predictors = net.model.roi_heads.box_predictor
            for predictor in predictors if isinstance(predictors, nn.ModuleList) else [predictors]:
                if getattr(predictor, "use_sigmoid_ce", False):
                    return f"the {net.name} scores boxes by sigmoids (ROI_BOX_HEAD.USE_SIGMOID_CE)"
        return None

    def pair(self, student: ROIs, teacher: ROIs) -> ROIPair:
        labels = student.labels
        shared = self.classes.position[labels]
        background = labels == len(self.classes.position) - 1
        return ROIPair(
            *self.classes.select_with_background(student.logits, teacher.logits),
            *self.classes.at_label(student.deltas, teacher.deltas, labels),
            shared,
            (shared >= 0) & ~background,
            background,
        )

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for s, t in zip(student.rois, teacher.rois):
            for name, value in self.loss(self.pair(s, t)).items():
                total[name] = total.get(name, 0) + value / len(student.rois)
        return total

    def loss(self, rois: ROIPair) -> dict[str, Tensor]:
        """Named scalar losses of one box stage."""
        raise NotImplementedError


@DISTILL_HEAD_REGISTRY.register()
class ROIKD(ROIDistillHead):
    """Class and box distillation of an R-CNN (after Chen et al., "Learning efficient object
    detection models with knowledge distillation", 2017, Sec. 3).

    cls = Σ_r w_r T² KL(teacher || student) / ΣRi, w = foreground or background weight.
    box = Σ_fg |δ_s − δ_t|₁ / #fg, deltas of the box's own class without the transform's weights.
    The paper bounds the regression by the ground truth's error; here the teacher's deltas are
    targets as they are.

    Args:
        foreground_weight, background_weight: w of boxes with and without an object.
        box_weight: factor of ``box``; 0 leaves it out.
    """

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

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        node = cls.section(cfg)
        return {
            **super().from_config(cfg, student, teacher),
            "foreground_weight": node.FOREGROUND_WEIGHT,
            "background_weight": node.BACKGROUND_WEIGHT,
            "box_weight": node.BOX_WEIGHT,
        }

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


def _mean(values: Tensor, of: Tensor) -> Tensor:
    """Mean of those values that are chosen, over all processes."""
    chosen = of.to(values.dtype)
    return (chosen * values).sum() / reduce_mean(chosen.sum())

"""Distillation by feature richness scores (FRS)."""

from typing import Any

from detectron2.config import configurable
from torch import Tensor, nn

from ..losses import feature_richness, frs, frs_classes
from ..section import Key, Presets, Section, at_least
from ..structures import NetworkOutputs
from .base import DISTILL_HEAD_REGISTRY
from .fpn import DenseFPNHead


@DISTILL_HEAD_REGISTRY.register()
class FRS(DenseFPNHead):
    """FRS: compare features and class logits where the teacher finds something.

    See :func:`distill.losses.frs`. For an R-CNN the logits are the RPN's objectness.

    Args:
        feature_weight, class_weight: factors of both terms.
    """

    section = Section(
        WARMUP_ITERS=500,
        FEATURE_WEIGHT=Key(
            Presets(DenseDetector=0.005, FCOS=0.01, GFL=0.1, GeneralizedRCNN=0.002),
            "factor of the features",
            at_least(0),
            term="feature",
        ),
        CLASS_WEIGHT=Key(
            Presets(DenseDetector=0.02, FCOS=0.05, GFL=0.05, GeneralizedRCNN=0.1),
            "factor of the class logits",
            at_least(0),
            term="class",
        ),
    )

    @configurable
    def __init__(self, *, feature_weight: float, class_weight: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.feature_weight = feature_weight
        self.class_weight = class_weight
        self.parts = tuple(f"{k}/{term}" for k in self.parts for term in ("feature", "class"))

    @staticmethod
    def adapter(student: int, teacher: int) -> nn.Module:
        return nn.Conv2d(student, teacher, kernel_size=3, padding=1)

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        assert student.dense is not None and teacher.dense is not None
        losses = {}
        logits = zip(student.dense.logits, teacher.dense.logits)
        for level, (s, t), rows in zip(self.levels, self.maps(student, teacher), logits):
            ours, theirs = (_as_maps(x, s) for x in self.classes.select(*rows))
            score = feature_richness(_as_maps(rows[1], s))
            name = level.student
            losses[f"{name}/feature"] = self.feature_weight * frs(s, t, score)
            losses[f"{name}/class"] = self.class_weight * frs_classes(ours, theirs, score)
        return losses


def _as_maps(rows: Tensor, maps: Tensor) -> Tensor:
    """Return (N, H·W·A, K) rows as (N, A·K, H, W), with the H and W of ``maps``."""
    batch, _, height, width = maps.shape
    return rows.reshape(batch, height, width, -1).permute(0, 3, 1, 2)

"""Structured knowledge distillation by pairwise similarities (SKD)."""

from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..losses import pairwise_affinity
from ..structures import Batch, NetworkInfo
from .base import DISTILL_HEAD_REGISTRY
from .semantic import RelationDistillHead


@DISTILL_HEAD_REGISTRY.register()
class SKD(RelationDistillHead):
    """Similarities of pooled cells, pair by pair; see :func:`distill.losses.pairwise_affinity`.

    Args:
        scale: side of a pooled cell as a share of the map's.
    """

    @configurable
    def __init__(self, *, scale: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.scale = scale

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        return {**super().from_config(cfg, student, teacher), "scale": cls.section(cfg).SCALE}

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        return pairwise_affinity(student, teacher, self.scale)

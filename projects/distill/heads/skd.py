"""Structured knowledge distillation by pairwise similarities (SKD)."""

from typing import Any

from detectron2.config import configurable
from torch import Tensor

from ..losses import pairwise_affinity
from ..section import SHARE, Key, Section
from ..structures import Batch
from .base import DISTILL_HEAD_REGISTRY
from .semantic import RelationDistillHead


@DISTILL_HEAD_REGISTRY.register()
class SKD(RelationDistillHead):
    """SKD: compare pairwise similarities of pooled cells.

    See :func:`distill.losses.pairwise_affinity`.

    Args:
        scale: side of a pooled cell as a share of the map's.
    """

    section = Section(SCALE=Key(0.5, "side of a pooled cell as a share of the map's side", SHARE))

    @configurable
    def __init__(self, *, scale: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.scale = scale

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        return pairwise_affinity(student, teacher, self.scale)

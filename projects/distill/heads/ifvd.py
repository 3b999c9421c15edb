"""Intra-class feature variation distillation (IFVD)."""

from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..losses import ifvd
from ..section import Section
from ..structures import Batch, NetworkInfo
from .base import DISTILL_HEAD_REGISTRY
from .fpn import cell_labels
from .semantic import RelationDistillHead


@DISTILL_HEAD_REGISTRY.register()
class IFVD(RelationDistillHead):
    """IFVD: compare the similarity of each cell to the mean of its class.

    See :func:`distill.losses.ifvd`.

    Args:
        num_classes: number of classes of the semantic labels.
    """

    section = Section(WEIGHT=200.0)
    needs = frozenset({"features", "sem_seg"})
    reads_labels = True

    @configurable
    def __init__(self, *, num_classes: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_classes = num_classes

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        return {**ret, "num_classes": len(student.sem_seg_classes)}

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        labels = cell_labels(batch.sem_seg, *student.shape[2:])
        return ifvd(student, teacher, labels, self.num_classes)

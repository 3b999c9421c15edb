"""Divergence of dense class logits (DenseKD)."""

import torch
from torch import Tensor

from ..losses import dense_kd
from ..structures import NetworkOutputs
from ..utils.distributed import reduce_mean
from .base import DISTILL_HEAD_REGISTRY
from .dense import DenseDistillHead


@DISTILL_HEAD_REGISTRY.register()
class DenseKD(DenseDistillHead):
    """DenseKD: compare class logits, weighted by the teacher's confidence.

    See :func:`distill.losses.dense_kd`. All levels share one normaliser, so that a level counts as
    much as the teacher finds in it.
    """

    rpn_share = 0.1

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        levels = [dense_kd(s, t, self.temperature) for s, t in self.logits(student, teacher)]
        mass = reduce_mean(torch.stack([m for _, m in levels]).sum(), minimum=1e-6)
        return {part: numerator / mass for part, (numerator, _) in zip(self.parts, levels)}

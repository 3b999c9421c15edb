"""Attention-guided and non-local distillation of features (FKD)."""

from typing import Any

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..losses import fkd, fkd_mask, length_of_gap
from ..section import POSITIVE, Key, Presets, Section, at_least
from ..structures import Batch
from .base import DISTILL_HEAD_REGISTRY, Terms
from .fpn import BatchNorm, FPNDistillHead, Level


class NonLocal(nn.Module):
    """Add to each cell its relation to the pooled cells (Wang et al., "Non-local neural networks").

    z = x + W (θ(x)ᵀ φ(x) / number of keys) g(x), without a softmax. At the start z = x.

    Args:
        channels: C.
        inside: channels of θ, φ and g.
        stride: side of the pooled cells in cells.
    """

    def __init__(self, channels: int, inside: int, stride: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(channels, inside, 1) for _ in range(3))
        norm = BatchNorm(channels)
        nn.init.zeros_(norm.weight)
        self.outside = nn.Sequential(nn.Conv2d(inside, channels, 1), norm)
        self.pool = nn.MaxPool2d(stride, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) for (N, C, H, W)."""
        query = self.query(x).flatten(2)
        key, value = (self.pool(f(x)).flatten(2) for f in (self.key, self.value))
        # Divided first: the sum over the keys could overflow in half precision.
        context = torch.einsum("nck,ndk->ncd", key / key.shape[2], value)
        read = torch.einsum("ncq,ncd->ndq", query, context)
        return x + self.outside(read.unflatten(2, x.shape[2:]))


class FKDAdapters(nn.Module):
    """Adapters of one level for FKD's three terms: maps, pooled maps, and relations.

    Args:
        student, teacher: channels of the maps.
        inside: channels of the relation.
        stride: side in cells of the pooled cells that a cell is related to.
    """

    def __init__(self, student: int, teacher: int, inside: int, stride: int):
        super().__init__()
        self.map = nn.Conv2d(student, teacher, kernel_size=1)
        self.channels = nn.Linear(student, teacher)
        self.cells = nn.Conv2d(1, 1, kernel_size=3, padding=1)
        self.of_student = NonLocal(student, inside, stride)
        self.of_teacher = NonLocal(teacher, inside, stride)
        self.relation = nn.Conv2d(student, teacher, kernel_size=1)


@DISTILL_HEAD_REGISTRY.register()
class FKD(FPNDistillHead):
    """FKD: compare attended maps, their means over cells and over channels, and their relations.

    See :func:`distill.losses.fkd`. Each term is the length of a difference in the whole batch, not
    its square.

    Args:
        attention_weight, pooled_weight, relation_weight: factors of the terms.
        temperature: 𝒯 > 0 of the attention.
    """

    section = Section(
        ATTENTION_WEIGHT=Key(
            Presets(DenseDetector=4e-4, GeneralizedRCNN=7e-5),
            "factor of the attended maps",
            at_least(0),
            term="attention",
        ),
        POOLED_WEIGHT=Key(
            Presets(DenseDetector=2e-2, GeneralizedRCNN=4e-3),
            "factor of the maps' means over cells and over channels",
            at_least(0),
            term="pooled",
        ),
        RELATION_WEIGHT=Key(
            Presets(DenseDetector=4e-4, GeneralizedRCNN=7e-5),
            "factor of the non-local relation",
            at_least(0),
            term="relation",
        ),
        TEMPERATURE=Key(0.5, "temperature 𝒯 of the attention", POSITIVE),
    )
    adapts = False
    summed = True

    @configurable
    def __init__(
        self,
        *,
        attention_weight: float,
        pooled_weight: float,
        relation_weight: float,
        temperature: float,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.attention_weight = attention_weight
        self.pooled_weight = pooled_weight
        self.relation_weight = relation_weight
        self.temperature = temperature
        self.compared = nn.ModuleDict()
        for level, (s, t) in zip(self.levels, self.channels):
            fine = level.stride <= 8
            stride = max(32 // level.stride, 2)  # the authors': 8, 4, 2, 2, 2 from P2 on
            self.compared[level.student] = FKDAdapters(s, t, 64 if fine else 128, stride)

    def level_loss(self, level: Level, student: Tensor, teacher: Tensor, batch: Batch) -> Terms:
        compared: Any = self.compared[level.student]
        mask = fkd_mask(student, teacher, self.temperature)
        attended = fkd(compared.map(student), teacher, mask)
        channels = length_of_gap(compared.channels(student.mean((2, 3))), teacher.mean((2, 3)))
        cells = length_of_gap(
            compared.cells(student.mean(1, keepdim=True)), teacher.mean(1, keepdim=True)
        )
        related = compared.relation(compared.of_student(student)), compared.of_teacher(teacher)
        return {
            "attention": self.attention_weight * attended,
            "pooled": self.pooled_weight * (channels + cells),
            "relation": self.relation_weight * length_of_gap(*related),
        }

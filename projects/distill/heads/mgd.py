"""Masked generative distillation (MGD)."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..losses import mgd
from ..section import BELOW_1, Key, Presets, Section
from ..structures import Batch, NetworkInfo
from .base import DISTILL_HEAD_REGISTRY, StepGenerator
from .fpn import FPNDistillHead, Level


class MGDGenerator(nn.Sequential):
    """Two 3x3 convolutions with a ReLU between them."""

    def __init__(self, channels: int):
        super().__init__(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )


@DISTILL_HEAD_REGISTRY.register()
class MGD(FPNDistillHead):
    """MGD: generate the teacher's map from the student's masked map.

    See :func:`distill.losses.mgd`.

    Args:
        mask_ratio: λ, the expected share of the cells that are masked out.
        seed: seed of the masks.
    """

    section = Section(
        WEIGHT=Presets(DenseDetector=2e-5, GeneralizedRCNN=5e-7, SemanticSegmentor=2e-5),
        MASK_RATIO=Key(
            Presets(DenseDetector=0.65, GeneralizedRCNN=0.45, SemanticSegmentor=0.75),
            "λ: expected share of the cells that are masked out",
            BELOW_1,
        ),
    )
    summed = True

    @configurable
    def __init__(self, *, mask_ratio: float, seed: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.mask_ratio = mask_ratio
        self.random = StepGenerator(seed)
        self.generators = nn.ModuleDict(
            {level.student: MGDGenerator(t) for level, (_, t) in zip(self.levels, self.channels)}
        )

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        return {**super().from_config(cfg, student, teacher), "seed": cfg.SEED}

    def level_loss(self, level: Level, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        size = (len(student), 1, *student.shape[2:])
        generator = self.random.generator(student.device)
        drawn = torch.rand(size, device=student.device, generator=generator)
        keep = (drawn <= 1 - self.mask_ratio).to(student.dtype)
        return mgd(student, teacher, self.generators[level.student], keep)

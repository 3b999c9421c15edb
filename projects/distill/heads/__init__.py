"""Distillation heads: which signals are compared, through which adapters."""

from .base import DISTILL_HEAD_REGISTRY, DistillHead, build_heads
from .dense import DenseDistillHead, DenseKD
from .fpn import IMA, FitNet, FPNDistillHead
from .mask import InstanceMaskDistillHead, MaskKD
from .roi import ROIKD, ROIDistillHead

__all__ = [
    "DISTILL_HEAD_REGISTRY",
    "IMA",
    "ROIKD",
    "DenseDistillHead",
    "DenseKD",
    "DistillHead",
    "FPNDistillHead",
    "FitNet",
    "InstanceMaskDistillHead",
    "MaskKD",
    "ROIDistillHead",
    "build_heads",
]

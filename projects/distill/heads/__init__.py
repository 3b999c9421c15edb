"""Distillation heads: which signals are compared, through which adapters."""

from .base import DISTILL_HEAD_REGISTRY, DistillHead, build_heads, teacher_needed
from .dense import DenseDistillHead, DenseKD
from .fpn import FitNet, FPNDistillHead
from .ima import IMA
from .mask import InstanceMaskDistillHead, MaskKD
from .mkd import MKD
from .mssd import MSSD
from .roi import ROIKD, ROIDistillHead
from .tid import TID

__all__ = [
    "DISTILL_HEAD_REGISTRY",
    "IMA",
    "MKD",
    "MSSD",
    "ROIKD",
    "TID",
    "DenseDistillHead",
    "DenseKD",
    "DistillHead",
    "FPNDistillHead",
    "FitNet",
    "InstanceMaskDistillHead",
    "MaskKD",
    "ROIDistillHead",
    "build_heads",
    "teacher_needed",
]

"""Distillation heads: which signals are compared, through which adapters."""

from .base import DISTILL_HEAD_REGISTRY, DistillHead, build_heads, teacher_needed
from .dense import DenseDistillHead, DenseKD
from .fpn import CWD, FitNet, FPNDistillHead
from .ima import IMA
from .mask import InstanceMaskDistillHead, MaskKD
from .mkd import MKD
from .mssd import MSSD
from .roi import ROIKD, ROIDistillHead
from .semantic import (
    CIRKD,
    IFVD,
    SKD,
    CWDLogits,
    MasKD,
    PixelKD,
    RelationDistillHead,
    SemSegDistillHead,
)
from .tid import TID

__all__ = [
    "CIRKD",
    "CWD",
    "DISTILL_HEAD_REGISTRY",
    "IFVD",
    "IMA",
    "MKD",
    "MSSD",
    "ROIKD",
    "SKD",
    "TID",
    "CWDLogits",
    "DenseDistillHead",
    "DenseKD",
    "DistillHead",
    "FPNDistillHead",
    "FitNet",
    "InstanceMaskDistillHead",
    "MasKD",
    "MaskKD",
    "PixelKD",
    "ROIDistillHead",
    "RelationDistillHead",
    "SemSegDistillHead",
    "build_heads",
    "teacher_needed",
]

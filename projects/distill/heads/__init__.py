"""Distillation heads: which signals are compared, through which adapters."""

from .base import DISTILL_HEAD_REGISTRY, DistillHead, build_heads, outlasting_phases, teacher_needed
from .crosskd import CrossKD
from .dense import DenseDistillHead, DenseKD
from .features import FGD, FGFI, FKD, FRS, MGD, PKD, DeFeat
from .fpn import CWD, FitNet, FPNDistillHead
from .gid import GID
from .ima import IMA
from .ld import LD
from .lgd import LGD
from .mask import InstanceMaskDistillHead, MaskLogitKD
from .maskd import MasKD, MasKDLogits
from .mkd import MKD
from .mssd import MSSD
from .review import ReviewKD
from .roi import DKD, KD, ROIKD, ROIDistillHead
from .semantic import CIRKD, IFVD, SKD, CWDLogits, PixelKD, RelationDistillHead, SemSegDistillHead
from .tid import TID

__all__ = [
    "CIRKD",
    "CWD",
    "DISTILL_HEAD_REGISTRY",
    "DKD",
    "FGD",
    "FGFI",
    "FKD",
    "FRS",
    "GID",
    "IFVD",
    "IMA",
    "KD",
    "LD",
    "LGD",
    "MGD",
    "MKD",
    "MSSD",
    "PKD",
    "ROIKD",
    "SKD",
    "TID",
    "CWDLogits",
    "CrossKD",
    "DeFeat",
    "DenseDistillHead",
    "DenseKD",
    "DistillHead",
    "FPNDistillHead",
    "FitNet",
    "InstanceMaskDistillHead",
    "MasKD",
    "MasKDLogits",
    "MaskLogitKD",
    "PixelKD",
    "ROIDistillHead",
    "RelationDistillHead",
    "ReviewKD",
    "SemSegDistillHead",
    "build_heads",
    "outlasting_phases",
    "teacher_needed",
]

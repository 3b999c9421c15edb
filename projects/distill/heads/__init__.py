"""Distillation heads: which signals are compared, through which adapters."""

from .base import DISTILL_HEAD_REGISTRY, DistillHead, build_heads, outlasting_phases, teacher_needed
from .cirkd import CIRKD
from .crosskd import CrossKD
from .cwd import CWD, CWDLogits
from .defeat import DeFeat
from .dense import DenseDistillHead
from .densekd import DenseKD
from .dkd import DKD
from .fgd import FGD
from .fgfi import FGFI
from .fitnet import FitNet
from .fkd import FKD
from .fpn import FPNDistillHead
from .frs import FRS
from .gid import GID
from .ifvd import IFVD
from .ima import IMA
from .kd import KD
from .ld import LD
from .lgd import LGD
from .mask import InstanceMaskDistillHead
from .mask_logit_kd import MaskKD
from .maskd import MasKD, MasKDLogits
from .mgd import MGD
from .mkd import MKD
from .mssd import MSSD
from .pixelkd import PixelKD
from .pkd import PKD
from .review import ReviewKD
from .roi import ROIDistillHead
from .roikd import ROIKD
from .semantic import RelationDistillHead, SemSegDistillHead
from .skd import SKD
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
    "MaskKD",
    "PixelKD",
    "ROIDistillHead",
    "RelationDistillHead",
    "ReviewKD",
    "SemSegDistillHead",
    "build_heads",
    "outlasting_phases",
    "teacher_needed",
]

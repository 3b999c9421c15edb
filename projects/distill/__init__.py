"""Distillation of detectron2 detectors and segmenters.

Importing the package registers its meta-architectures, backbones and heads with detectron2.
"""

import warnings

from . import nets  # noqa: F401  registers backbones
from .config import add_distill_config, get_distill_cfg, validate_config
from .data import (
    cityscapes,  # noqa: F401  replaces the loaders of detectron2's Cityscapes sets
    kitti,  # noqa: F401  registers kitti_train, kitti_val
)
from .heads import DISTILL_HEAD_REGISTRY, DistillHead, FPNDistillHead
from .modeling.meta_arch import (
    DistillModel,
    DistillRCNN,
    DistillRetinaNet,
    DistillSemanticSegmentor,
)
from .section import Key, Presets, Section

__version__ = "0.1.0"

# detectron2's anchor generator calls torch.meshgrid without ``indexing``. Python's -W still wins.
warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", append=True)

__all__ = [
    "DISTILL_HEAD_REGISTRY",
    "DistillHead",
    "DistillModel",
    "DistillRCNN",
    "DistillRetinaNet",
    "DistillSemanticSegmentor",
    "FPNDistillHead",
    "Key",
    "Presets",
    "Section",
    "add_distill_config",
    "get_distill_cfg",
    "validate_config",
]

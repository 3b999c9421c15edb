"""The public names of ``distill``. Importing this module registers everything with detectron2."""

# ruff: noqa: F401

from . import nets  # registers backbones, detectors and semantic heads
from .config import add_distill_config, get_distill_cfg, validate_config
from .config.student import get_student_cfg
from .data import (
    cityscapes,  # replaces the loaders of detectron2's Cityscapes sets
    kitti,  # registers kitti_train, kitti_val
)
from .heads import (
    DISTILL_HEAD_REGISTRY,
    DenseDistillHead,
    DistillHead,
    FPNDistillHead,
    InstanceMaskDistillHead,
    RelationDistillHead,
    ROIDistillHead,
    SemSegDistillHead,
)
from .modeling.meta_arch import (
    DistillModel,
    DistillRCNN,
    DistillRetinaNet,
    DistillSemanticSegmentor,
)
from .section import Key, Presets, Section

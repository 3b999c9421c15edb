"""The mathematics of distillation: pure functions of tensors, one method a file."""

from .cirkd import (
    ClassQueues,
    class_pixels,
    class_regions,
    cross_image_relation,
    memory_contrast,
)
from .cwd import cwd
from .dense import dense_kd
from .fitnet import fitnet
from .frequency import frequency_mask, frequency_masked_mse
from .ifvd import ifvd
from .ima import ima, ima_classes
from .kd import binary_kl, categorical_kl, kd, pixel_kd
from .maskd import dice_overlap, maskd, receptive_masks
from .mkd import MKD_TERMS, channel_alignment, joint_attention, mkd, multi_scale
from .mssd import gaussian_mask, mssd
from .skd import pairwise_affinity
from .tid import (
    TID_AREAS,
    TID_SCORES,
    matched_iou,
    tid,
    tid_by_value,
    tid_information,
    tid_mask,
    tid_score,
    tid_value,
)

__all__ = [
    "MKD_TERMS",
    "TID_AREAS",
    "TID_SCORES",
    "ClassQueues",
    "binary_kl",
    "categorical_kl",
    "channel_alignment",
    "class_pixels",
    "class_regions",
    "cross_image_relation",
    "cwd",
    "dense_kd",
    "dice_overlap",
    "fitnet",
    "frequency_mask",
    "frequency_masked_mse",
    "gaussian_mask",
    "ifvd",
    "ima",
    "ima_classes",
    "joint_attention",
    "kd",
    "maskd",
    "matched_iou",
    "memory_contrast",
    "mkd",
    "mssd",
    "multi_scale",
    "pairwise_affinity",
    "pixel_kd",
    "receptive_masks",
    "tid",
    "tid_by_value",
    "tid_information",
    "tid_mask",
    "tid_score",
    "tid_value",
]

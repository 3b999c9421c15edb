"""The mathematics of distillation: pure functions of tensors, one method a file."""

from .dense import dense_kd
from .fitnet import fitnet
from .frequency import frequency_mask, frequency_masked_mse
from .ima import ima, ima_classes
from .kd import binary_kl, categorical_kl, kd
from .mkd import MKD_TERMS, channel_alignment, joint_attention, mkd, multi_scale
from .mssd import gaussian_mask, mssd
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
    "binary_kl",
    "categorical_kl",
    "channel_alignment",
    "dense_kd",
    "fitnet",
    "frequency_mask",
    "frequency_masked_mse",
    "gaussian_mask",
    "ima",
    "ima_classes",
    "joint_attention",
    "kd",
    "matched_iou",
    "mkd",
    "mssd",
    "multi_scale",
    "tid",
    "tid_by_value",
    "tid_information",
    "tid_mask",
    "tid_score",
    "tid_value",
]

"""Losses and masks of knowledge distillation: pure functions of tensors, one file per method.

N counts images, C channels, H x W the cells of a map, K classes. S and T are the maps of student
and teacher, σ is the sigmoid. Every loss computes in float32, whatever the autocast state; float64
stays float64. No loss waits for the device. Where there is nothing to distill, a loss returns a
*connected zero*: a zero with a gradient path to its inputs, as DistributedDataParallel needs.
"""

from .at import at
from .boxes import padded
from .cirkd import ClassQueues, class_pixels, class_regions, cross_image_relation, memory_contrast
from .cosine import cosine
from .crosskd import crosskd_aligned, crosskd_bins, crosskd_boxes, crosskd_classes
from .cwd import cwd
from .defeat import DeFeatTerms, defeat, defeat_masks
from .densekd import dense_kd
from .dkd import dkd, dkd_rows
from .fgd import FGDTerms, fgd, fgd_attention
from .fgfi import fgfi, fgfi_mask, fgfi_masks
from .fitnet import fitnet
from .fkd import fkd, fkd_mask, length_of_gap
from .frequency import frequency_mask, frequency_masked_mse
from .frs import feature_richness, frs, frs_classes
from .gid import general_instances, gid_feature, gid_relation, gid_response
from .ifvd import ifvd
from .ima import IMA_STATISTICS, ima, ima_classes
from .kd import binary_kl, categorical_kl, kd, pixel_kd
from .ld import ld, ld_region
from .lgd import lgd, lgd_labels, lgd_masks, lgd_pooled, lgd_rendered
from .maskd import dice_overlap, maskd, receptive_masks
from .mgd import mgd
from .mkd import MKD_TERMS, channel_alignment, joint_attention, mkd, multi_scale
from .mssd import gaussian_mask, mssd
from .normalize import NORMALIZE, channel_normalized
from .pkd import pkd
from .review import hcl
from .skd import pairwise_affinity
from .ssim import ssim
from .tid import (
    TID_AREAS,
    TID_OUTSIDE_KEY,
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
    "IMA_STATISTICS",
    "MKD_TERMS",
    "NORMALIZE",
    "TID_AREAS",
    "TID_OUTSIDE_KEY",
    "TID_SCORES",
    "ClassQueues",
    "DeFeatTerms",
    "FGDTerms",
    "at",
    "binary_kl",
    "categorical_kl",
    "channel_alignment",
    "channel_normalized",
    "class_pixels",
    "class_regions",
    "cosine",
    "cross_image_relation",
    "crosskd_aligned",
    "crosskd_bins",
    "crosskd_boxes",
    "crosskd_classes",
    "cwd",
    "defeat",
    "defeat_masks",
    "dense_kd",
    "dice_overlap",
    "dkd",
    "dkd_rows",
    "feature_richness",
    "fgd",
    "fgd_attention",
    "fgfi",
    "fgfi_mask",
    "fgfi_masks",
    "fitnet",
    "fkd",
    "fkd_mask",
    "frequency_mask",
    "frequency_masked_mse",
    "frs",
    "frs_classes",
    "gaussian_mask",
    "general_instances",
    "gid_feature",
    "gid_relation",
    "gid_response",
    "hcl",
    "ifvd",
    "ima",
    "ima_classes",
    "joint_attention",
    "kd",
    "ld",
    "ld_region",
    "length_of_gap",
    "lgd",
    "lgd_labels",
    "lgd_masks",
    "lgd_pooled",
    "lgd_rendered",
    "maskd",
    "matched_iou",
    "memory_contrast",
    "mgd",
    "mkd",
    "mssd",
    "multi_scale",
    "padded",
    "pairwise_affinity",
    "pixel_kd",
    "pkd",
    "receptive_masks",
    "ssim",
    "tid",
    "tid_by_value",
    "tid_information",
    "tid_mask",
    "tid_score",
    "tid_value",
]

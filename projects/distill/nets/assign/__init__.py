"""Assignment of priors to ground-truth boxes in dense detectors, without loops over boxes.

``geometric`` reads priors only, ``dynamic`` also predictions. The modules of a detector hold its
assignment together with the losses that use it.
"""

from .dynamic import dynamic_k
from .geometric import NO_BOX, atss_assign, nearest_point_assign
from .overlaps import complete_iou, generalized_iou
from .rtmdet import dynamic_soft_labels, rtmdet_loss
from .rtmdet_masks import (
    dynamic_masks,
    mask_centers,
    mask_kernel_size,
    mask_loss,
    sampled_masks,
)
from .yolov5 import yolov5_boxes, yolov5_loss, yolov5_targets
from .yolov7 import ota_assign
from .yolox import sim_ota, yolox_l1, yolox_loss

__all__ = [
    "NO_BOX",
    "atss_assign",
    "complete_iou",
    "dynamic_k",
    "dynamic_masks",
    "dynamic_soft_labels",
    "generalized_iou",
    "mask_centers",
    "mask_kernel_size",
    "mask_loss",
    "nearest_point_assign",
    "ota_assign",
    "rtmdet_loss",
    "sampled_masks",
    "sim_ota",
    "yolov5_boxes",
    "yolov5_loss",
    "yolov5_targets",
    "yolox_l1",
    "yolox_loss",
]

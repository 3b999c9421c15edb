"""Networks that detectron2 lacks, as ordinary registered components.

A checkpoint of a student that uses one needs only ``import distill.nets`` beside detectron2.
"""

from .pafpn import (
    PAFPN,
    build_resnet_pafpn_backbone,
    build_retinanet_resnet_pafpn_backbone,
    build_shallow_resnet_pafpn_backbone,
)
from .resnet import build_shallow_resnet_backbone, build_shallow_resnet_fpn_backbone

__all__ = [
    "PAFPN",
    "build_resnet_pafpn_backbone",
    "build_retinanet_resnet_pafpn_backbone",
    "build_shallow_resnet_backbone",
    "build_shallow_resnet_fpn_backbone",
    "build_shallow_resnet_pafpn_backbone",
]

"""Networks that detectron2 lacks, as ordinary registered components.

A checkpoint of a student that uses one needs only ``import distill.nets`` beside detectron2, and
``distill.nets.add_segmentation_config(cfg)`` if it has a dilated backbone or one of the heads here.
"""

from .config import add_segmentation_config, reads_segmentation_config
from .deeplabv3 import ASPPHead
from .pafpn import (
    PAFPN,
    build_resnet_pafpn_backbone,
    build_retinanet_resnet_pafpn_backbone,
    build_shallow_resnet_pafpn_backbone,
)
from .pspnet import PSPHead
from .resnet import (
    build_dilated_resnet_backbone,
    build_shallow_resnet_backbone,
    build_shallow_resnet_fpn_backbone,
)

__all__ = [
    "PAFPN",
    "ASPPHead",
    "PSPHead",
    "add_segmentation_config",
    "build_dilated_resnet_backbone",
    "build_resnet_pafpn_backbone",
    "build_retinanet_resnet_pafpn_backbone",
    "build_shallow_resnet_backbone",
    "build_shallow_resnet_fpn_backbone",
    "build_shallow_resnet_pafpn_backbone",
    "reads_segmentation_config",
]

"""Networks that detectron2 lacks, as ordinary registered components.

A checkpoint of a student that uses one needs only ``import distill.nets`` beside detectron2, and
``distill.nets.add_nets_config(cfg)`` if its ``student.yaml`` has keys of this package: those of
dense detectors, timm backbones, dilated backbones and the semantic heads here.
"""

from . import necks
from .atss import ATSS
from .config import DENSE_DETECTORS, add_config_read_by, add_nets_config
from .deeplabv3 import ASPPHead
from .fcos import FCOS
from .gfl import GFL
from .pafpn import PAFPN
from .pspnet import PSPHead
from .reppoints import RepPoints
from .resnet import build_dilated_resnet_backbone, build_shallow_resnet_backbone
from .timm import TimmBackbone, build_timm_backbone

__all__ = [
    "ATSS",
    "DENSE_DETECTORS",
    "FCOS",
    "GFL",
    "PAFPN",
    "ASPPHead",
    "PSPHead",
    "RepPoints",
    "TimmBackbone",
    "add_config_read_by",
    "add_nets_config",
    "build_dilated_resnet_backbone",
    "build_shallow_resnet_backbone",
    "build_timm_backbone",
    "necks",
]

"""Networks that detectron2 lacks, as ordinary registered components.

Stock detectron2 can load a student that uses one of these networks after ``import distill.nets``.
If its ``student.yaml`` has keys of this package, call ``distill.nets.add_nets_config(cfg)``
first. These are the keys of dense detectors, of the semantic heads, and of the backbones of timm,
CSPNeXt, CSPDarknet and its relatives, and dilated ResNets.
"""

from . import necks
from .atss import ATSS
from .config import add_config_read_by, add_nets_config
from .deeplabv3 import ASPPHead
from .fcos import FCOS
from .features import FeatureExtractor
from .gfl import GFL
from .lazy import LazyNetwork
from .module import ModuleBackbone, build_module_backbone
from .onnx import OnnxNetwork, build_onnx_backbone
from .pafpn import PAFPN
from .pspnet import PSPHead
from .reppoints import RepPoints
from .resnet import build_dilated_resnet_backbone, build_shallow_resnet_backbone
from .rtmdet import RTMDet
from .rtmdet_ins import RTMDetIns
from .timm import TimmBackbone, build_timm_backbone, build_timm_features
from .yolov3 import YOLOv3
from .yolov4 import YOLOv4
from .yolov5 import YOLOv5
from .yolov7 import YOLOv7
from .yolox import YOLOX

__all__ = [
    "ATSS",
    "FCOS",
    "GFL",
    "PAFPN",
    "YOLOX",
    "ASPPHead",
    "FeatureExtractor",
    "LazyNetwork",
    "ModuleBackbone",
    "OnnxNetwork",
    "PSPHead",
    "RTMDet",
    "RTMDetIns",
    "RepPoints",
    "TimmBackbone",
    "YOLOv3",
    "YOLOv4",
    "YOLOv5",
    "YOLOv7",
    "add_config_read_by",
    "add_nets_config",
    "build_dilated_resnet_backbone",
    "build_module_backbone",
    "build_onnx_backbone",
    "build_shallow_resnet_backbone",
    "build_timm_backbone",
    "build_timm_features",
    "necks",
]

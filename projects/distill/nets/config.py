"""Config keys of the networks of this package."""

from detectron2.config import CfgNode
from detectron2.projects.deeplab import add_deeplab_config

from ..section import LIST, SWITCH, TEXT, TEXTS, WHOLES, Key, Rule, add_keys, at_least
from .atss import ATSS
from .csp_pan import CSP_SECTION, CSPDARKNET_SECTION
from .fcos import FCOS
from .gfl import GFL
from .reppoints import RepPoints
from .rtmdet import RTMDet
from .rtmdet_ins import RTMDetIns
from .yolov3 import YOLOv3
from .yolov4 import YOLOv4
from .yolov5 import YOLOv5
from .yolov7 import YOLOv7
from .yolox import YOLOX

NAMED_STRIDES = Rule(
    lambda x: all(isinstance(name, str) and stride >= 1 and stride % 1 == 0 for name, stride in x),
    "a list of [output, stride], such as [['p3', 8]]",
)
_DETECTORS = {
    cls.__name__: cls.section
    for cls in (
        *(ATSS, FCOS, GFL, RepPoints, RTMDet, RTMDetIns),
        *(YOLOX, YOLOv3, YOLOv4, YOLOv5, YOLOv7),
    )
}
_DENSE_KEYS = {
    f"MODEL.{name.upper()}.{key}": value
    for name, section in _DETECTORS.items()
    for key, value in section.items()
}
_TIMM_KEYS = {
    "MODEL.TIMM.NAME": Key("resnet18", "one of timm.list_models()", TEXT),
    "MODEL.TIMM.PRETRAINED": Key(False, "download timm's weights of this model", SWITCH),
    "MODEL.TIMM.WEIGHTS": Key("", "file of weights instead: .pth or .safetensors", TEXT),
    "MODEL.TIMM.OUT_INDICES": Key(
        (), "indices of timm's maps; empty: all maps of stride >= 4", WHOLES
    ),
    "MODEL.TIMM.NORM_EVAL": Key(
        False, "batch norms keep their loaded statistics in training", SWITCH
    ),
}
_LAZY_KEYS = {
    "MODEL.LAZY.FILE": Key("", "path of a LazyConfig", TEXT),
    "MODEL.LAZY.OPTS": Key([], "KEY VALUE ... overrides of the LazyConfig", LIST),
}
_MODULE_KEYS = {
    "MODEL.MODULE.FUNCTION": Key("", "file.py:function that returns a network", TEXT),
    "MODEL.MODULE.WEIGHTS": Key("", "argument of the function", TEXT),
}
_ONNX_KEYS = {
    "MODEL.ONNX.FILE": Key("", "path of an ONNX file", TEXT),
    "MODEL.ONNX.LEVELS": Key(
        [],
        "[name, stride] of the outputs that are maps (1, C, H / stride, W / stride)",
        NAMED_STRIDES,
    ),
    "MODEL.ONNX.DETECTIONS": Key(
        (),
        "names of the outputs that are boxes (R, 4) XYXY in pixels, scores (R,) in [0, 1] and "
        "labels (R,) from 0; empty: the file has no detections",
        TEXTS,
    ),
}
_CSP_KEYS = {
    part: {f"MODEL.{name}.{key}": value for key, value in section.items()}
    for part, name, section in (
        ("_cspnext_", "CSPNEXT", CSP_SECTION),
        ("_yolo", "CSPDARKNET", CSPDARKNET_SECTION),
    )
}
"""Keys by the part of the name of the backbones that read them."""
_SEGMENTATION_KEYS = {
    "MODEL.SEM_SEG_HEAD.AUX_WEIGHT": Key(
        0.4,
        "factor of the auxiliary loss of ASPPHead and PSPHead; 0: no auxiliary head",
        at_least(0),
    ),
    "MODEL.SEM_SEG_HEAD.AUX_IN_FEATURE": Key(
        "res4", "backbone output that the auxiliary head reads", TEXT
    ),
}
NETS_KEYS: dict[str, Key] = {
    **_DENSE_KEYS,
    **_TIMM_KEYS,
    **_LAZY_KEYS,
    **_MODULE_KEYS,
    **_ONNX_KEYS,
    **_CSP_KEYS["_cspnext_"],
    **_CSP_KEYS["_yolo"],
    **_SEGMENTATION_KEYS,
}
"""Every key of this module by its dotted name."""

# Backbones and semantic heads that read the segmentation keys.
_BACKBONES = ("build_dilated_resnet_backbone", "build_resnet_deeplab_backbone")
_HEADS = ("ASPPHead", "DeepLabV3Head", "DeepLabV3PlusHead", "PSPHead")


def add_nets_config(cfg: CfgNode) -> None:
    """Add the keys of all networks of this package, with their defaults.

    detectron2's DeepLab keys are among them. Its defaults are those of DeepLabV3+ at output stride
    16. The paper's PSPNet and DeepLabV3 need other values, which
    ``configs/Cityscapes-SemanticSegmentation`` sets.
    """
    add_deeplab_config(cfg)
    add_keys(cfg, NETS_KEYS)


def add_config_read_by(network: CfgNode, cfg: CfgNode) -> None:
    """Add to ``cfg`` only the keys of :func:`add_nets_config` that the network of a config reads.

    Args:
        network: config that names the network.
        cfg: config that gets the keys.
    """
    if _reads_segmentation(network):
        add_deeplab_config(cfg)
        add_keys(cfg, _SEGMENTATION_KEYS)
    if "LazyNetwork" in _architectures(network):
        add_keys(cfg, _LAZY_KEYS)
    others = {"_timm_": _TIMM_KEYS, "_module_": _MODULE_KEYS, "_onnx_": _ONNX_KEYS}
    for part, keys in {**others, **_CSP_KEYS}.items():
        if part in network.MODEL.BACKBONE.NAME:
            add_keys(cfg, keys)
    for name, section in _DETECTORS.items():
        if name in _architectures(network):
            add_keys(cfg.MODEL, {f"{name.upper()}.{key}": value for key, value in section.items()})


def _architectures(cfg: CfgNode) -> tuple[str, str]:
    """Return the meta-architecture of a config, and that of its student or ""."""
    student = cfg.MODEL.DISTILL.STUDENT_ARCHITECTURE if "DISTILL" in cfg.MODEL else ""
    return cfg.MODEL.META_ARCHITECTURE, student


def _reads_segmentation(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKBONE.NAME in _BACKBONES or cfg.MODEL.SEM_SEG_HEAD.NAME in _HEADS

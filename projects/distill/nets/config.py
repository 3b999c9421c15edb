"""Config keys of the networks of this package."""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.config import CfgNode as CN
from detectron2.projects.deeplab import add_deeplab_config

# Backbones and semantic heads that read the keys of add_segmentation_config.
_BACKBONES = ("build_dilated_resnet_backbone", "build_resnet_deeplab_backbone")
_HEADS = ("ASPPHead", "DeepLabV3Head", "DeepLabV3PlusHead", "PSPHead")

_FOCAL = {"FOCAL_LOSS_ALPHA": 0.25, "FOCAL_LOSS_GAMMA": 2.0}
# Additional keys of each detector's section, by the name of its meta-architecture.
_DETECTORS: dict[str, dict[str, Any]] = {
    "ATSS": {
        **_FOCAL,
        "ANCHOR_SIZE": 8.0,  # side of the anchor of each cell, in strides
        "CANDIDATES": 9,  # candidate anchors per box and level
        "BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),  # weights of Box2BoxTransform
        "BOX_LOSS_WEIGHT": 2.0,
        "CENTERNESS_LOSS_WEIGHT": 1.0,
    },
    "FCOS": {
        **_FOCAL,
        "SCORE_THRESH_TEST": 0.2,  # the score is the root of class probability · centerness
        "CENTER_SAMPLING_RADIUS": 1.5,  # in strides
    },
    "GFL": {
        "ANCHOR_SIZE": 8.0,  # as in ATSS
        "CANDIDATES": 9,
        "REG_MAX": 16,  # last bin of the distribution of a side, in strides
        "QFL_BETA": 2.0,
        "BOX_LOSS_WEIGHT": 2.0,
        "DFL_LOSS_WEIGHT": 0.25,
    },
    "RepPoints": {
        **_FOCAL,
        "NUM_CONVS": 3,
        "NMS_THRESH_TEST": 0.5,
        "POINT_SCALE": 4.0,  # side of a box in strides of its level
        "POINTS_PER_OBJECT": 1,  # points that are trained to find an object
        "IOU_THRESHOLDS": [0.4, 0.5],  # refinement: background below 0.4, object from 0.5
        "INIT_LOSS_WEIGHT": 0.5,
        "REFINE_LOSS_WEIGHT": 1.0,
    },
}
DENSE_DETECTORS = tuple(_DETECTORS)
"""Meta-architectures of this package. Each has its own section of keys."""


def add_dense_config(cfg: CfgNode) -> None:
    """Add a section of keys for each dense detector of this package (``MODEL.FCOS``, ...).

    Keys that mean the same as in ``MODEL.RETINANET`` have the same name.
    """
    for name, own in _DETECTORS.items():
        section = CN()
        section.NUM_CLASSES = 80
        section.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
        section.NUM_CONVS = 4  # convolutions in each tower of the head
        section.NORM = "GN"  # norm of the towers
        section.PRIOR_PROB = 0.01
        section.SCORE_THRESH_TEST = 0.05
        section.TOPK_CANDIDATES_TEST = 1000  # per level, before NMS
        section.NMS_THRESH_TEST = 0.6
        for key, value in own.items():
            section[key] = value
        cfg.MODEL[name.upper()] = section


def add_timm_config(cfg: CfgNode) -> None:
    """Add ``MODEL.TIMM``, the keys of the timm backbones."""
    cfg.MODEL.TIMM = CN()
    cfg.MODEL.TIMM.NAME = "resnet18"  # one of timm.list_models()
    cfg.MODEL.TIMM.PRETRAINED = False  # download timm's weights of this model
    cfg.MODEL.TIMM.WEIGHTS = ""  # file of weights instead: .pth or .safetensors
    cfg.MODEL.TIMM.OUT_INDICES = ()  # indices of timm's maps; empty: all maps of stride >= 4
    cfg.MODEL.TIMM.NORM_EVAL = False  # batch norms keep their loaded statistics in training


def add_segmentation_config(cfg: CfgNode) -> None:
    """Add the keys of semantic heads: detectron2's DeepLab keys and those of this package.

    detectron2's defaults are those of DeepLabV3+ at output stride 16. The paper's PSPNet and
    DeepLabV3 need other values, which ``configs/Cityscapes-SemanticSegmentation`` sets.
    """
    add_deeplab_config(cfg)
    # Factor of the auxiliary loss of ASPPHead and PSPHead. 0 means no auxiliary head.
    cfg.MODEL.SEM_SEG_HEAD.AUX_WEIGHT = 0.4
    cfg.MODEL.SEM_SEG_HEAD.AUX_IN_FEATURE = "res4"  # backbone output that the auxiliary head reads


def add_nets_config(cfg: CfgNode) -> None:
    """Add the keys of all networks of this package, with their defaults."""
    for add in _READERS:
        add(cfg)


def add_config_read_by(network: CfgNode, cfg: CfgNode) -> None:
    """Add to ``cfg`` only the keys of :func:`add_nets_config` that the network of a config reads.

    Args:
        network: config that names the network.
        cfg: config that gets the keys.
    """
    for add, reads in _READERS.items():
        if reads(network):
            add(cfg)
    for name in _DETECTORS:
        if name not in _architectures(network):
            cfg.MODEL.pop(name.upper(), None)


def _architectures(cfg: CfgNode) -> tuple[str, str]:
    """Return the meta-architecture of a config, and that of its student or ""."""
    student = cfg.MODEL.DISTILL.STUDENT_ARCHITECTURE if "DISTILL" in cfg.MODEL else ""
    return cfg.MODEL.META_ARCHITECTURE, student


def _reads_segmentation(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKBONE.NAME in _BACKBONES or cfg.MODEL.SEM_SEG_HEAD.NAME in _HEADS


# For each group of keys, a predicate: does the network of a config read them?
_READERS: dict[Callable[[CfgNode], None], Callable[[CfgNode], bool]] = {
    add_segmentation_config: _reads_segmentation,
    add_dense_config: lambda cfg: not set(_DETECTORS).isdisjoint(_architectures(cfg)),
    add_timm_config: lambda cfg: "_timm_" in cfg.MODEL.BACKBONE.NAME,
}

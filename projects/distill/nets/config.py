"""Keys that the nets read beyond detectron2's own."""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.config import CfgNode as CN
from detectron2.projects.deeplab import add_deeplab_config

# Who reads them: names of backbones and of semantic heads.
_BACKBONES = ("build_dilated_resnet_backbone", "build_resnet_deeplab_backbone")
_HEADS = ("ASPPHead", "DeepLabV3Head", "DeepLabV3PlusHead", "PSPHead")

_FOCAL = {"FOCAL_LOSS_ALPHA": 0.25, "FOCAL_LOSS_GAMMA": 2.0}
# What a detector's section has beside the keys of all, by the name of its meta-architecture.
_DETECTORS: dict[str, dict[str, Any]] = {
    "ATSS": {
        **_FOCAL,
        "ANCHOR_SIZE": 8.0,  # side of the one anchor of a cell, in strides
        "CANDIDATES": 9,  # anchors of a level that a box may be assigned to
        "BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),  # of Box2BoxTransform
        "BOX_LOSS_WEIGHT": 2.0,
        "CENTERNESS_LOSS_WEIGHT": 1.0,
    },
    "FCOS": {
        **_FOCAL,
        "SCORE_THRESH_TEST": 0.2,  # of the root of class and centerness
        "CENTER_SAMPLING_RADIUS": 1.5,  # in strides
    },
    "GFL": {
        "ANCHOR_SIZE": 8.0,  # as of ATSS
        "CANDIDATES": 9,
        "REG_MAX": 16,  # the last bin of a side's distribution, in strides
        "QFL_BETA": 2.0,
        "BOX_LOSS_WEIGHT": 2.0,
        "DFL_LOSS_WEIGHT": 0.25,
    },
    "RepPoints": {
        **_FOCAL,
        "NUM_CONVS": 3,
        "NMS_THRESH_TEST": 0.5,
        "POINT_SCALE": 4.0,  # side of a box in strides of its level
        "POINTS_PER_OBJECT": 1,  # that learn to find it
        "IOU_THRESHOLDS": [0.4, 0.5],  # of the refinement: background below, object from
        "INIT_LOSS_WEIGHT": 0.5,
        "REFINE_LOSS_WEIGHT": 1.0,
    },
}
DENSE_DETECTORS = tuple(_DETECTORS)
"""Meta-architectures of this package, with a section of keys each."""


def add_dense_config(cfg: CfgNode) -> None:
    """Add a section of keys for each dense detector of this package: ``MODEL.FCOS``, ....

    Their names are those of ``MODEL.RETINANET`` where they mean the same.
    """
    for name, own in _DETECTORS.items():
        section = CN()
        section.NUM_CLASSES = 80
        section.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
        section.NUM_CONVS = 4  # of each tower of the head
        section.NORM = "GN"  # of the towers
        section.PRIOR_PROB = 0.01
        section.SCORE_THRESH_TEST = 0.05
        section.TOPK_CANDIDATES_TEST = 1000  # of a level, before NMS
        section.NMS_THRESH_TEST = 0.6
        for key, value in own.items():
            section[key] = value
        cfg.MODEL[name.upper()] = section


def add_timm_config(cfg: CfgNode) -> None:
    """Add ``MODEL.TIMM``, the keys of the backbones ``build_..._timm_...``."""
    cfg.MODEL.TIMM = CN()
    cfg.MODEL.TIMM.NAME = "resnet18"  # of timm.list_models()
    cfg.MODEL.TIMM.PRETRAINED = False  # download timm's weights of that model
    cfg.MODEL.TIMM.WEIGHTS = ""  # or a file of them: .pth or .safetensors
    cfg.MODEL.TIMM.OUT_INDICES = ()  # of timm's maps; empty: those of stride 4 and more
    cfg.MODEL.TIMM.NORM_EVAL = False  # batch norms keep their loaded statistics in training


def add_segmentation_config(cfg: CfgNode) -> None:
    """Add detectron2's DeepLab keys, with its defaults, and this package's to a config.

    The paper's PSPNet and DeepLabV3 need other values than those defaults, which are DeepLabV3+'s
    at output stride 16; configs/Cityscapes-SemanticSegmentation sets them.
    """
    add_deeplab_config(cfg)
    # Of ASPPHead and PSPHead: factor of the auxiliary loss; 0: no auxiliary head.
    cfg.MODEL.SEM_SEG_HEAD.AUX_WEIGHT = 0.4
    cfg.MODEL.SEM_SEG_HEAD.AUX_IN_FEATURE = "res4"  # output of the backbone that it reads


def add_nets_config(cfg: CfgNode) -> None:
    """Add the keys of all networks of this package, with their defaults, to a config."""
    for add in _READERS:
        add(cfg)


def add_config_read_by(network: CfgNode, cfg: CfgNode) -> None:
    """Add to ``cfg`` those keys of :func:`add_nets_config` that the network of a config reads."""
    for add, reads in _READERS.items():
        if reads(network):
            add(cfg)
    for name in _DETECTORS:
        if name not in _architectures(network):
            cfg.MODEL.pop(name.upper(), None)


def _architectures(cfg: CfgNode) -> tuple[str, str]:
    student = cfg.MODEL.DISTILL.STUDENT_ARCHITECTURE if "DISTILL" in cfg.MODEL else ""
    return cfg.MODEL.META_ARCHITECTURE, student


def _reads_segmentation(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKBONE.NAME in _BACKBONES or cfg.MODEL.SEM_SEG_HEAD.NAME in _HEADS


# Groups of keys, and whether the network of a config reads them.
_READERS: dict[Callable[[CfgNode], None], Callable[[CfgNode], bool]] = {
    add_segmentation_config: _reads_segmentation,
    add_dense_config: lambda cfg: not set(_DETECTORS).isdisjoint(_architectures(cfg)),
    add_timm_config: lambda cfg: "_timm_" in cfg.MODEL.BACKBONE.NAME,
}

"""The config keys of the networks here, in addition to detectron2's."""

from detectron2.config import CfgNode
from detectron2.projects.deeplab import add_deeplab_config

from ..section import SWITCH, TEXT, WHOLES, Key, add_keys, at_least
from .atss import ATSS
from .fcos import FCOS
from .gfl import GFL
from .reppoints import RepPoints

_DETECTORS = {cls.__name__: cls.section for cls in (ATSS, FCOS, GFL, RepPoints)}
DENSE_DETECTORS = tuple(_DETECTORS)
"""Meta-architectures of this package; the keys of each are in ``MODEL.<NAME>``."""

_DENSE_KEYS = {
    f"MODEL.{name.upper()}.{key}": value
    for name, section in _DETECTORS.items()
    for key, value in section.items()
}
_TIMM_KEYS = {
    "MODEL.TIMM.NAME": Key("resnet18", "a name of timm.list_models()", TEXT),
    "MODEL.TIMM.PRETRAINED": Key(False, "download timm's weights of the model", SWITCH),
    "MODEL.TIMM.WEIGHTS": Key("", "file of the model's weights: .pth or .safetensors", TEXT),
    "MODEL.TIMM.OUT_INDICES": Key(
        (), "indices of timm's feature maps; empty: those of stride 4 and more", WHOLES
    ),
    "MODEL.TIMM.NORM_EVAL": Key(
        False, "batch norms keep their loaded statistics in training", SWITCH
    ),
}
_SEGMENTATION_KEYS = {
    "MODEL.SEM_SEG_HEAD.AUX_WEIGHT": Key(
        0.4,
        "factor of the auxiliary loss of ASPPHead and PSPHead; 0: no auxiliary head",
        at_least(0),
    ),
    "MODEL.SEM_SEG_HEAD.AUX_IN_FEATURE": Key(
        "res4", "output of the backbone that the auxiliary head reads", TEXT
    ),
}
NETS_KEYS: dict[str, Key] = {**_DENSE_KEYS, **_TIMM_KEYS, **_SEGMENTATION_KEYS}
"""Every key of this module by its dotted name."""

# Readers of the segmentation keys: names of backbones and of semantic heads.
_BACKBONES = ("build_dilated_resnet_backbone", "build_resnet_deeplab_backbone")
_HEADS = ("ASPPHead", "DeepLabV3Head", "DeepLabV3PlusHead", "PSPHead")


def add_nets_config(cfg: CfgNode) -> None:
    """Add the keys of all networks of this package, with their defaults, to a config.

    Among them are detectron2's DeepLab keys with its defaults, which are DeepLabV3+'s at output
    stride 16. PSPNet and DeepLabV3 need others, which configs/Cityscapes-SemanticSegmentation sets.
    """
    add_deeplab_config(cfg)
    add_keys(cfg, NETS_KEYS)


def add_config_read_by(network: CfgNode, cfg: CfgNode) -> None:
    """Add to ``cfg`` those keys of :func:`add_nets_config` that the network of a config reads."""
    if _reads_segmentation(network):
        add_deeplab_config(cfg)
        add_keys(cfg, _SEGMENTATION_KEYS)
    if "_timm_" in network.MODEL.BACKBONE.NAME:
        add_keys(cfg, _TIMM_KEYS)
    for name, section in _DETECTORS.items():
        if name in _architectures(network):
            add_keys(cfg.MODEL, {f"{name.upper()}.{key}": value for key, value in section.items()})


def _architectures(cfg: CfgNode) -> tuple[str, str]:
    student = cfg.MODEL.DISTILL.STUDENT_ARCHITECTURE if "DISTILL" in cfg.MODEL else ""
    return cfg.MODEL.META_ARCHITECTURE, student


def _reads_segmentation(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKBONE.NAME in _BACKBONES or cfg.MODEL.SEM_SEG_HEAD.NAME in _HEADS

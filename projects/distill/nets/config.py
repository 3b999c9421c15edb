"""Keys that the nets read beyond detectron2's own."""

from detectron2.config import CfgNode
from detectron2.projects.deeplab import add_deeplab_config

# Who reads them: names of backbones and of semantic heads.
_BACKBONES = ("build_dilated_resnet_backbone", "build_resnet_deeplab_backbone")
_HEADS = ("ASPPHead", "DeepLabV3Head", "DeepLabV3PlusHead", "PSPHead")


def add_segmentation_config(cfg: CfgNode) -> None:
    """Add detectron2's DeepLab keys, with its defaults, and this package's to a config.

    The paper's PSPNet and DeepLabV3 need other values than those defaults, which are DeepLabV3+'s
    at output stride 16; configs/Cityscapes-SemanticSegmentation sets them.
    """
    add_deeplab_config(cfg)
    # Of ASPPHead and PSPHead: factor of the auxiliary loss; 0: no auxiliary head.
    cfg.MODEL.SEM_SEG_HEAD.AUX_WEIGHT = 0.4
    cfg.MODEL.SEM_SEG_HEAD.AUX_IN_FEATURE = "res4"  # output of the backbone that it reads


def reads_segmentation_config(cfg: CfgNode) -> bool:
    """Whether the network of a config reads keys of :func:`add_segmentation_config`."""
    return cfg.MODEL.BACKBONE.NAME in _BACKBONES or cfg.MODEL.SEM_SEG_HEAD.NAME in _HEADS

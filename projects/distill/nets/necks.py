"""Backbones with a neck, registered by name.

    build_<bottom-up>_<neck>_backbone              P2-P5, and P6 by subsampling: for R-CNN
    build_retinanet_<bottom-up>_<neck>_backbone    P3-P5, and P6, P7 by strided convolutions
    build_fcos_<bottom-up>_fpn_backbone            same, but P6 is computed from P5, not C5

Bottom-ups are ``resnet`` (detectron2's, 18 to 152 layers, also ResNeXt), ``shallow_resnet`` and
``timm``. Necks are ``fpn`` and ``pafpn``; P6 and P7 of ``pafpn`` are computed from P5. detectron2
itself has two of these backbones.

``MODEL.FPN.IN_FEATURES`` names the maps of the bottom-up that a neck reads: res2 to res5 in the
first row, res3 to res5 in the others.
"""

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from .pafpn import PAFPN
from .resnet import build_shallow_resnet_backbone
from .timm import build_timm_backbone

Builder = Callable[[CfgNode, ShapeSpec], Backbone]
TopBlock = Callable[[CfgNode, Backbone], nn.Module]

BOTTOM_UPS: dict[str, Builder] = {
    "resnet": build_resnet_backbone,
    "shallow_resnet": build_shallow_resnet_backbone,
    "timm": build_timm_backbone,
}


def _top_by_subsampling(cfg: CfgNode, bottom_up: Backbone) -> nn.Module:
    return LastLevelMaxPool()


def _top_from_c5(cfg: CfgNode, bottom_up: Backbone) -> nn.Module:
    last = cfg.MODEL.FPN.IN_FEATURES[-1]
    channels = bottom_up.output_shape()[last].channels
    return LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature=last)


def _top_from_p5(cfg: CfgNode, bottom_up: Backbone) -> nn.Module:
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return LastLevelP6P7(channels, channels, in_feature="p5")


def _fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module | None) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _pafpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> PAFPN:
    return PAFPN(_fpn(cfg, bottom_up, None), top_block, cfg.MODEL.FPN.NORM)


def _register(
    name: str,
    build_bottom_up: Builder,
    neck: Callable[[CfgNode, Backbone, nn.Module], Backbone],
    top: TopBlock,
) -> None:
    def build(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
        bottom_up = build_bottom_up(cfg, input_shape)
        return neck(cfg, bottom_up, top(cfg, bottom_up))

    build.__name__ = build.__qualname__ = name
    if name not in BACKBONE_REGISTRY:  # detectron2 has two of these names itself
        BACKBONE_REGISTRY.register(build)


for _name, _builder in BOTTOM_UPS.items():
    _register(f"build_{_name}_fpn_backbone", _builder, _fpn, _top_by_subsampling)
    _register(f"build_{_name}_pafpn_backbone", _builder, _pafpn, _top_by_subsampling)
    _register(f"build_retinanet_{_name}_fpn_backbone", _builder, _fpn, _top_from_c5)
    _register(f"build_retinanet_{_name}_pafpn_backbone", _builder, _pafpn, _top_from_p5)
    _register(f"build_fcos_{_name}_fpn_backbone", _builder, _fpn, _top_from_p5)

"""ResNets smaller than detectron2's smallest."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem

BLOCKS_PER_STAGE = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


@BACKBONE_REGISTRY.register()
def build_shallow_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """A ResNet of basic blocks: depth 10, 18 or 34 and any width.

    ``MODEL.RESNETS.RES2_OUT_CHANNELS`` is the width of the first stage (64 in the paper) and
    doubles with every stage.

    Raises:
        ValueError: another depth.
    """
    node = cfg.MODEL.RESNETS
    if node.DEPTH not in BLOCKS_PER_STAGE:
        raise ValueError(
            f"MODEL.RESNETS.DEPTH is {node.DEPTH}; build_shallow_resnet_backbone has "
            f"{sorted(BLOCKS_PER_STAGE)}"
        )
    stem = BasicStem(input_shape.channels, node.STEM_OUT_CHANNELS, node.NORM)
    stages, in_channels = [], node.STEM_OUT_CHANNELS
    for i, num_blocks in enumerate(BLOCKS_PER_STAGE[node.DEPTH]):
        out_channels = node.RES2_OUT_CHANNELS * 2**i
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks,
                stride_per_block=[1 if i == 0 else 2] + [1] * (num_blocks - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                norm=node.NORM,
            )
        )
        in_channels = out_channels
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    return ResNet(stem, stages, out_features=node.OUT_FEATURES, freeze_at=freeze_at)


@BACKBONE_REGISTRY.register()
def build_shallow_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """:func:`build_shallow_resnet_backbone` with an FPN, P2-P6."""
    return FPN(
        bottom_up=build_shallow_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )

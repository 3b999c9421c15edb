"""ResNets that detectron2 lacks: shallower, narrower, and dilated ones of every depth."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from detectron2.projects.deeplab.resnet import DeepLabStem

BLOCKS_PER_STAGE = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}  # basic blocks
BOTTLENECKS_PER_STAGE = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
STEMS = {"basic": BasicStem, "deeplab": DeepLabStem}


@BACKBONE_REGISTRY.register()
def build_shallow_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a ResNet with basic blocks: depth 10, 18 or 34, and any width.

    ``MODEL.RESNETS.RES2_OUT_CHANNELS`` is the width of the first stage (64 in the paper). The width
    doubles with every stage.

    Raises:
        ValueError: if the depth is not supported.
    """
    node = cfg.MODEL.RESNETS
    if node.DEPTH not in BLOCKS_PER_STAGE:
        raise ValueError(
            f"MODEL.RESNETS.DEPTH is {node.DEPTH}; build_shallow_resnet_backbone supports "
            f"{sorted(BLOCKS_PER_STAGE)}"
        )
    stem = BasicStem(input_shape.channels, node.STEM_OUT_CHANNELS, node.NORM)
    stages = list(_basic_stages(node, _steps(1, 1)))
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    return ResNet(stem, stages, out_features=node.OUT_FEATURES, freeze_at=freeze_at)


class DilatedBasicBlock(BasicBlock):
    """detectron2's basic block with dilated convolutions. Parameter names are unchanged.

    Args:
        in_channels, out_channels, stride, norm: as in detectron2's ``BasicBlock``.
        dilation: dilation of the second convolution.
        first_dilation: dilation of the first convolution, which has the stride.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        norm: str = "BN",
        dilation: int = 1,
        first_dilation: int = 1,
    ):
        super().__init__(in_channels, out_channels, stride=stride, norm=norm)
        for conv, step in ((self.conv1, first_dilation), (self.conv2, dilation)):
            conv.dilation = conv.padding = (step, step)


class DilatedResNet(ResNet):
    """A ResNet whose images are padded to whole cells of its coarsest output.

    Only then does a map of stride s, enlarged s times, have the size of the labels.
    """

    @property
    def size_divisibility(self) -> int:
        return max(shape.stride for shape in self.output_shape().values())


@BACKBONE_REGISTRY.register()
def build_dilated_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a ResNet of depth 10, 18, 34, 50, 101 or 152 with output stride 32, 16 or 8.

    ``MODEL.RESNETS.(RES4_DILATION, RES5_DILATION)`` are (1, 1), (1, 2) or (2, 4) for these strides.
    A dilated stage has no stride. The dilation of its convolutions compensates for the strides that
    are left out before it. Therefore a network that was trained with strides gives the same values
    at the cells that it had.

    Two settings come from detectron2's DeepLab. ``STEM_TYPE`` is ``basic`` (one 7x7 convolution) or
    ``deeplab`` (three 3x3 convolutions). ``RES5_MULTI_GRID`` multiplies the dilations of the three
    bottlenecks of res5; basic blocks ignore it. The names in the state dict are those of
    detectron2's ResNets.

    Raises:
        ValueError: if the depth, stem or dilation is not supported, or deformable convolutions are
            requested.
    """
    node = cfg.MODEL.RESNETS
    _check_dilated(node)
    stem = STEMS[node.STEM_TYPE](input_shape.channels, node.STEM_OUT_CHANNELS, node.NORM)
    stages_of = _basic_stages if node.DEPTH in BLOCKS_PER_STAGE else _bottleneck_stages
    stages = list(stages_of(node, _steps(node.RES4_DILATION, node.RES5_DILATION)))
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    return DilatedResNet(stem, stages, out_features=node.OUT_FEATURES, freeze_at=freeze_at)


def _check_dilated(node: CfgNode) -> None:
    """Raise ValueError if the config has a setting that the dilated ResNet does not support."""
    depths = sorted(BLOCKS_PER_STAGE | BOTTLENECKS_PER_STAGE)
    dilations = (node.RES4_DILATION, node.RES5_DILATION)
    for keys, value, choices in (
        ("DEPTH", node.DEPTH, depths),
        ("STEM_TYPE", node.STEM_TYPE, sorted(STEMS)),
        ("(RES4_DILATION, RES5_DILATION)", dilations, [(1, 1), (1, 2), (2, 4)]),
        ("DEFORM_ON_PER_STAGE", any(node.DEFORM_ON_PER_STAGE), [False]),
    ):
        if value not in choices:
            raise ValueError(
                f"MODEL.RESNETS.{keys} is {value}; build_dilated_resnet_backbone supports {choices}"
            )


class _Step(NamedTuple):
    """Stride and dilations of one stage."""

    stride: int
    before: int  # dilation before the position of the stride
    dilation: int  # dilation after it


def _steps(res4_dilation: int, res5_dilation: int) -> list[_Step]:
    """Return the steps of res2 to res5. Where the dilation grows, it replaces the stride."""
    dilations = [1, 1, 1, res4_dilation, res5_dilation]
    return [
        _Step(2 if stage > 0 and before == dilation else 1, before, dilation)
        for stage, (before, dilation) in enumerate(pairwise(dilations))
    ]


def _basic_stages(node: CfgNode, steps: list[_Step]) -> Iterator[list[CNNBlockBase]]:
    in_channels, out_channels = node.STEM_OUT_CHANNELS, node.RES2_OUT_CHANNELS
    for number, step in zip(BLOCKS_PER_STAGE[node.DEPTH], steps):
        yield ResNet.make_stage(
            DilatedBasicBlock,
            number,
            in_channels=in_channels,
            out_channels=out_channels,
            stride_per_block=[step.stride] + [1] * (number - 1),
            first_dilation_per_block=[step.before] + [step.dilation] * (number - 1),
            dilation=step.dilation,
            norm=node.NORM,
        )
        in_channels, out_channels = out_channels, out_channels * 2


def _bottleneck_stages(node: CfgNode, steps: list[_Step]) -> Iterator[list[CNNBlockBase]]:
    in_channels, out_channels = node.STEM_OUT_CHANNELS, node.RES2_OUT_CHANNELS
    width = node.NUM_GROUPS * node.WIDTH_PER_GROUP
    for stage, (number, step) in enumerate(zip(BOTTLENECKS_PER_STAGE[node.DEPTH], steps)):
        # The first 3x3 convolution comes after the stride, or has the stride itself. In the second
        # case it has the dilation before the stride.
        first = step.dilation if node.STRIDE_IN_1X1 else step.before
        dilations = [first] + [step.dilation] * (number - 1)
        if stage == 3:
            dilations = [x * grid for x, grid in zip(dilations, node.RES5_MULTI_GRID)]
        yield ResNet.make_stage(
            BottleneckBlock,
            number,
            in_channels=in_channels,
            out_channels=out_channels,
            bottleneck_channels=width,
            stride_per_block=[step.stride] + [1] * (number - 1),
            dilation_per_block=dilations,
            num_groups=node.NUM_GROUPS,
            stride_in_1x1=node.STRIDE_IN_1X1,
            norm=node.NORM,
        )
        in_channels, out_channels, width = out_channels, out_channels * 2, width * 2

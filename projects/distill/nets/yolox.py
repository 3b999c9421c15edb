"""YOLOX (Ge et al., "YOLOX: exceeding YOLO series in 2021")."""

import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor, nn

from ..section import SWITCH, Key, Section
from .blocks import ConvStyle
from .cspdarknet import YOLOX_NETWORK
from .dense import (
    YOLO_SECTION,
    ObjectnessDetector,
    init_bias,
    yolo_arguments,
    yolo_head_arguments,
)

LARGEST = 1e4  # sides of decoded boxes are at most this many strides, so that none is infinite


@META_ARCH_REGISTRY.register()
class YOLOX(ObjectnessDetector):
    """YOLOX: each cell predicts class scores, an objectness, and a box.

    The authors predict a centre in strides from the cell's top left corner, and the logarithm of
    the size in strides. Here deltas are relative to the cell's middle, in detectron2's own encoding
    with the cell as prior. The head subtracts 0.5 for that.

    The authors train on BGR images without normalization: ``PIXEL_MEAN`` 0 and ``PIXEL_STD`` 1.
    They keep a detection of each prior's best class only.

    Args:
        kwargs: arguments of :class:`~distill.nets.dense.PriorDetector`.
    """

    section = Section(
        MULTI_LABEL_TEST=False,
        DEPTHWISE=Key(False, "depthwise separable 3x3 convolutions, as in nano's head", SWITCH),
    ).on_top_of(YOLO_SECTION)

    @configurable
    def __init__(self, **kwargs: Any):
        transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0), scale_clamp=math.log(LARGEST))
        super().__init__(box2box_transform=transform, **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.YOLOX
        arguments = yolo_arguments(cfg, node)
        style = YOLOX_NETWORK.style(node.NORM, node.DEPTHWISE)
        return {**arguments, "head": YOLOXHead(**yolo_head_arguments(node, arguments, style))}


class YOLOXHead(nn.Module):
    """YOLOX's decoupled head (Fig. 2). Levels share nothing.

    All its convolutions have as many channels as the finest level.

    Args:
        input_shape: shape of each level.
        num_classes: K.
        num_convs: convolutions before the predictors of classes, and before those of boxes.
        style: norm and activation.
        prior_prob: probability of a class, and of an object, at initialization.
    """

    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_convs: int,
        style: ConvStyle,
        prior_prob: float = 0.01,
    ):
        super().__init__()
        width = input_shape[0].channels
        levels = range(len(input_shape))

        def tower() -> nn.Module:
            return nn.Sequential(*(style.spatial(width, width) for _ in range(num_convs)))

        self.stems = nn.ModuleList(style.conv(x.channels, width) for x in input_shape)
        self.cls_towers = nn.ModuleList(tower() for _ in levels)
        self.reg_towers = nn.ModuleList(tower() for _ in levels)
        self.cls_score = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for _ in levels)
        self.bbox_pred = nn.ModuleList(nn.Conv2d(width, 4, 1) for _ in levels)
        self.objectness = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in levels)
        for predictor in (*self.cls_score, *self.objectness):
            init_bias(predictor, prior_prob)
        middle = torch.tensor([0.5, 0.5, 0.0, 0.0]).view(4, 1, 1)
        self.register_buffer("middle", middle, persistent=False)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return logits (N, K, Hi, Wi), deltas (N, 4, Hi, Wi) and objectness (N, 1, Hi, Wi)."""
        logits, deltas, objectness = [], [], []
        for level, x in enumerate(features):
            x = self.stems[level](x)
            located = self.reg_towers[level](x)
            logits.append(self.cls_score[level](self.cls_towers[level](x)))
            deltas.append(self.bbox_pred[level](located) - self.middle)
            objectness.append(self.objectness[level](located))
        return logits, deltas, objectness

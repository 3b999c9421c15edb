"""YOLOX (Ge et al., "YOLOX: exceeding YOLO series in 2021")."""

import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..section import SWITCH, Key, Section, at_least, one_of
from ..utils.distributed import reduce_mean
from ..utils.training import current_iteration
from .assign import sim_ota, yolox_l1, yolox_loss
from .assign.yolox import VARIANTS
from .blocks import ConvStyle
from .cspdarknet import YOLOX_NETWORK
from .dense import (
    YOLO_SECTION,
    DynamicDetector,
    ObjectnessDetector,
    init_bias,
    points_and_strides,
    yolo_arguments,
    yolo_head_arguments,
)

LARGEST = 1e4  # sides of decoded boxes are at most this many strides, so that none is infinite


@META_ARCH_REGISTRY.register()
class YOLOX(ObjectnessDetector, DynamicDetector):
    """YOLOX: each cell predicts class scores, an objectness, and a box.

    The authors predict a centre in strides from the cell's top left corner, and the logarithm of
    the size in strides. Here deltas are relative to the cell's middle, in detectron2's own encoding
    with the cell as prior. The head subtracts 0.5 for that.

    The authors train on BGR images without normalization: ``PIXEL_MEAN`` 0 and ``PIXEL_STD`` 1.
    They keep a detection of each prior's best class only.

    Cells are assigned by :func:`~distill.nets.assign.sim_ota`. The losses are those of
    :func:`~distill.nets.assign.yolox_loss`: ``loss_cls``, ``loss_box_reg`` and ``loss_obj``. They
    are divided by the number of matched cells, a mean over processes of at least 1 in the whole
    batch. From ``l1_from_iter`` on there is :func:`~distill.nets.assign.yolox_l1`, ``loss_l1``. The
    authors use it in the last 15 epochs.

    Args:
        variant: variant of SimOTA, ``"paper"`` or ``"repository"``.
        box_loss_weight: factor of the IoU loss.
        l1_from_iter: first iteration with the L1 loss; -1: none.
        kwargs: arguments of :class:`~distill.nets.dense.PriorDetector`.
    """

    section = Section(
        MULTI_LABEL_TEST=False,
        ASSIGNMENT=Key(
            "paper",
            "SimOTA of the paper, or of the authors' repository since January 2023",
            one_of(*VARIANTS),
        ),
        BOX_LOSS_WEIGHT=Key(5.0, "factor of the IoU loss", at_least(0)),
        L1_FROM_ITER=Key(-1, "first iteration with the L1 loss; -1: no L1 loss", at_least(-1)),
        DEPTHWISE=Key(False, "depthwise separable 3x3 convolutions, as in nano's head", SWITCH),
    ).on_top_of(YOLO_SECTION)

    @configurable
    def __init__(
        self,
        *,
        variant: str = "paper",
        box_loss_weight: float = 5.0,
        l1_from_iter: int = -1,
        **kwargs: Any,
    ):
        transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0), scale_clamp=math.log(LARGEST))
        super().__init__(box2box_transform=transform, **kwargs)
        self.variant = variant
        self.box_loss_weight = box_loss_weight
        self.l1_from_iter = l1_from_iter

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.YOLOX
        arguments = yolo_arguments(cfg, node)
        style = YOLOX_NETWORK.style(node.NORM, node.DEPTHWISE)
        return {
            **arguments,
            "head": YOLOXHead(**yolo_head_arguments(node, arguments, style)),
            "variant": node.ASSIGNMENT,
            "box_loss_weight": node.BOX_LOSS_WEIGHT,
            "l1_from_iter": node.L1_FROM_ITER,
        }

    def losses(
        self, priors: list[Boxes], predictions: Any, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        logits, deltas, objectness = (
            self.flat(maps, width) for maps, width in zip(predictions, (self.num_classes, 4, 1))
        )
        boxes, exists = self.all_boxes(deltas, priors), objectness[..., 0]
        targets = self.dynamic_targets(priors, gt_instances, logits, exists, boxes)
        positive = targets.matched >= 0
        number = reduce_mean(positive.sum())
        losses = yolox_loss(logits, exists, boxes, *targets[:3], number, self.box_loss_weight)
        if 0 <= self.l1_from_iter <= current_iteration():
            regression = deltas + self.head.middle.flatten()
            cells = points_and_strides(priors)
            losses["loss_l1"] = yolox_l1(regression, *cells, positive, targets.boxes, number)
        return losses

    def match(
        self, points: Tensor, strides: Tensor, truth: Instances, *predicted: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits, objectness, boxes = predicted
        return sim_ota(
            logits,
            objectness,
            boxes,
            points,
            strides,
            truth.gt_boxes.tensor,
            truth.gt_classes,
            variant=self.variant,
        )


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

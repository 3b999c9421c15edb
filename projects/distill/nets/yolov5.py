"""YOLOv5 (ultralytics, v6.0 to v7.0; there is no paper)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor, nn

from ..section import Key, Rule, Section
from .dense import YOLO_SECTION, ObjectnessDetector, input_shapes, yolo_arguments

Size = tuple[float, float]

ANCHORS = [
    [[10, 13], [16, 30], [33, 23]],
    [[30, 61], [62, 45], [59, 119]],
    [[116, 90], [156, 198], [373, 326]],
]
SIZES_PER_LEVEL = Rule(
    lambda x: (
        len(x) > 0
        and len({len(level) for level in x}) == 1
        and all(len(size) == 2 and min(size) > 0 for level in x for size in level)
    ),
    "one list per level, of equally many [width, height] above 0",
)
OBJECTS = 8  # objects that a new head expects in an image of IMAGE x IMAGE pixels
IMAGE = 640
CLASS_SHARE = 0.6  # sum of the class probabilities that a new head gives to an object


@META_ARCH_REGISTRY.register()
class YOLOv5(ObjectnessDetector):
    """YOLOv5: each anchor of each cell predicts class scores, an objectness, and a box.

    Deltas are in detectron2's own encoding. A centre is at most a stride from the middle of its
    cell, and a side is at most four times that of its anchor.

    The authors train on RGB images in [0, 1]: ``INPUT.FORMAT`` RGB, ``PIXEL_MEAN`` 0 and
    ``PIXEL_STD`` 255. They pad images on both sides. Here padding is at the bottom and at the
    right, which needs no offset afterwards. They keep 30000 boxes of all levels together for NMS;
    here this limit holds per level.

    Args:
        prior_sizes: (width, height) in pixels of the anchors of each level.
        kwargs: arguments of :class:`~distill.nets.dense.PriorDetector`.
    """

    section = Section(
        NUM_CONVS=None,
        NORM=None,
        PRIOR_PROB=None,
        NMS_THRESH_TEST=0.6,
        ANCHORS=Key(
            ANCHORS, "width and height in pixels of the anchors of each level", SIZES_PER_LEVEL
        ),
    ).on_top_of(YOLO_SECTION)

    @configurable
    def __init__(self, *, prior_sizes: Sequence[Sequence[Size]], **kwargs: Any):
        transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
        super().__init__(prior_sizes=prior_sizes, box2box_transform=transform, **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.YOLOV5
        arguments = yolo_arguments(cfg, node)
        inputs = input_shapes(arguments)
        if len(node.ANCHORS) != len(inputs):
            raise ValueError(
                f"MODEL.YOLOV5.ANCHORS has {len(node.ANCHORS)} levels; the head reads "
                f"{len(inputs)}: {', '.join(node.IN_FEATURES)}"
            )
        head = YOLOv5Head(
            input_shape=inputs, num_classes=node.NUM_CLASSES, anchor_sizes=node.ANCHORS
        )
        return {**arguments, "head": head, "prior_sizes": node.ANCHORS}


class YOLOv5Head(nn.Module):
    """YOLOv5's head: one 1x1 convolution per level.

    Its channels are, for each anchor, x, y, width, height, objectness and classes.

    Args:
        input_shape: shape of each level.
        num_classes: K.
        anchor_sizes: (width, height) in pixels of the A anchors of each level.
    """

    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        anchor_sizes: Sequence[Sequence[Size]],
    ):
        super().__init__()
        self.num_anchors = len(anchor_sizes[0])
        self.predictors = nn.ModuleList(
            nn.Conv2d(x.channels, self.num_anchors * (5 + num_classes), 1) for x in input_shape
        )
        self.strides: list[int] = [x.stride for x in input_shape]
        for predictor, stride in zip(self.predictors, self.strides):
            self._init_bias(predictor, stride, num_classes)
        sizes = torch.tensor(anchor_sizes, dtype=torch.float32)
        self.anchor_sizes: Tensor
        self.register_buffer("anchor_sizes", sizes[:, None, :, :, None, None], persistent=False)

    @torch.no_grad()
    def _init_bias(self, predictor: Any, stride: int, num_classes: int) -> None:
        """Add the logit of the expected objects and classes to PyTorch's random biases."""
        bias = predictor.bias.view(self.num_anchors, -1)
        bias[:, 4] += math.log(OBJECTS / (IMAGE / stride) ** 2)
        bias[:, 5:] += math.log(CLASS_SHARE / (num_classes - 0.99999))

    def forward(
        self, features: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Return logits, deltas, objectness and raw boxes of each level.

        They are (N, A · K, Hi, Wi), (N, A · 4, Hi, Wi), (N, A, Hi, Wi) and (N, A · 4, Hi, Wi). Raw
        boxes are the predictions t from which the deltas are computed.
        """
        levels = [self._level(k, x) for k, x in enumerate(features)]
        logits, deltas, objectness, raw = map(list, zip(*levels))
        return logits, deltas, objectness, raw

    def _level(self, level: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = self.predictors[level](x).unflatten(1, (self.num_anchors, -1))  # N, A, 5 + K, H, W
        raw, objectness, logits = output[:, :, :4], output[:, :, 4], output[:, :, 5:]
        deltas = self.deltas(raw.float(), level)
        return logits.flatten(1, 2), deltas.flatten(1, 2), objectness, raw.flatten(1, 2)

    def deltas(self, raw: Tensor, level: int) -> Tensor:
        """Return detectron2's deltas of raw boxes.

        The authors' form with the cell's corner x, the stride s and the anchor's size a::

            centre = (2 * sigmoid(t_xy) - 0.5 + x) * s
            size = (2 * sigmoid(t_wh)) ** 2 * a

        Args:
            raw: (N, A, 4, H, W).
            level: index of the level.
        """
        centre, size = raw.split(2, dim=2)
        shift = (2 * centre.sigmoid() - 1) * self.strides[level] / self.anchor_sizes[level]
        growth = 2 * (math.log(2) + F.logsigmoid(size))  # log(2σ) would be −∞ for very negative t
        return torch.cat([shift, growth], 2)

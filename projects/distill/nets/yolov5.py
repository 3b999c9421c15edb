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
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import Tensor, nn

from ..section import Key, Rule, Section, at_least, list_of
from .assign import yolov5_boxes, yolov5_loss
from .dense import YOLO_SECTION, ObjectnessDetector, Targets, input_shapes, yolo_arguments

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
ABOVE_1 = Rule(lambda x: x > 1, "above 1")
OBJECTS = 8  # objects that a new head expects in an image of IMAGE x IMAGE pixels
IMAGE = 640
LEVELS, CLASSES = 3, 80  # for which the authors' factors of the losses hold
CLASS_SHARE = 0.6  # sum of the class probabilities that a new head gives to an object


class YOLOv5Head(nn.Module):
    """YOLOv5's head: one 1x1 convolution per level.

    Its channels are, for each anchor, x, y, width, height, objectness and classes.

    Args:
        input_shape: shape of each level.
        num_classes: K.
        anchor_sizes: (width, height) in pixels of the A anchors of each level.
    """

    predictor: type[nn.Conv2d] = nn.Conv2d
    other_classes = 0.99999
    """Number that is subtracted from K in the initial biases."""

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
            self.predictor(x.channels, self.num_anchors * (5 + num_classes), 1) for x in input_shape
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
        bias[:, 5:] += math.log(CLASS_SHARE / (num_classes - self.other_classes))

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


@META_ARCH_REGISTRY.register()
class YOLOv5(ObjectnessDetector):
    """YOLOv5: each anchor of each cell predicts class scores, an objectness, and a box.

    Deltas are in detectron2's own encoding. A centre is at most a stride from the middle of its
    cell, and a side is at most four times that of its anchor.

    The authors train on RGB images in [0, 1]: ``INPUT.FORMAT`` RGB, ``PIXEL_MEAN`` 0 and
    ``PIXEL_STD`` 255. They pad images on both sides. Here padding is at the bottom and at the
    right, which needs no offset afterwards. They keep 30000 boxes of all levels together for NMS;
    here this limit holds per level.

    The losses are those of :func:`~distill.nets.assign.yolov5_loss`, ``loss_box_reg``, ``loss_obj``
    and ``loss_cls``. As in the authors' code they are multiplied by the number of images of the
    whole batch. This batch is that of all processes and parts (``SOLVER.ACCUMULATE``), over which
    gradients are averaged. So the gradient is that of a sum over images, and learning rates are
    smaller than those of means.
    Three factors follow from the data: 3 / levels for all, K / 80 for the classes, and height ·
    width / 640² of the padded images for the objectness.

    Means over matches are those of each process and part. Only the objectness has, with images of
    one size, the gradient of one process with the joint batch.

    Args:
        prior_sizes: (width, height) in pixels of the anchors of each level.
        anchor_ratio: an anchor fits a box if their sides differ by a smaller factor.
        obj_balance: weight of the objectness of each level.
        box_loss_weight, obj_loss_weight, cls_loss_weight: factors of the losses for 80 classes,
            three levels and images of 640 x 640 pixels.
        parts: parts of a batch, of which the mean of the gradients is taken.
        kwargs: arguments of :class:`~distill.nets.dense.PriorDetector`.
    """

    section = Section(
        NUM_CONVS=None,
        NORM=None,
        PRIOR_PROB=None,
        NMS_THRESH_TEST=0.6,
        ANCHOR_RATIO=Key(
            4.0, "an anchor fits a box if no side differs by this factor or more", ABOVE_1
        ),
        OBJ_BALANCE=Key(
            [4.0, 1.0, 0.4], "weight of the objectness of each level", list_of(at_least(0))
        ),
        BOX_LOSS_WEIGHT=Key(0.05, "factor of the CIoU loss", at_least(0)),
        OBJ_LOSS_WEIGHT=Key(
            1.0,
            "factor of the objectness loss at 640 x 640; 0.7 for YOLOv5 m, l and x",
            at_least(0),
        ),
        CLS_LOSS_WEIGHT=Key(
            0.5, "factor of the class loss for 80 classes; 0.3 for YOLOv5 m, l and x", at_least(0)
        ),
        ANCHORS=Key(
            ANCHORS, "width and height in pixels of the anchors of each level", SIZES_PER_LEVEL
        ),
    ).on_top_of(YOLO_SECTION)
    section_name = "YOLOV5"
    """Name of the config section, ``MODEL.<name>``."""
    head_class = YOLOv5Head
    ota = False
    """True if the targets are those of :func:`~distill.nets.assign.ota_assign`."""

    @configurable
    def __init__(
        self,
        *,
        prior_sizes: Sequence[Sequence[Size]],
        anchor_ratio: float = 4.0,
        obj_balance: Sequence[float] = (4.0, 1.0, 0.4),
        box_loss_weight: float = 0.05,
        obj_loss_weight: float = 1.0,
        cls_loss_weight: float = 0.5,
        parts: int = 1,
        **kwargs: Any,
    ):
        transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
        super().__init__(prior_sizes=prior_sizes, box2box_transform=transform, **kwargs)
        self.anchor_ratio = anchor_ratio
        self.obj_balance = obj_balance
        self.gains = (box_loss_weight, obj_loss_weight, cls_loss_weight)
        self.parts = parts

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL[cls.section_name]
        arguments = yolo_arguments(cfg, node)
        inputs = input_shapes(arguments)
        for key in ("ANCHORS", "OBJ_BALANCE"):
            if len(node[key]) != len(inputs):
                raise ValueError(
                    f"MODEL.{cls.section_name}.{key} has {len(node[key])} levels; the head reads "
                    f"{len(inputs)}: {', '.join(node.IN_FEATURES)}"
                )
        head = cls.head_class(
            input_shape=inputs, num_classes=node.NUM_CLASSES, anchor_sizes=node.ANCHORS
        )
        return {
            **arguments,
            "head": head,
            "prior_sizes": node.ANCHORS,
            "anchor_ratio": node.ANCHOR_RATIO,
            "obj_balance": list(node.OBJ_BALANCE),
            "box_loss_weight": node.BOX_LOSS_WEIGHT,
            "obj_loss_weight": node.OBJ_LOSS_WEIGHT,
            "cls_loss_weight": node.CLS_LOSS_WEIGHT,
            "parts": cfg.SOLVER.get("ACCUMULATE", 1),  # absent without this package's trainer
        }

    def losses(
        self, priors: list[Boxes], predictions: Any, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        maps = [self._joint_map(*x) for x in zip(predictions[0], *predictions[2:])]
        truth = [{"gt_boxes": x.gt_boxes.tensor, "gt_classes": x.gt_classes} for x in gt_instances]
        self.dynamic_targets(maps, truth)  # the loss does not read them, but heads do
        losses = yolov5_loss(
            gains=self._gains(maps), balance=self.obj_balance, **self._fit(maps, truth)
        )
        images = len(truth) * self.parts * comm.get_world_size()
        names = {"loss_box_reg": "box", "loss_obj": "obj", "loss_cls": "cls"}
        return {name: images * losses[key] for name, key in names.items()}

    @torch.no_grad()
    def dynamic_targets(self, maps: list[Tensor], truth: list[dict[str, Tensor]]) -> Targets:
        """Return one target per prediction, see :func:`~distill.nets.assign.yolov5_boxes`.

        Args:
            maps: (N, A, Hi, Wi, 5 + K) per level.
            truth: ``gt_boxes`` and ``gt_classes`` of each image.
        """
        levels = yolov5_boxes(**self._fit(maps, truth))
        rows = torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in levels], 1)
        boxes, labels = (torch.cat([x[name] for x in truth]) for name in ("gt_boxes", "gt_classes"))
        # Row -1 is an entry for the background.
        boxes = torch.cat([boxes, boxes.new_zeros(1, 4)])
        labels = torch.cat([labels, labels.new_full((1,), self.num_classes)])
        return Targets(labels[rows], boxes[rows])

    def _joint_map(self, logits: Tensor, objectness: Tensor, raw: Tensor) -> Tensor:
        """Return the (N, A, H, W, 5 + K) map of a level from the head's outputs."""
        shape = (objectness.shape[1], -1)
        parts = (raw.unflatten(1, shape), objectness[:, :, None], logits.unflatten(1, shape))
        return torch.cat([x.float() for x in parts], 2).movedim(2, -1)

    def _fit(self, maps: list[Tensor], truth: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Return the arguments by which predictions and boxes are matched."""
        cells = self.anchor_generator.cell_anchors
        return {
            "maps": maps,
            "targets": truth,
            "anchors": torch.stack([x[:, 2:] - x[:, :2] for x in cells]),
            "strides": self.strides,
            "ratio": self.anchor_ratio,
            "ota": self.ota,
        }

    def _gains(self, maps: list[Tensor]) -> tuple[float, float, float]:
        """Return the factors of box, objectness and classes for images of this size."""
        box, obj, cls = (x * LEVELS / len(maps) for x in self.gains)
        height, width = (n * self.strides[0] for n in maps[0].shape[2:4])
        return box, obj * height * width / IMAGE**2, cls * self.num_classes / CLASSES

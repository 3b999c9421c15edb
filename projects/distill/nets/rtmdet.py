"""RTMDet (Lyu et al., "RTMDet: an empirical study of designing real-time object detectors")."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..section import SWITCH, Key, Section, at_least
from ..utils.distributed import reduce_mean
from .assign import dynamic_soft_labels, rtmdet_loss
from .blocks import ConvStyle
from .cspnext import CSPNEXT
from .dense import (
    YOLO_SECTION,
    CellTransform,
    DynamicDetector,
    DynamicTargets,
    init_bias,
    yolo_arguments,
    yolo_head_arguments,
)


class DistanceTransform(CellTransform):
    """Box transform, with detectron2's interface: distances of the sides from the cell's centre.

    Deltas are left, top, right and bottom in units of the cell's side. Unlike those of detectron2's
    ``Box2BoxTransformLinear`` they may be negative. RTMDet tiny and s predict any number. At
    initialization a ReLU would stop the gradient of about half of them.
    """

    def get_deltas(self, cells: Tensor, boxes: Tensor) -> Tensor:
        """Return the (P, 4) distances of the sides of (P, 4) XYXY boxes."""
        return _outwards(super().get_deltas(cells, boxes))

    def apply_deltas(self, deltas: Tensor, cells: Tensor) -> Tensor:
        """Return the (P, 4) XYXY boxes of (P, 4) distances."""
        return super().apply_deltas(_outwards(deltas), cells)


def _outwards(corners: Tensor) -> Tensor:
    """Change the sign of the first two of four columns."""
    return corners * corners.new_tensor([-1.0, -1.0, 1.0, 1.0])


@META_ARCH_REGISTRY.register()
class RTMDet(DynamicDetector):
    """RTMDet: a point per cell predicts class scores and the distances to the sides of its box.

    The points are the top left corners of the cells, as in the authors' code. The authors train on
    BGR images with detectron2's ``PIXEL_MEAN`` and a ``PIXEL_STD`` of 57.375, 57.12, 58.395. They
    pad images to 640 x 640 (``MODEL.CSPNEXT.SQUARE_PAD``) with gray pixels.

    In inference boxes are clipped to the image before NMS, and those without area are left out. The
    authors clip to the padded image.

    Points are assigned by :func:`~distill.nets.assign.dynamic_soft_labels`. The losses are those of
    :func:`~distill.nets.assign.rtmdet_loss`: ``loss_cls`` and ``loss_box_reg``. Both are divided by
    the sum of the qualities of the matched points: its mean over processes, at least 1.

    Args:
        box_loss_weight: factor of the GIoU loss.
        kwargs: arguments of :class:`~distill.nets.dense.PriorDetector`.
    """

    section = Section(
        BOX_LOSS_WEIGHT=Key(2.0, "factor of the GIoU loss", at_least(0)),
        EXP_ON_REG=Key(
            True,
            "distances are exponentials; the authors' tiny and s have False, m, l and x True",
            SWITCH,
        ),
    ).on_top_of(YOLO_SECTION)

    @configurable
    def __init__(self, *, box_loss_weight: float = 2.0, **kwargs: Any):
        super().__init__(prior_offset=0.0, box2box_transform=DistanceTransform(), **kwargs)
        self.box_loss_weight = box_loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.RTMDET
        arguments = yolo_arguments(cfg, node)
        head = RTMDetHead(exp_on_reg=node.EXP_ON_REG, **rtmdet_head_arguments(node, arguments))
        return {**arguments, "head": head, "box_loss_weight": node.BOX_LOSS_WEIGHT}

    def losses(
        self, priors: list[Boxes], predictions: Any, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        logits = self.flat(predictions[0], self.num_classes)
        boxes = self.all_boxes(self.flat(predictions[1], 4), priors)
        targets = self.dynamic_targets(priors, gt_instances, logits, boxes)
        number = reduce_mean(targets.quality.sum()).clamp(min=1)
        losses = rtmdet_loss(logits, boxes, *targets[:3], number, self.box_loss_weight)
        return {**losses, **self.other_losses(priors, predictions, gt_instances, targets)}

    def other_losses(
        self,
        priors: list[Boxes],
        predictions: Any,
        gt_instances: list[Instances],
        targets: DynamicTargets,
    ) -> dict[str, Tensor]:
        """Return the losses of further predictions of a subclass."""
        return {}

    def match(
        self, points: Tensor, strides: Tensor, truth: Instances, *predicted: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits, boxes = predicted
        return dynamic_soft_labels(
            logits,
            boxes,
            points,
            strides,
            truth.gt_boxes.tensor,
            truth.gt_classes,
            self.object_centers(truth),
        )

    def object_centers(self, truth: Instances) -> Tensor | None:
        """Return the (M, 2) points from which distances count; None: the centres of the boxes."""
        return None

    def _decode_multi_level_predictions(self, *args: Any) -> Instances:
        found = super()._decode_multi_level_predictions(*args)
        found.pred_boxes.clip(found.image_size)
        return found[found.pred_boxes.nonempty()]


class RTMDetHead(nn.Module):
    """RTMDet's head: levels share the convolutions, but each has its own norms and predictors.

    Args:
        input_shape: shape of each level, with equal channels.
        num_classes: K.
        num_convs: convolutions before the predictors of classes, and before those of boxes.
        style: norm and activation.
        prior_prob: class probability at initialization.
        exp_on_reg: True if distances are exponentials of the predictions.
    """

    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_convs: int,
        style: ConvStyle,
        prior_prob: float = 0.01,
        exp_on_reg: bool = True,
    ):
        super().__init__()
        channels, levels = input_shape[0].channels, len(input_shape)
        self.cls_tower = SharedTower(channels, num_convs, levels, style)
        self.reg_tower = SharedTower(channels, num_convs, levels, style)
        self.cls_score = predictors(channels, num_classes, levels)
        self.bbox_pred = predictors(channels, 4, levels)
        self.exp_on_reg = exp_on_reg
        init_normal(self)
        for predictor in self.cls_score:
            init_bias(predictor, prior_prob)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits (N, K, Hi, Wi) and distances in strides (N, 4, Hi, Wi) of each level."""
        logits, distances = [], []
        for level, x in enumerate(features):
            logits.append(self.cls_score[level](self.cls_tower(x, level)))
            raw = self.bbox_pred[level](self.reg_tower(x, level))
            distances.append(raw.float().exp() if self.exp_on_reg else raw)
        return logits, distances


class SharedTower(nn.Module):
    """3x3 convolutions that all levels share, with the norms of each level.

    Args:
        channels: input and output channels.
        number: number of convolutions.
        levels: number of levels.
        style: norm and activation.
    """

    def __init__(self, channels: int, number: int, levels: int, style: ConvStyle):
        super().__init__()
        numbers = range(number)
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, bias=not style.norm) for _ in numbers
        )
        self.norms = nn.ModuleList(
            nn.ModuleList(style.build_norm(channels) for _ in numbers) for _ in range(levels)
        )
        self.act = style.activation()

    def forward(self, x: Tensor, level: int) -> Tensor:
        norms: Any = self.norms[level]
        for conv, norm in zip(self.convs, norms):
            x = self.act(norm(conv(x)))
        return x


def predictors(inputs: int, outputs: int, levels: int) -> nn.ModuleList:
    """Build a 1x1 convolution for each level."""
    return nn.ModuleList(nn.Conv2d(inputs, outputs, 1) for _ in range(levels))


def init_normal(module: nn.Module) -> None:
    """Draw the weights of all convolutions from N(0, 0.01²), and set their biases to 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def rtmdet_head_arguments(section: CfgNode, detector: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that the heads of RTMDet and RTMDet-Ins share.

    Args:
        section: config section of the detector.
        detector: result of :func:`~distill.nets.dense.yolo_arguments`.

    Raises:
        ValueError: if the levels have different channels.
    """
    arguments = yolo_head_arguments(section, detector, CSPNEXT.style(section.NORM))
    channels = {shape.channels for shape in arguments["input_shape"]}
    if len(channels) > 1:
        raise ValueError(
            f"RTMDet's levels must have equal channels; {detector['head_in_features']} have "
            f"{sorted(channels)}. Use build_cspnext_pafpn_backbone or another FPN"
        )
    return arguments

"""RepPoints (Yang et al., "RepPoints: point set representation for object detection")."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou
from fvcore.nn import sigmoid_focal_loss_jit, smooth_l1_loss
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from ..section import POSITIVE, SHARE, Key, Rule, Section, at_least, is_rising, list_of
from ..utils.distributed import reduce_mean
from .assign import nearest_point_assign
from .dense import (
    DENSE_SECTION,
    FOCAL_LOSS_SECTION,
    CellTransform,
    PriorDetector,
    Targets,
    detector_arguments,
    head_arguments,
    labelled,
)

KERNEL = 3  # side of the deformable convolutions, which sample the map at KERNEL² points
POINTS = KERNEL**2
TRAINED = 0.1  # share of the gradient of classes and refinement that reaches the first points
MOMENT_TRAINED = 0.01  # share of the gradient that reaches the factors of the box sizes
SMOOTH_L1_BETA = 0.11
TWO_THRESHOLDS = Rule(
    lambda x: list_of(SHARE, 2, 2).holds(x) and is_rising(x), "2 rising numbers in (0, 1]"
)


@META_ARCH_REGISTRY.register()
class RepPoints(PriorDetector):
    """RepPoints: nine points per object; their moments are its box, which is then refined.

    The first points are trained on the objects to which
    :func:`~distill.nets.assign.nearest_point_assign` assigns their cell. Refined points and classes
    are trained on the objects that the box of the first points overlaps (``iou_thresholds``). An
    object with smaller overlaps goes to the boxes that overlap it most.

    Losses are a focal loss and the smooth L1 (β = 0.11) of both boxes in units of
    ``point_scale`` · stride. They are divided by the number of positives, a mean over processes.

    Args:
        point_scale: side of a box in units of the stride of its level.
        points_per_object: points per object in the first assignment.
        iou_thresholds: a prior is background below the first IoU, an object from the second on.
        focal_loss_alpha, focal_loss_gamma: α and γ of the focal loss.
        init_loss_weight, refine_loss_weight: factors of the losses of the first and refined boxes.
        kwargs: arguments of :class:`~distill.nets.dense.PriorDetector`.
    """

    section = Section(
        NUM_CONVS=3,
        NMS_THRESH_TEST=0.5,
        POINT_SCALE=Key(4.0, "side of a box in strides of its level", POSITIVE),
        POINTS_PER_OBJECT=Key(1, "points that are trained to find an object", at_least(1)),
        IOU_THRESHOLDS=Key(
            [0.4, 0.5],
            "IoU thresholds of the refinement: background below the first, object from the second",
            TWO_THRESHOLDS,
        ),
        INIT_LOSS_WEIGHT=Key(0.5, "factor of the loss of the first boxes", at_least(0)),
        REFINE_LOSS_WEIGHT=Key(1.0, "factor of the loss of the refined boxes", at_least(0)),
    ).on_top_of({**DENSE_SECTION, **FOCAL_LOSS_SECTION})

    @configurable
    def __init__(
        self,
        *,
        point_scale: float = 4.0,
        points_per_object: int = 1,
        iou_thresholds: tuple[float, float] = (0.4, 0.5),
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        init_loss_weight: float = 0.5,
        refine_loss_weight: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(prior_size=1.0, box2box_transform=CellTransform(), **kwargs)
        self.point_scale = point_scale
        self.points_per_object = points_per_object
        self.anchor_matcher = Matcher(
            list(iou_thresholds), [0, -1, 1], allow_low_quality_matches=True
        )
        self.focal = {"alpha": focal_loss_alpha, "gamma": focal_loss_gamma}
        self.init_loss_weight = init_loss_weight
        self.refine_loss_weight = refine_loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.REPPOINTS
        arguments = detector_arguments(cfg, node)
        return {
            **arguments,
            "head": RepPointsHead(**head_arguments(node, arguments)),
            "point_scale": node.POINT_SCALE,
            "points_per_object": node.POINTS_PER_OBJECT,
            "iou_thresholds": tuple(node.IOU_THRESHOLDS),
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "init_loss_weight": node.INIT_LOSS_WEIGHT,
            "refine_loss_weight": node.REFINE_LOSS_WEIGHT,
        }

    def assign(self, priors: list[Tensor], gt: Tensor) -> Tensor:
        points, strides = self._points(priors)
        return nearest_point_assign(points, strides, gt, self.point_scale, self.points_per_object)

    def losses(
        self, priors: list[Boxes], predictions: Any, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        logits = self.flat(predictions[0], self.num_classes)
        refined, first = (self.flat(maps, 4) for maps in predictions[1:])
        anchors = Boxes.cat(priors).tensor
        near = self.targets(priors, gt_instances)
        boxes = self.decoded(first, anchors.expand_as(first))
        overlapping = self.refine_targets(boxes, gt_instances)
        trained = overlapping.labels >= 0
        classes = F.one_hot(overlapping.labels.clamp(min=0), self.num_classes + 1)[..., :-1]
        number = reduce_mean(overlapping.positive(self.num_classes).sum())
        focal = sigmoid_focal_loss_jit(
            logits[trained], classes[trained].to(logits.dtype), reduction="sum", **self.focal
        )
        return {
            "loss_cls": focal / number,
            "loss_points_init": self._box_loss(first, anchors, near) * self.init_loss_weight,
            "loss_points_refine": self._box_loss(refined, anchors, overlapping)
            * self.refine_loss_weight,
        }

    def _box_loss(self, regression: Tensor, anchors: Tensor, targets: Targets) -> Tensor:
        positive, cells, boxes, truth = self.positives(regression, anchors, targets)
        unit = (cells[:, 2:3] - cells[:, :1]) * self.point_scale
        loss = smooth_l1_loss(boxes / unit, truth / unit, SMOOTH_L1_BETA, reduction="sum")
        return loss / reduce_mean(positive.sum())

    @torch.no_grad()
    def refine_targets(self, boxes: Tensor, gt_instances: list[Instances]) -> Targets:
        """Return the targets of the refined points, given the (N, R, 4) boxes of the first ones."""
        pairs = []
        for found, truth in zip(boxes, gt_instances):
            iou = pairwise_iou(truth.gt_boxes, Boxes(found))
            hit = iou.amax(1) > 0  # for a row of zeros, the matcher would take all boxes
            index, label = self.anchor_matcher(iou[hit])
            labels, matched = labelled(truth[hit], index.where(label == 1, -1), self.num_classes)
            pairs.append((labels.where(label >= 0, -1), matched))
        return Targets(*(torch.stack(x) for x in zip(*pairs)))

    def _points(self, priors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return (R, 2) centres and (R,) strides of the priors, which are cells."""
        cells = torch.cat(priors)
        return Boxes(cells).get_centers(), cells[:, 2] - cells[:, 0]


class RepPointsHead(nn.Module):
    """RepPoints' head with two towers, for classes and for points.

    The second tower predicts the first points. Deformable convolutions then read both towers at
    these points, and predict classes and refined points.

    Args:
        input_shape: shape of each level.
        num_classes: K.
        conv_dims: channels of the towers' convolutions. The last one is also the number of channels
            of the deformable convolutions.
        norm: norm of the towers, a name of :func:`detectron2.layers.get_norm`.
        prior_prob: class probability at initialization.
    """

    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        conv_dims: list[int],
        norm: str = "GN",
        prior_prob: float = 0.01,
    ):
        super().__init__()
        channels = input_shape[0].channels
        width = conv_dims[-1]
        self.cls_subnet = _tower(channels, conv_dims, norm)
        self.points_subnet = _tower(channels, conv_dims, norm)
        self.init_conv = nn.Conv2d(width, width, KERNEL, padding=1)
        self.init_points = nn.Conv2d(width, 2 * POINTS, 1)
        self.refine_conv = DeformConv2d(width, width, KERNEL, padding=1, bias=False)
        self.refine_points = nn.Conv2d(width, 2 * POINTS, 1)
        self.cls_conv = DeformConv2d(width, width, KERNEL, padding=1, bias=False)
        self.cls_score = nn.Conv2d(width, num_classes, 1)
        # log of (half a side / standard deviation of the points), for y and x
        self.moment = nn.Parameter(torch.zeros(2))
        y, x = torch.meshgrid(torch.arange(-1.0, 2.0), torch.arange(-1.0, 2.0), indexing="ij")
        kernel = torch.stack([y, x], -1).view(1, 2 * POINTS, 1, 1)
        self.register_buffer("kernel", kernel, persistent=False)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, DeformConv2d):  # as in the authors' framework
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        predictor: Any = self.cls_score
        nn.init.constant_(predictor.bias, -math.log(1 / prior_prob - 1))

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return logits (N, K, Hi, Wi), refined boxes and first boxes, (N, 4, Hi, Wi) each.

        Boxes are corners relative to the cell centre, in cells.
        """
        levels = [self._level(x) for x in features]
        logits, refined, first = map(list, zip(*levels))
        return logits, refined, first

    def _level(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        classes, located = self.cls_subnet(x), self.points_subnet(x)
        first = self.init_points(F.relu(self.init_conv(located)))
        offset = (1 - TRAINED) * first.detach() + TRAINED * first - self.kernel
        at_points = F.relu(_deformed(self.refine_conv, located, offset))
        refined = self.refine_points(at_points) + first.detach()
        logits = self.cls_score(F.relu(_deformed(self.cls_conv, classes, offset)))
        return logits, self.boxes(refined), self.boxes(first)

    def boxes(self, points: Tensor) -> Tensor:
        """Return the (N, 4, H, W) XYXY boxes of (N, 2 · 9, H, W) points y, x, y, x, ....

        The centre of a box is the mean of the points. Half a side is their (unbiased) standard
        deviation times a learned factor.
        """
        moment = MOMENT_TRAINED * self.moment + (1 - MOMENT_TRAINED) * self.moment.detach()
        spread, centre = torch.std_mean(points.float().unflatten(1, (POINTS, 2)), dim=1)
        half = spread * moment.exp()[:, None, None]
        y1x1, y2x2 = centre - half, centre + half
        return torch.cat([y1x1.flip(1), y2x2.flip(1)], 1)


def _deformed(conv: DeformConv2d, x: Tensor, offset: Tensor) -> Tensor:
    """Apply a deformable convolution in float32.

    torchvision has no half-precision kernel for CPU, and positions would be too coarse.
    """
    with torch.autocast(x.device.type, enabled=False):
        return conv(x.float(), offset.float())


def _tower(channels: int, dims: list[int], norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip([channels, *dims], dims):
        normed = get_norm(norm, after)
        layers.append(nn.Conv2d(before, after, KERNEL, padding=1, bias=normed is None))
        layers += [x for x in (normed, nn.ReLU(inplace=True)) if x is not None]
    return nn.Sequential(*layers)

"""ATSS (Zhang et al., "Bridging the gap between anchor-based and anchor-free detection")."""

from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.structures import Boxes, Instances
from fvcore.nn import giou_loss, sigmoid_focal_loss_jit
from torch import Tensor, nn

from ..losses.boxes import box_centerness
from ..section import BOX_WEIGHTS, POSITIVE, Key, Section, at_least
from ..utils.distributed import reduce_mean
from .assign import atss_assign
from .dense import (
    DENSE_SECTION,
    FOCAL_LOSS_SECTION,
    PriorDetector,
    Scale,
    detector_arguments,
    head_arguments,
)


@META_ARCH_REGISTRY.register()
class ATSS(PriorDetector):
    """ATSS: one anchor per cell, adaptive assignment, and centerness.

    Anchors are assigned by :func:`~distill.nets.assign.atss_assign`. Losses:

    - ``loss_cls``: focal loss of all anchors, divided by the number of positives.
    - ``loss_box_reg``: 2 · GIoU loss of the positives, a mean weighted by their centerness target.
    - ``loss_centerness``: binary cross entropy, divided by the number of positives.

    Numbers and sums of weights are means over processes. The score of a box is
    √(class probability · centerness), as in detectron2's FCOS.

    Args:
        candidates: number of candidate anchors per box and level.
        focal_loss_alpha, focal_loss_gamma: α and γ of the focal loss.
        box_loss_weight, centerness_loss_weight: factors of the losses.
        kwargs: arguments of :class:`~distill.nets.dense.PriorDetector`.
    """

    section = Section(
        ANCHOR_SIZE=Key(8.0, "side of the anchor of each cell in strides", POSITIVE),
        CANDIDATES=Key(9, "candidate anchors per box and level", at_least(1)),
        BBOX_REG_WEIGHTS=Key((10.0, 10.0, 5.0, 5.0), "weights of Box2BoxTransform", BOX_WEIGHTS),
        BOX_LOSS_WEIGHT=Key(2.0, "factor of the GIoU loss", at_least(0)),
        CENTERNESS_LOSS_WEIGHT=Key(1.0, "factor of the centerness loss", at_least(0)),
    ).on_top_of({**DENSE_SECTION, **FOCAL_LOSS_SECTION})
    score_maps = 1

    @configurable
    def __init__(
        self,
        *,
        candidates: int = 9,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        box_loss_weight: float = 2.0,
        centerness_loss_weight: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.candidates = candidates
        self.focal = {"alpha": focal_loss_alpha, "gamma": focal_loss_gamma}
        self.box_loss_weight = box_loss_weight
        self.centerness_loss_weight = centerness_loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.ATSS
        arguments = detector_arguments(cfg, node)
        return {
            **arguments,
            "head": ATSSHead(**head_arguments(node, arguments)),
            "prior_size": node.ANCHOR_SIZE,
            "box2box_transform": Box2BoxTransform(weights=tuple(node.BBOX_REG_WEIGHTS)),
            "candidates": node.CANDIDATES,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "box_loss_weight": node.BOX_LOSS_WEIGHT,
            "centerness_loss_weight": node.CENTERNESS_LOSS_WEIGHT,
        }

    def assign(self, priors: list[Tensor], gt: Tensor) -> Tensor:
        return atss_assign(priors, gt, self.candidates)

    def losses(
        self, priors: list[Boxes], predictions: Any, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        logits, deltas, centerness = (
            self.flat(maps, width) for maps, width in zip(predictions, (self.num_classes, 4, 1))
        )
        targets = self.targets(priors, gt_instances)
        all_anchors = Boxes.cat(priors).tensor
        positive, anchors, boxes, truth = self.positives(deltas, all_anchors, targets)
        number = reduce_mean(positive.sum())
        target = box_centerness(anchors, truth)
        target_sum = reduce_mean(target.sum(), minimum=1e-6)
        classes = F.one_hot(targets.labels, self.num_classes + 1)[..., :-1].to(logits.dtype)
        box = (giou_loss(boxes, truth) * target).sum() / target_sum
        centre = F.binary_cross_entropy_with_logits(
            centerness[positive][:, 0], target, reduction="sum"
        )
        return {
            "loss_cls": sigmoid_focal_loss_jit(logits, classes, reduction="sum", **self.focal)
            / number,
            "loss_box_reg": box * self.box_loss_weight,
            "loss_centerness": centre / number * self.centerness_loss_weight,
        }

    def scores(self, logits: Tensor, *others: Tensor) -> Tensor:
        (centerness,) = others
        return (logits.sigmoid() * centerness.sigmoid()).sqrt()


class ATSSHead(FCOSHead):
    """detectron2's FCOS head with a learned :class:`~distill.nets.dense.Scale` per level.

    The arguments are those of ``FCOSHead``.
    """

    def __init__(self, *, input_shape: list[ShapeSpec], **kwargs: Any):
        super().__init__(input_shape=input_shape, **kwargs)
        self.scales = nn.ModuleList(Scale() for _ in input_shape)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return logits (N, K, Hi, Wi), deltas (N, 4, Hi, Wi) and centerness logits (N, 1, Hi, Wi).

        Each is a list with one map per level.
        """
        logits, deltas, centerness = super().forward(features)
        return logits, [scale(x) for scale, x in zip(self.scales, deltas)], centerness

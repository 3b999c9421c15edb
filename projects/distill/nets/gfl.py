"""GFL (Li et al., "Generalized focal loss: learning qualified and distributed bounding boxes for
dense object detection").
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, Instances
from detectron2.structures.boxes import matched_pairwise_iou
from fvcore.nn import giou_loss
from torch import Tensor, nn

from ..losses.boxes import expected_distances
from ..section import POSITIVE, Key, Section, at_least
from ..utils.distributed import reduce_mean
from .assign import atss_assign
from .dense import DENSE_SECTION, PriorDetector, Scale, detector_arguments, head_arguments
from .quality_focal import quality_focal

NEAR_END = 0.1  # minimum distance of a target to the last bin, in strides


@META_ARCH_REGISTRY.register()
class GFL(PriorDetector):
    """GFL: class scores that predict localization quality, and box sides as distributions.

    Priors are assigned as in ATSS. The distance of a side from the prior's centre is the
    expectation of a softmax over the bins 0 ... ``reg_max``, in units of the level's stride.
    Losses:

    - ``loss_qfl``: QFL of all priors, divided by the number of positives (at least 1 per image).
    - ``loss_box_reg``: 2 · GIoU loss of the positives.
    - ``loss_dfl``: 0.25 · DFL of the positives, a mean of the four sides.

    The last two are weighted by the largest class probability (detached), and divided by the sum of
    these weights (at least 1). Number and sum are means over processes.

    Args:
        prior_size: as in :class:`~distill.nets.dense.PriorDetector`.
        reg_max: last bin.
        candidates: number of candidate anchors per box and level.
        beta: exponent of QFL.
        box_loss_weight, dfl_loss_weight: factors of the losses.
        kwargs: arguments of :class:`~distill.nets.dense.PriorDetector`.
    """

    section = Section(
        ANCHOR_SIZE=Key(8.0, "side of the anchor of each cell in strides", POSITIVE),
        CANDIDATES=Key(9, "candidate anchors per box and level", at_least(1)),
        REG_MAX=Key(16, "last bin of the distribution of a side, in strides", at_least(1)),
        QFL_BETA=Key(2.0, "exponent β of the quality focal loss", at_least(0)),
        BOX_LOSS_WEIGHT=Key(2.0, "factor of the GIoU loss", at_least(0)),
        DFL_LOSS_WEIGHT=Key(0.25, "factor of the distribution focal loss", at_least(0)),
    ).on_top_of(DENSE_SECTION)

    @configurable
    def __init__(
        self,
        *,
        prior_size: float = 8.0,
        reg_max: int = 16,
        candidates: int = 9,
        beta: float = 2.0,
        box_loss_weight: float = 2.0,
        dfl_loss_weight: float = 0.25,
        **kwargs: Any,
    ):
        transform = Integral(reg_max, prior_size)
        super().__init__(prior_size=prior_size, box2box_transform=transform, **kwargs)
        self.reg_max = reg_max
        self.box_dim = 4 * (reg_max + 1)
        self.candidates = candidates
        self.beta = beta
        self.box_loss_weight = box_loss_weight
        self.dfl_loss_weight = dfl_loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.GFL
        arguments = detector_arguments(cfg, node)
        return {
            **arguments,
            "head": GFLHead(reg_max=node.REG_MAX, **head_arguments(node, arguments)),
            "prior_size": node.ANCHOR_SIZE,
            "reg_max": node.REG_MAX,
            "candidates": node.CANDIDATES,
            "beta": node.QFL_BETA,
            "box_loss_weight": node.BOX_LOSS_WEIGHT,
            "dfl_loss_weight": node.DFL_LOSS_WEIGHT,
        }

    def assign(self, priors: list[Tensor], gt: Tensor) -> Tensor:
        return atss_assign(priors, gt, self.candidates)

    def losses(
        self, priors: list[Boxes], predictions: Any, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        logits = self.flat(predictions[0], self.num_classes)
        sides = self.flat(predictions[1], self.box_dim)
        targets = self.targets(priors, gt_instances)
        all_priors = Boxes.cat(priors).tensor
        positive, anchors, boxes, truth = self.positives(sides, all_priors, targets)
        number = reduce_mean(positive.sum(1).clamp(min=1).sum())

        quality = torch.zeros_like(logits)
        overlap = matched_pairwise_iou(Boxes(boxes.detach()), Boxes(truth))
        quality[positive] = quality[positive].scatter(
            1, targets.labels[positive][:, None], overlap[:, None]
        )
        weight = logits.detach()[positive].sigmoid().amax(1)
        weight_sum = reduce_mean(weight.sum()).clamp(min=1)
        box = (giou_loss(boxes, truth) * weight).sum() / weight_sum
        distances = self.box2box_transform.get_deltas(anchors, truth)
        dfl = distribution_focal(sides[positive], distances, self.reg_max)
        return {
            "loss_qfl": quality_focal(logits, quality, self.beta).sum() / number,
            "loss_box_reg": box * self.box_loss_weight,
            "loss_dfl": (dfl * weight).sum() / weight_sum * self.dfl_loss_weight,
        }


class GFLHead(RetinaNetHead):
    """detectron2's RetinaNet head with distributions as regression, and a factor per level.

    Args:
        input_shape: shape of each level.
        reg_max: last bin of the distribution of a side.
        kwargs: other arguments of ``RetinaNetHead``.
    """

    def __init__(self, *, input_shape: list[ShapeSpec], reg_max: int, **kwargs: Any):
        super().__init__(input_shape=input_shape, num_anchors=1, **kwargs)
        channels = self.cls_score.in_channels
        predictor: Any = nn.Conv2d(channels, 4 * (reg_max + 1), kernel_size=3, padding=1)
        nn.init.normal_(predictor.weight, std=0.01)
        nn.init.zeros_(predictor.bias)
        self.bbox_pred = predictor
        self.scales = nn.ModuleList(Scale() for _ in input_shape)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits (N, K, Hi, Wi), and logits of the bins (N, 4 · (reg_max + 1), Hi, Wi).

        Each is a list with one map per level.
        """
        logits, sides = super().forward(features)
        return logits, [scale(x) for scale, x in zip(self.scales, sides)]


class Integral:
    """Box transform, with detectron2's interface, for distributions of the distances of the sides.

    Args:
        reg_max: last bin.
        prior_size: side of a prior in units of its level's stride.
    """

    def __init__(self, reg_max: int, prior_size: float):
        self.reg_max = reg_max
        self.prior_size = prior_size
        self.linear = Box2BoxTransformLinear(normalize_by_size=True)

    def expectation(self, sides: Tensor) -> Tensor:
        """Return the expected distances in strides (Eq. 5), (P, 4) >= 0.

        Args:
            sides: (P, 4 · (reg_max + 1)) logits.
        """
        return expected_distances(sides)

    def get_deltas(self, priors: Tensor, boxes: Tensor) -> Tensor:
        """Return the (P, 4) distances in strides from prior centres to sides of (P, 4) boxes."""
        return self.linear.get_deltas(priors, boxes) * self.prior_size

    def apply_deltas(self, sides: Tensor, priors: Tensor) -> Tensor:
        """Return the (P, 4) XYXY boxes of (P, 4 · (reg_max + 1)) logits at (P, 4) priors."""
        return self.linear.apply_deltas(self.expectation(sides) / self.prior_size, priors)


def distribution_focal(sides: Tensor, distances: Tensor, reg_max: int) -> Tensor:
    """Distribution focal loss (DFL, Eq. 6), averaged over the four sides.

    It is the cross entropy with the two bins around each distance, weighted by nearness.

    Args:
        sides: (P, 4 · (reg_max + 1)) logits.
        distances: (P, 4) in strides; clamped to [0, reg_max − 0.1] here.
        reg_max: last bin.

    Returns:
        (P,) >= 0.
    """
    target = distances.clamp(0, reg_max - NEAR_END)
    left = target.floor()
    log_prob = sides.view(len(sides), 4, reg_max + 1).log_softmax(2)
    at_left, at_right = (
        log_prob.gather(2, index.long()[..., None])[..., 0] for index in (left, left + 1)
    )
    return -(at_left * (left + 1 - target) + at_right * (target - left)).mean(1)

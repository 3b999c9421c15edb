"""RTMDet-Ins, RTMDet for instance segmentation (Lyu et al., Sec. 3.5)."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, ROIMasks
from torch import Tensor, nn

from ..section import SWITCH, Key, Section, at_least
from ..utils.distributed import reduce_mean
from .assign import dynamic_masks, mask_centers, mask_kernel_size, mask_loss, sampled_masks
from .assign.rtmdet import TOPK
from .blocks import ConvStyle
from .dense import DynamicTargets, init_bias, points_and_strides, yolo_arguments
from .rtmdet import RTMDet, SharedTower, init_normal, predictors, rtmdet_head_arguments

PROTOTYPES = 8
KERNEL = mask_kernel_size(PROTOTYPES)
MASK_CONVS = 4  # convolutions before the prototypes


@META_ARCH_REGISTRY.register()
class RTMDetIns(RTMDet):
    """RTMDet-Ins: RTMDet whose cells also predict the layers that compute the mask of their object.

    The layers read prototypes of stride 8, which all objects of an image share, and the coordinates
    relative to the object's point (:func:`~distill.nets.assign.dynamic_masks`). Distances are ReLUs
    of the predictions.
    ``MODEL.MASK_ON`` must be True, or detectron2 loads and evaluates no masks.

    Distances of points count from the centres of mass of the masks in the assignment. ``loss_mask``
    is :func:`~distill.nets.assign.mask_loss` of all matched points, divided by their number: its
    mean over processes, at least 1. ``INPUT.MASK_FORMAT`` bitmask saves the conversion of polygons.

    Args:
        mask_loss_weight: factor of the loss of the masks.
        kwargs: arguments of :class:`~distill.nets.dense.PriorDetector`.
    """

    section = Section(
        EXP_ON_REG=None,
        MASK_LOSS_WEIGHT=Key(2.0, "factor of the loss of the masks", at_least(0)),
        SCORE_THRESH_TEST=0.05,
        TOPK_CANDIDATES_TEST=1000,
        NMS_THRESH_TEST=0.6,
        SHARED_BOX_BRANCH=Key(
            True,
            "boxes are predicted from the convolutions of the classes, as in the released models; "
            "False: from their own, which the paper describes",
            SWITCH,
        ),
    ).on_top_of(RTMDet.section)

    @configurable
    def __init__(self, *, mask_loss_weight: float = 2.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.mask_loss_weight = mask_loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.RTMDETINS
        arguments = yolo_arguments(cfg, node)
        head = RTMDetInsHead(
            shared_box_branch=node.SHARED_BOX_BRANCH, **rtmdet_head_arguments(node, arguments)
        )
        return {
            **arguments,
            "head": head,
            "box_loss_weight": node.BOX_LOSS_WEIGHT,
            "mask_loss_weight": node.MASK_LOSS_WEIGHT,
        }

    def losses(
        self, priors: list[Boxes], predictions: Any, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        return super().losses(priors, predictions, [with_bit_masks(x) for x in gt_instances])

    def object_centers(self, truth: Instances) -> Tensor | None:
        return mask_centers(truth.gt_masks.tensor) if len(truth) else None

    def other_losses(
        self,
        priors: list[Boxes],
        predictions: Any,
        gt_instances: list[Instances],
        targets: DynamicTargets,
    ) -> dict[str, Tensor]:
        number = reduce_mean((targets.matched >= 0).sum()).clamp(min=1)
        rows = [matched_rows(len(truth), *row) for truth, *row in zip(gt_instances, *targets[2:])]
        kernels, prototypes = predictions[2:]
        logits = self.mask_logits(kernels, prototypes, rows).split([len(x) for x in rows])
        losses = [
            self.mask_loss(*image, number)
            for image in zip(logits, gt_instances, rows, targets.matched)
        ]
        return {"loss_mask": torch.stack(losses).sum()}

    def mask_logits(
        self, kernels: list[Tensor], prototypes: list[Tensor], rows: list[Tensor]
    ) -> Tensor:
        """Return the mask logits of some priors of all images, (ΣPi, H, W).

        Args:
            kernels: (N, 169, Hi, Wi) per level.
            prototypes: one map (N, 8, H, W).
            rows: (Pi,) priors of each image; -1: the logits are 0.
        """
        points, strides = points_and_strides(self.anchor_generator(kernels))
        logits = []
        for own, maps, index in zip(self.flat(kernels, KERNEL), prototypes[0], rows):
            chosen = index.clamp(0)
            counted = own[chosen].where((index >= 0)[:, None], 0)
            logits.append(
                dynamic_masks(counted, points[chosen], strides[chosen], maps, self.strides[0])
            )
        return torch.cat(logits)

    def mask_loss(
        self, logits: Tensor, truth: Instances, rows: Tensor, matched: Tensor, number: Tensor
    ) -> Tensor:
        """Return the loss of the masks of one image.

        Args:
            logits: (P, H, W) of stride 8.
            truth: the objects, with bit masks.
            rows: (P,) priors of the logits, or -1.
            matched: (R,) row of the object of each prior, or -1.
            number: matched points in the batch.
        """
        size = [2 * n for n in logits.shape[1:]]
        masks = logits.new_zeros(0, *size)
        if len(truth):
            masks = sampled_masks(truth.gt_masks.tensor, *size)
        objects = matched[rows.clamp(0)].clamp(0)
        return mask_loss(logits, masks[objects], number, self.mask_loss_weight, rows >= 0)

    def rows(self, predictions: Any) -> list[list[Tensor]]:
        """Return logits, and deltas together with kernels, as rows."""
        logits, deltas = super().rows(predictions)
        kernels = [permute_to_N_HWA_K(x, KERNEL) for x in predictions[2]]
        return [logits, [torch.cat(x, 2) for x in zip(deltas, kernels)]]

    def _decode_per_level_predictions(
        self,
        anchors: Boxes,
        pred_scores: Tensor,
        pred_deltas: Tensor,
        score_thresh: float,
        topk_candidates: int,
        image_size: tuple[int, int],
    ) -> Instances:
        """Select detections as detectron2 does, and keep their priors and kernels."""
        index, classes = (pred_scores > score_thresh).nonzero(as_tuple=True)
        scores, best = pred_scores[index, classes].topk(min(len(index), topk_candidates))
        index, classes = index[best], classes[best]
        priors, (deltas, kernels) = anchors.tensor[index], pred_deltas[index].split([4, KERNEL], 1)
        return Instances(
            image_size,
            pred_boxes=Boxes(self.box2box_transform.apply_deltas(deltas, priors)),
            scores=scores,
            pred_classes=classes,
            priors=Boxes(priors),
            kernels=kernels,
        )

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: Any
    ) -> list[Instances]:
        """Return the detections of each image, with ``pred_masks`` in :class:`ImageMasks`."""
        results = super().forward_inference(images, features, predictions)
        stride = self.strides[0]
        for found, prototypes in zip(results, predictions[3][0].float()):
            priors: Boxes = found.priors
            sides = priors.tensor[:, 2] - priors.tensor[:, 0]
            masks = dynamic_masks(found.kernels, priors.get_centers(), sides, prototypes, stride)
            found.remove("priors")
            found.remove("kernels")
            found.pred_masks = ImageMasks(masks, found.image_size, stride)
        return results


def matched_rows(objects: int, quality: Tensor, matched: Tensor) -> Tensor:
    """Return the (P,) priors of an image that are matched, the best first, and then -1.

    An object matches at most ``TOPK`` points. So many rows are returned for each, because to count
    the matched ones would wait for the device.

    Args:
        objects: number of objects of the image.
        quality: (R,) IoU with the matched object.
        matched: (R,) row of the object, or -1.
    """
    count = min(TOPK * objects, len(matched))
    index = quality.where(matched >= 0, -1).topk(count).indices
    return index.where(matched[index] >= 0, -1)


def with_bit_masks(truth: Instances) -> Instances:
    """Return objects whose polygons are converted to bit masks on the device of the boxes.

    Raises:
        ValueError: if there are objects without masks.
    """
    if len(truth) == 0:
        return truth
    if not truth.has("gt_masks"):
        raise ValueError(
            "RTMDetIns learns masks, and the loaded objects have none; set MODEL.MASK_ON to True"
        )
    if isinstance(truth.gt_masks, BitMasks):
        return truth
    masks = BitMasks.from_polygon_masks(truth.gt_masks, *truth.image_size)
    fields = {**truth.get_fields(), "gt_masks": masks.to(truth.gt_boxes.device)}
    return Instances(truth.image_size, **fields)


class ImageMasks(ROIMasks):
    """Mask logits of whole padded images, which detectron2's postprocessing turns into bit masks.

    Args:
        tensor: (P, H, W) logits.
        image_size: height and width of the image without padding.
        stride: stride of the logits.
    """

    def __init__(self, tensor: Tensor, image_size: tuple[int, int], stride: int):
        super().__init__(tensor)
        self.image_size = image_size
        self.stride = stride

    def to(self, device: torch.device) -> "ImageMasks":
        return ImageMasks(self.tensor.to(device), self.image_size, self.stride)

    def __getitem__(self, item: Any) -> "ImageMasks":
        return ImageMasks(self.tensor[item], self.image_size, self.stride)

    def to_bitmasks(
        self, boxes: Boxes, height: int, width: int, threshold: float = 0.5
    ) -> BitMasks:
        """Return masks of the output's size.

        Logits are resized to the padded image, cut to the image, and resized to the output.

        Args:
            boxes: not used; masks may reach beyond their boxes.
            height, width: size of the output in pixels.
            threshold: probability from which a pixel is in a mask.
        """
        logits = self.tensor[:, None]
        pixels = F.interpolate(
            logits, scale_factor=self.stride, mode="bilinear", align_corners=False
        )
        pixels = pixels[..., : self.image_size[0], : self.image_size[1]]
        pixels = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
        return BitMasks(pixels[:, 0].sigmoid() > threshold)


class RTMDetInsHead(nn.Module):
    """RTMDet-Ins's head: classes, boxes, kernels and prototypes.

    As in RTMDet's head, levels share the convolutions of classes and of boxes. Those of the kernels
    are not shared. In the released models the box branch is, by a mistake, the class branch itself
    (mmdetection#9835).

    Args:
        input_shape: shape of each level, with equal channels; the finest has stride 8.
        num_classes: K.
        num_convs: convolutions of each branch.
        style: norm and activation.
        prior_prob: class probability at initialization.
        shared_box_branch: True if boxes are predicted from the class branch.
    """

    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_convs: int,
        style: ConvStyle,
        prior_prob: float = 0.01,
        shared_box_branch: bool = True,
    ):
        super().__init__()
        channels, levels = input_shape[0].channels, len(input_shape)
        self.cls_tower = SharedTower(channels, num_convs, levels, style)
        self.reg_tower = (
            None if shared_box_branch else SharedTower(channels, num_convs, levels, style)
        )
        self.kernel_towers = nn.ModuleList(_tower(channels, num_convs, style) for _ in input_shape)
        self.cls_score = predictors(channels, num_classes, levels)
        self.bbox_pred = predictors(channels, 4, levels)
        self.kernel_pred = predictors(channels, KERNEL, levels)
        self.fuse = nn.Conv2d(levels * channels, channels, 1)
        self.mask_tower = _tower(channels, MASK_CONVS, style)
        self.prototypes = nn.Conv2d(channels, PROTOTYPES, 1)
        init_normal(self)
        predictor: Any
        for predictor in self.cls_score:
            init_bias(predictor, prior_prob)
        for predictor in self.bbox_pred:
            nn.init.ones_(predictor.bias)

    def forward(
        self, features: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Return logits, distances, kernels and prototypes.

        The first three have a map per level: (N, K, Hi, Wi), (N, 4, Hi, Wi) in strides, and
        (N, 169, Hi, Wi). The last is a list of one map, (N, 8, H, W) of the finest level's size.
        """
        logits, distances, kernels = [], [], []
        for level, x in enumerate(features):
            classified = self.cls_tower(x, level)
            located = classified if self.reg_tower is None else self.reg_tower(x, level)
            logits.append(self.cls_score[level](classified))
            distances.append(self.bbox_pred[level](located).relu())
            kernels.append(self.kernel_pred[level](self.kernel_towers[level](x)))
        return logits, distances, kernels, [self.prototypes(self.mask_tower(self._fused(features)))]

    def _fused(self, features: list[Tensor]) -> Tensor:
        size = features[0].shape[-2:]
        coarse = (
            F.interpolate(x, size, mode="bilinear", align_corners=False) for x in features[1:]
        )
        return self.fuse(torch.cat([features[0], *coarse], 1))


def _tower(channels: int, number: int, style: ConvStyle) -> nn.Sequential:
    return nn.Sequential(*(style.conv(channels, channels, 3) for _ in range(number)))

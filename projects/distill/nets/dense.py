"""Base class and helpers of the dense detectors of this package."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import build_backbone
from detectron2.modeling.anchor_generator import BufferList, DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ..section import FRACTION, INSIDE_0_1, NUMBER, SWITCH, TEXT, TEXTS, Key, Section, at_least
from .blocks import ConvStyle

DENSE_SECTION = Section(
    NUM_CLASSES=Key(80, "number of classes", at_least(1)),
    IN_FEATURES=Key(["p3", "p4", "p5", "p6", "p7"], "levels that the head reads", TEXTS),
    NUM_CONVS=Key(4, "convolutions in each tower of the head", at_least(1)),
    NORM=Key("GN", "norm of the towers", TEXT),
    PRIOR_PROB=Key(0.01, "initial probability of an object", INSIDE_0_1),
    SCORE_THRESH_TEST=Key(0.05, "lowest score of a detection", NUMBER),
    TOPK_CANDIDATES_TEST=Key(1000, "detections per level before NMS", at_least(1)),
    NMS_THRESH_TEST=Key(0.6, "IoU threshold of NMS", FRACTION),
)
"""Keys of every dense detector here, with the names of ``MODEL.RETINANET`` where it has them."""

YOLO_SECTION = Section(
    IN_FEATURES=["p3", "p4", "p5"],
    NUM_CONVS=2,
    NORM="BN",
    SCORE_THRESH_TEST=0.001,
    TOPK_CANDIDATES_TEST=30000,
    NMS_THRESH_TEST=0.65,
    MULTI_LABEL_TEST=Key(True, "a box may be a detection of several classes", SWITCH),
    PAD_VALUE=Key(114.0, "value of padding before normalization, in pixel units", NUMBER),
).on_top_of(DENSE_SECTION)
"""Keys of RTMDet, YOLOX and YOLOv5. Their authors keep 300 detections per image, which is
``TEST.DETECTIONS_PER_IMAGE``.
"""

FOCAL_LOSS_SECTION = Section(
    FOCAL_LOSS_ALPHA=Key(0.25, "α of the focal loss; below 0: no weighting", NUMBER),
    FOCAL_LOSS_GAMMA=Key(2.0, "γ of the focal loss", at_least(0)),
)


class Targets(NamedTuple):
    """Training targets of the priors of a batch.

    Attributes:
        labels: (N, R) in [0, K]; K means background, -1 means that the prior is not trained.
        boxes: (N, R, 4) XYXY of the matched objects; undefined for unmatched priors.
    """

    labels: Tensor
    boxes: Tensor

    def positive(self, num_classes: int) -> Tensor:
        """Return (N, R) bool, True for the priors that are matched with an object."""
        return (self.labels >= 0) & (self.labels < num_classes)


class Positives(NamedTuple):
    """The P priors of a batch that are matched with an object.

    Attributes:
        mask: (N, R) bool, True for these priors.
        priors: (P, 4) XYXY.
        boxes: (P, 4) XYXY, predicted by the priors.
        truth: (P, 4) XYXY of the matched objects.
    """

    mask: Tensor
    priors: Tensor
    boxes: Tensor
    truth: Tensor


class PriorDetector(DenseDetector):
    """Base class of dense detectors with the same A priors in every cell, by default one square.

    A subclass implements :meth:`assign`, which assigns priors to objects, and :meth:`losses`. It
    may override :meth:`scores`. The head returns at least (logits, regression), lists of
    (N, A · K, Hi, Wi) and (N, A · ``box_dim``, Hi, Wi) maps.

    Args:
        prior_size: side of a square prior in units of its level's stride.
        prior_sizes: (width, height) in pixels of the A priors of each level, instead of squares.
        prior_offset: position of a prior's centre in its cell; 0.5: the middle, 0: the top left
            corner.
        multi_label: False if each prior is a detection of its most probable class only.
        pad_value: value of padding before normalization, in pixel units; None: 0 after it.
        box2box_transform: converts regressions (P, ``box_dim``) and priors (P, 4) to boxes (P, 4).
        num_classes: K, without background.
        test_score_thresh, test_topk_candidates, test_nms_thresh, max_detections_per_image: as in
            detectron2's RetinaNet.
        kwargs: arguments of detectron2's ``DenseDetector``.
    """

    box_dim = 4
    score_maps = 0
    """Number of maps after the regression that :meth:`scores` reads."""

    def __init__(
        self,
        *,
        prior_size: float = 1.0,
        prior_sizes: Sequence[Sequence[tuple[float, float]]] | None = None,
        prior_offset: float = 0.5,
        box2box_transform: Any,
        num_classes: int,
        multi_label: bool = True,
        pad_value: float | None = None,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        shapes = self.backbone.output_shape()
        self.strides = [shapes[name].stride for name in self.head_in_features]
        squares = [[(prior_size * stride, prior_size * stride)] for stride in self.strides]
        self.anchor_generator = SizedAnchorGenerator(
            sizes=prior_sizes or squares, strides=self.strides, offset=prior_offset
        )
        self.prior_size = prior_size
        self.multi_label = multi_label
        self.pad_value = pad_value
        self.box2box_transform = box2box_transform
        self.num_classes = num_classes
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image

    def preprocess_image(self, batched_inputs: list[dict[str, Tensor]]) -> ImageList:
        """Normalize, pad and batch the images; padding is at the bottom and at the right."""
        if self.pad_value is None:
            return super().preprocess_image(batched_inputs)
        images = [self._move_to_current_device(x["image"]) for x in batched_inputs]
        constraints = self.backbone.padding_constraints
        largest = max(side for x in images for side in x.shape[-2:])
        square = constraints.get("square_size", 0)
        if 0 < square < largest:  # detectron2 would cut the image silently
            raise ValueError(
                f"A side of an image has {largest} pixels, but images are padded to {square} x "
                f"{square}; lower INPUT.MAX_SIZE_TRAIN and INPUT.MAX_SIZE_TEST"
            )
        padded = ImageList.from_tensors(
            images, self.backbone.size_divisibility, self.pad_value, constraints
        )
        pixels = (padded.tensor - self.pixel_mean) / self.pixel_std
        return ImageList(pixels, padded.image_sizes)

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: Sequence[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        priors = self.anchor_generator(features)
        return self.losses(priors, predictions, gt_instances)

    def losses(
        self,
        priors: list[Boxes],
        predictions: Sequence[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Return the losses by name.

        Args:
            priors: the priors of each level.
            predictions: output of the head.
            gt_instances: the objects of each image.
        """
        raise NotImplementedError

    def assign(self, priors: list[Tensor], gt: Tensor) -> Tensor:
        """Return (R,) indices of the ground-truth box of each prior, or -1.

        Args:
            priors: one (Ri, 4) XYXY tensor per level.
            gt: (M, 4) XYXY.
        """
        raise NotImplementedError

    def scores(self, logits: Tensor, *others: Tensor) -> Tensor:
        """Return the scores of one image and level, (P, K) in [0, 1].

        Args:
            logits: (P, K).
            others: the ``score_maps`` other maps, (P, 1) each.
        """
        return logits.sigmoid()

    @torch.no_grad()
    def targets(self, priors: list[Boxes], gt_instances: list[Instances]) -> Targets:
        """Return the labels and boxes that :meth:`assign` gives to the priors of each image."""
        tensors = [x.tensor for x in priors]
        matched = [self.assign(tensors, x.gt_boxes.tensor) for x in gt_instances]
        pairs = [labelled(x, m, self.num_classes) for x, m in zip(gt_instances, matched)]
        return Targets(*(torch.stack(x) for x in zip(*pairs)))

    def flat(self, maps: list[Tensor], width: int) -> Tensor:
        """Concatenate (N, width, Hi, Wi) maps of all levels to (N, R, width) in full precision."""
        return torch.cat([permute_to_N_HWA_K(x, width) for x in maps], 1).float()

    def decoded(self, regression: Tensor, priors: Tensor) -> Tensor:
        """Decode (..., ``box_dim``) regressions at (..., 4) priors to (..., 4) boxes."""
        flat = self.box2box_transform.apply_deltas(
            regression.reshape(-1, regression.shape[-1]), priors.reshape(-1, 4)
        )
        return flat.view(*regression.shape[:-1], 4)

    def all_boxes(self, regression: Tensor, priors: list[Boxes]) -> Tensor:
        """Decode (N, R, ``box_dim``) regressions of all levels to (N, R, 4) boxes."""
        cells = Boxes.cat(priors).tensor
        return self.decoded(regression, cells.expand(len(regression), -1, -1))

    def positives(self, regression: Tensor, priors: Tensor, targets: Targets) -> Positives:
        """Select the matched priors and decode their boxes.

        Args:
            regression: (N, R, ``box_dim``).
            priors: (R, 4) XYXY.
            targets: the targets of the batch.
        """
        mask = targets.positive(self.num_classes)
        matched = priors.expand(*mask.shape, 4)[mask]
        return Positives(
            mask, matched, self.decoded(regression[mask], matched), targets.boxes[mask]
        )

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: Sequence[list[Tensor]]
    ) -> list[Instances]:
        priors = self.anchor_generator(features)
        logits, regression, *others = self.rows(predictions)
        results = []
        for i, size in enumerate(images.image_sizes):
            scores = [self.scores(*(x[i].float() for x in xs)) for xs in zip(logits, *others)]
            if not self.multi_label:
                scores = [best_class(x) for x in scores]
            boxes = [x[i].float() for x in regression]
            results.append(self.inference_single_image(priors, scores, boxes, size))
        return results

    def rows(self, predictions: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        """Return the head's maps that inference reads as rows, (N, Hi · Wi · A, D) per level."""
        widths = [self.num_classes, self.box_dim, *([1] * self.score_maps)]
        return self._transpose_dense_predictions(list(predictions[: len(widths)]), widths)

    def inference_single_image(
        self,
        priors: list[Boxes],
        scores: list[Tensor],
        regression: list[Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        """Return the detections of one image by descending score."""
        found = self._decode_multi_level_predictions(
            priors,
            scores,
            regression,
            self.test_score_thresh,
            self.test_topk_candidates,
            image_size,
        )
        keep = batched_nms(
            found.pred_boxes.tensor, found.scores, found.pred_classes, self.test_nms_thresh
        )
        return found[keep[: self.max_detections_per_image]]


class DynamicTargets(NamedTuple):
    """Training targets of the priors of a batch, from an assignment that reads predictions.

    Attributes:
        labels: (N, R) in [0, K]; K means background.
        boxes: (N, R, 4) XYXY of the matched objects; undefined for unmatched priors.
        quality: (N, R) IoU of the predicted with the matched box, 0 without a match.
        matched: (N, R) row of the object in its image, or -1.
    """

    labels: Tensor
    boxes: Tensor
    quality: Tensor
    matched: Tensor


class DynamicDetector(PriorDetector):
    """Base class of detectors whose assignment reads predictions; a subclass has :meth:`match`."""

    def match(
        self, points: Tensor, strides: Tensor, truth: Instances, *predicted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Assign the priors of one image.

        Args:
            points: (R, 2) centres of the priors.
            strides: (R,) sides of the priors.
            truth: the objects of the image.
            predicted: predictions (R, ...).

        Returns:
            (R,) row of the object, or -1, and (R,) IoU with it, or 0.
        """
        raise NotImplementedError

    @torch.no_grad()
    def dynamic_targets(
        self, priors: list[Boxes], gt_instances: list[Instances], *predicted: Tensor
    ) -> DynamicTargets:
        """Return the targets that :meth:`match` gives to the priors of each image.

        Args:
            priors: the priors of each level.
            gt_instances: the objects of each image.
            predicted: predictions (N, R, ...).
        """
        points, strides = points_and_strides(priors)
        rows = []
        for truth, *predictions in zip(gt_instances, *predicted):
            matched, quality = self.match(points, strides, truth, *predictions)
            rows.append((*labelled(truth, matched, self.num_classes), quality, matched))
        return DynamicTargets(*(torch.stack(x) for x in zip(*rows)))


def points_and_strides(priors: list[Boxes]) -> tuple[Tensor, Tensor]:
    """Return the (R, 2) centres and the (R,) sides of square priors of all levels."""
    cells = Boxes.cat(priors)
    return cells.get_centers(), cells.tensor[:, 2] - cells.tensor[:, 0]


class ObjectnessDetector(PriorDetector):
    """Base class of detectors whose head also predicts an objectness, (N, A, Hi, Wi) per level.

    A score is the product of the probabilities of the class and of an object.
    """

    score_maps = 1

    def score_logits(self, logits: Tensor, objectness: Tensor) -> Tensor:
        """Return the logits of the scores of a level, (N, A · K, H, W), in full precision.

        With the logits c of a class and o of the objectness they are::

            log(s / (1 − s)) with s = σ(c) · σ(o), which equals c + o − log(1 + exp(c) + exp(o))

        Args:
            logits: (N, A · K, H, W).
            objectness: (N, A, H, W).
        """
        c = logits.float().unflatten(1, (objectness.shape[1], -1))
        o = objectness.float()[:, :, None].expand_as(c)
        return (c + o - torch.stack([torch.zeros_like(c), c, o]).logsumexp(0)).flatten(1, 2)

    def scores(self, logits: Tensor, *others: Tensor) -> Tensor:
        (objectness,) = others
        return logits.sigmoid() * objectness.sigmoid()


class SizedAnchorGenerator(DefaultAnchorGenerator):
    """detectron2's anchor generator for anchors of given widths and heights.

    Args:
        sizes: (width, height) in pixels of the anchors of each level.
        strides: stride of each level.
        offset: position of the anchors' centre in a cell, in [0, 1).
    """

    def __init__(
        self,
        *,
        sizes: Sequence[Sequence[tuple[float, float]]],
        strides: Sequence[int],
        offset: float = 0.5,
    ):
        super().__init__(sizes=[[1.0]], aspect_ratios=[1.0], strides=strides, offset=offset)
        corners = torch.tensor([-0.5, -0.5, 0.5, 0.5])
        self.cell_anchors = BufferList([torch.tensor(x).repeat(1, 2) * corners for x in sizes])


class CellTransform:
    """Box transform, with detectron2's interface: corners relative to the cell centre, in cells.

    The centre and the side of a cell are those of its square prior.
    """

    def get_deltas(self, cells: Tensor, boxes: Tensor) -> Tensor:
        """Return the (P, 4) deltas of (P, 4) XYXY boxes relative to their cells."""
        centres, size = _centres_and_size(cells)
        return (boxes - centres) / size

    def apply_deltas(self, deltas: Tensor, cells: Tensor) -> Tensor:
        """Return the (P, 4) XYXY boxes of (P, 4) deltas relative to their cells."""
        centres, size = _centres_and_size(cells)
        return deltas * size + centres


def _centres_and_size(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (P, 4) centres x, y, x, y and the (P, 1) sizes of square cells."""
    centres = (cells[:, :2] + cells[:, 2:]) / 2  # without Boxes, which asks if there are any
    return centres.repeat(1, 2), cells[:, 2:3] - cells[:, :1]


def best_class(scores: Tensor) -> Tensor:
    """Return (P, K) scores that are −∞ except for the best class of each row."""
    best, index = scores.max(1, keepdim=True)
    return torch.full_like(scores, -torch.inf).scatter(1, index, best)


class Scale(nn.Module):
    """A learned scalar factor.

    Levels share the convolutions of a head, but not the range of sizes: each has its own factor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def labelled(truth: Instances, matched: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Convert matches to labels and boxes.

    Args:
        truth: the objects of one image.
        matched: (R,) index of the object of each prior, or -1 for background.
        num_classes: K, the label of background.

    Returns:
        (R,) labels and (R, 4) boxes.
    """
    if len(truth) == 0:
        return torch.full_like(matched, num_classes), truth.gt_boxes.tensor.new_zeros(
            len(matched), 4
        )
    index = matched.clamp(min=0)
    labels = truth.gt_classes[index].where(matched >= 0, num_classes)
    return labels, truth.gt_boxes.tensor[index]


def detector_arguments(cfg: CfgNode, section: CfgNode) -> dict[str, Any]:
    """Return the constructor arguments that all dense detectors share, without the head."""
    return {
        "backbone": build_backbone(cfg),
        "head_in_features": list(section.IN_FEATURES),
        "num_classes": section.NUM_CLASSES,
        "test_score_thresh": section.SCORE_THRESH_TEST,
        "test_topk_candidates": section.TOPK_CANDIDATES_TEST,
        "test_nms_thresh": section.NMS_THRESH_TEST,
        "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
    }


def yolo_arguments(cfg: CfgNode, section: CfgNode) -> dict[str, Any]:
    """Return :func:`detector_arguments` of a detector that has the keys of ``YOLO_SECTION``."""
    return {
        **detector_arguments(cfg, section),
        "multi_label": section.MULTI_LABEL_TEST,
        "pad_value": section.PAD_VALUE,
    }


def input_shapes(detector: dict[str, Any]) -> list[ShapeSpec]:
    """Return the shapes of the levels that the head reads.

    Args:
        detector: result of :func:`detector_arguments`.
    """
    shapes = detector["backbone"].output_shape()
    return [shapes[name] for name in detector["head_in_features"]]


def head_arguments(section: CfgNode, detector: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of detectron2's RetinaNetHead and FCOSHead.

    Args:
        section: config section of the detector.
        detector: result of :func:`detector_arguments`.
    """
    inputs = input_shapes(detector)
    return {
        "input_shape": inputs,
        "num_classes": section.NUM_CLASSES,
        "conv_dims": [inputs[0].channels] * section.NUM_CONVS,
        "norm": section.NORM,
        "prior_prob": section.PRIOR_PROB,
    }


def yolo_head_arguments(
    section: CfgNode, detector: dict[str, Any], style: ConvStyle
) -> dict[str, Any]:
    """Return the arguments that the heads of RTMDet and YOLOX share.

    Args:
        section: config section of the detector.
        detector: result of :func:`yolo_arguments`.
        style: style of the convolutions.
    """
    return {
        "input_shape": input_shapes(detector),
        "num_classes": section.NUM_CLASSES,
        "num_convs": section.NUM_CONVS,
        "style": style,
        "prior_prob": section.PRIOR_PROB,
    }


def init_bias(layer: nn.Module, prior_prob: float) -> None:
    """Set the bias of a predictor so that its probabilities start at ``prior_prob``."""
    bias: Any = layer.bias
    nn.init.constant_(bias, -math.log(1 / prior_prob - 1))

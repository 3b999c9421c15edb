"""Base class and helpers of the dense detectors of this package."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import batched_nms
from detectron2.modeling import build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ..section import FRACTION, INSIDE_0_1, NUMBER, TEXT, TEXTS, Key, Section, at_least

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
    """Base class of dense detectors with one square prior at the centre of every cell.

    A subclass implements :meth:`assign`, which assigns priors to objects, and :meth:`losses`. It
    may override :meth:`scores`. The head returns at least (logits, regression), lists of
    (N, K, Hi, Wi) and (N, ``box_dim``, Hi, Wi) maps.

    Args:
        prior_size: side of a prior in units of its level's stride.
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
        prior_size: float,
        box2box_transform: Any,
        num_classes: int,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        shapes = self.backbone.output_shape()
        self.strides = [shapes[name].stride for name in self.head_in_features]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[prior_size * stride] for stride in self.strides],
            aspect_ratios=[1.0],
            strides=self.strides,
            offset=0.5,
        )
        self.prior_size = prior_size
        self.box2box_transform = box2box_transform
        self.num_classes = num_classes
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image

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
        widths = [self.num_classes, self.box_dim, *([1] * self.score_maps)]
        logits, regression, *others = self._transpose_dense_predictions(
            predictions[: len(widths)], widths
        )
        results = []
        for i, size in enumerate(images.image_sizes):
            scores = [self.scores(*(x[i].float() for x in xs)) for xs in zip(logits, *others)]
            boxes = [x[i].float() for x in regression]
            results.append(self.inference_single_image(priors, scores, boxes, size))
        return results

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


def head_arguments(section: CfgNode, detector: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of detectron2's RetinaNetHead and FCOSHead.

    Args:
        section: config section of the detector.
        detector: result of :func:`detector_arguments`.
    """
    shapes = detector["backbone"].output_shape()
    inputs = [shapes[name] for name in detector["head_in_features"]]
    return {
        "input_shape": inputs,
        "num_classes": section.NUM_CLASSES,
        "conv_dims": [inputs[0].channels] * section.NUM_CONVS,
        "norm": section.NORM,
        "prior_prob": section.PRIOR_PROB,
    }

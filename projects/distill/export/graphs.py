"""Inference of one image as a function of tensors, which an exporter can follow.

detectron2's own inference passes ``Instances`` and asks how many objects there are. A graph calls
the same modules: backbone, heads and box transforms. It repeats only the selection of detections,
with operators that work for any number of objects.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar, NamedTuple

import torch
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, SemanticSegmentor
from detectron2.modeling.meta_arch import fcos
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import BaseMaskRCNNHead, CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn
from torchvision.ops import nms

from ..errors import ConfigError
from ..nets import RTMDet, RTMDetIns
from ..nets.assign import dynamic_masks
from ..nets.blocks import RepConv
from ..nets.dense import PriorDetector, best_class
from ..nets.yolov7 import ImplicitConv

Values = dict[str, Tensor]
"""Outputs of a graph by name, in a fixed order."""

MOST = 2**31  # upper bound of the number of boxes in an exporter's calculations with sizes

GRAPHS: list[type["Graph"]] = []
"""Kinds of graphs; of those that fit a network, the last one is used."""


def register(graph: type["Graph"]) -> type["Graph"]:
    """Add a kind of graph, which :func:`build_graph` finds by its ``architecture``."""
    GRAPHS.append(graph)
    return graph


def build_graph(model: nn.Module, **parts: bool) -> "Graph":
    """Return the graph of a network, which shares its weights.

    Args:
        model: a detectron2 network in evaluation mode.
        parts: arguments of :class:`Graph`.

    Raises:
        ConfigError: if no graph fits the network or one of its parts.
    """
    for graph in reversed(GRAPHS):
        if isinstance(model, graph.architecture):
            return graph(model, **parts)
    raise ConfigError(
        f"{type(model).__name__} has no graph to export; register one for it with "
        "distill.export.graphs.register."
    )


class Graph(nn.Module):
    """Base class of graphs.

    A subclass names its ``architecture`` and implements :meth:`predict`, :meth:`raw` and
    :meth:`final`.

    Args:
        model: a network in evaluation mode.
        normalizes: True if pixels are normalized in the graph.
        with_raw: True to return the :meth:`raw` outputs.
        with_final: True to return the :meth:`final` outputs.
        with_features: True to return the maps of the backbone, by which the file can teach.
    """

    architecture: ClassVar[type[nn.Module]] = nn.Module

    def __init__(
        self,
        model: nn.Module,
        *,
        normalizes: bool = True,
        with_raw: bool = True,
        with_final: bool = True,
        with_features: bool = False,
    ):
        super().__init__()
        self.model: Any = model
        self.normalizes = normalizes
        self.with_raw = with_raw
        self.with_final = with_final
        self.levels = feature_strides(model.backbone) if with_features else {}
        self.eval()

    def forward(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the order of :meth:`values`."""
        return tuple(self.values(image, image_size).values())

    def values(self, image: Tensor, image_size: Tensor) -> Values:
        """Return the outputs by name.

        Args:
            image: (1, 3, H, W) in the network's channel order. The image is at the top left; the
                rest is padding.
            image_size: (2,) int64 height and width of the image without padding.
        """
        features = self.features(image)
        predictions = self.predict(features, image_size)
        values: Values = {name: features[name] for name in self.levels}
        if self.with_raw:
            values.update(self.raw(predictions))
        if self.with_final:
            values.update(self.final(predictions, image_size))
        return values

    def raw_values(self, image: Tensor, image_size: Tensor, found: Values) -> Values:
        """Return the raw outputs by name, to compare them with those of a file.

        Args:
            image, image_size: as in :meth:`values`.
            found: the outputs of the file, whose intermediate results a subclass may use.
        """
        features = self.features(image)
        return self.compared(features, self.predict(features, image_size))

    def compared(self, features: dict[str, Tensor], predictions: Any) -> Values:
        """Return the raw outputs and the maps of the backbone that the file has."""
        return {**{name: features[name] for name in self.levels}, **self.raw(predictions)}

    def features(self, image: Tensor) -> dict[str, Tensor]:
        """Return the maps of the backbone."""
        if self.normalizes:
            image = (image - self.model.pixel_mean) / self.model.pixel_std
        return self.model.backbone(image)

    def info(self) -> dict[str, Any]:
        """Return the part of the metadata that depends on the kind of network."""
        return {}

    def predict(self, features: dict[str, Tensor], image_size: Tensor) -> Any:
        """Return the predictions that :meth:`raw` and :meth:`final` read."""
        raise NotImplementedError

    def raw(self, predictions: Any) -> Values:
        """Return the outputs of the layers, before scores are compared with a threshold."""
        raise NotImplementedError

    def final(self, predictions: Any, image_size: Tensor) -> Values:
        """Return the detections, or the semantic logits of the padded image."""
        raise NotImplementedError


def feature_strides(backbone: Any) -> dict[str, int]:
    """Return the strides of the maps of a backbone that heads compare, by name."""
    hidden = {*getattr(backbone, "shallow_features", {}).values()}
    hidden.update(getattr(backbone, "inner_features", ()))
    return {k: x.stride for k, x in backbone.output_shape().items() if k not in hidden}


# ---- Selection of detections.


def clipped(boxes: Tensor, image_size: Tensor) -> Tensor:
    """Return (..., 4) XYXY boxes clipped to an image of ``image_size`` (2,), height and width."""
    return torch.minimum(boxes.clamp(min=0), image_size.flip(0).repeat(2).to(boxes))


def nonempty(boxes: Tensor, threshold: float = 0.0) -> Tensor:
    """Return (P,) bool, True for (P, 4) XYXY boxes whose sides exceed the threshold."""
    return ((boxes[:, 2:] - boxes[:, :2]) > threshold).all(1)


def indices(mask: Tensor) -> Tensor:
    """Return the (M,) indices at which a (P,) mask is True."""
    found = mask.nonzero()[:, 0]
    if torch.compiler.is_exporting():  # without a bound, the sum of such sizes exceeds int64
        torch._check(found.shape[0] <= MOST)
    return found


def divided(index: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of indices into a flattened table of ``number`` columns."""
    row = index // number  # exporters compute torch.div in float32, which has 24 bits
    return row, index - row * number


def largest(values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the ``most`` largest of (P,) values and their indices, in descending order.

    If P is smaller, there are −∞ with indices from P on, so that the number does not depend on P.
    """
    return torch.cat([values, values.new_full((most,), -torch.inf)]).topk(most)


def class_nms(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Return the indices of the boxes that remain after NMS per class, by descending score.

    As in torchvision's ``batched_nms``, boxes of different classes are moved apart, and a single
    NMS follows. torchvision loops over classes if there are more than 1000 boxes. The difference is
    the rounding of the moved coordinates.

    Args:
        boxes: (P, 4) XYXY.
        scores: (P,).
        classes: (P,) int64.
        threshold: IoU above which the box with the smaller score is removed.
    """
    farthest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).amax(0)
    return nms(boxes + (classes.to(boxes) * (farthest + 1))[:, None], scores, threshold)


# ---- Dense detectors.


@register
class DenseGraph(Graph):
    """Graph of a dense detector.

    ``boxes`` are (D, 4) XYXY in pixels of the network's input, clipped to the image. ``scores`` and
    ``classes`` are (D,). Raw outputs are the maps of the head, such as ``logits_s8`` of the level
    with stride 8.
    """

    architecture = DenseDetector
    clips_before_nms: ClassVar[bool] = False
    """True if boxes are clipped, and empty ones left out, before NMS instead of after it."""

    @property
    def maps(self) -> tuple[str, ...]:
        """Names of the head's outputs that inference reads."""
        return "logits", "deltas"

    def info(self) -> dict[str, Any]:
        return {
            "score_threshold": self.model.test_score_thresh,
            "nms_threshold": self.model.test_nms_thresh,
            "max_detections": self.model.max_detections_per_image,
        }

    def predict(
        self, features: dict[str, Tensor], image_size: Tensor
    ) -> tuple[list[Tensor], Sequence[list[Tensor]]]:
        """Return the levels that the head reads, and its outputs."""
        levels = [features[name] for name in self.model.head_in_features]
        return levels, self.model.head(levels)[: len(self.maps)]

    def raw(self, predictions: Any) -> Values:
        shapes = self.model.backbone.output_shape()
        strides = [shapes[name].stride for name in self.model.head_in_features]
        return {
            f"{name}_s{stride}": x
            for name, levels in zip(self.maps, predictions[1])
            for stride, x in zip(strides, levels)
        }

    def final(self, predictions: Any, image_size: Tensor) -> Values:
        levels, maps = predictions
        scores, regression = self.scored(maps)
        best, rows, classes = self.candidates(scores)
        deltas = torch.cat(regression)[rows]
        priors = torch.cat([x.tensor for x in self.model.anchor_generator(levels)])[rows]
        boxes = self.boxes(deltas, priors)
        if self.clips_before_nms:
            boxes = clipped(boxes, image_size)
            above = indices(nonempty(boxes))
            boxes, best, classes = boxes[above], best[above], classes[above]
            deltas, priors = deltas[above], priors[above]
        order = class_nms(boxes, best, classes, self.model.test_nms_thresh)
        order = order[: self.model.max_detections_per_image]
        values = {
            "boxes": clipped(boxes[order], image_size),
            "scores": best[order],
            "classes": classes[order],
        }
        return values | self.masks(maps, deltas[order], priors[order])

    def candidates(self, scores: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Select the candidates for NMS.

        Args:
            scores: (Pi, K) per level.

        Returns:
            (C,) scores, rows of the priors of all levels together, and classes.
        """
        first, found = 0, []
        for level in scores:
            best, index = largest(level.flatten(), self.model.test_topk_candidates)
            above = indices(best > self.model.test_score_thresh)
            best, index = best[above], index[above]
            row, column = divided(index, level.shape[1])
            found.append((best, row + first, column))
            first = first + level.shape[0]
        best, rows, classes = (torch.cat(x) for x in zip(*found))
        return best, rows, classes

    def scored(self, maps: Sequence[list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the scores (Pi, K) and regressions (Pi, D) of each level."""
        widths = [self.model.num_classes, 4, *([1] * (len(maps) - 2))]
        rows = self.model._transpose_dense_predictions(list(maps), widths)
        logits, regression, *others = [[x[0] for x in levels] for levels in rows]
        return [self.score(*x) for x in zip(logits, *others)], regression

    def score(self, logits: Tensor, *others: Tensor) -> Tensor:
        """Return the scores of a level, (P, K), of logits (P, K) and further maps (P, 1)."""
        return logits.sigmoid()

    def boxes(self, regression: Tensor, priors: Tensor) -> Tensor:
        """Return the (P, 4) XYXY boxes of (P, D) regressions at (P, 4) priors."""
        return self.model.box2box_transform.apply_deltas(regression, priors)

    def masks(self, maps: Sequence[list[Tensor]], regression: Tensor, priors: Tensor) -> Values:
        """Return the masks of the detections, if there are any.

        Args:
            maps: the head's outputs.
            regression: (D, ...) regressions of the detections.
            priors: (D, 4) XYXY.
        """
        return {}


@register
class FCOSGraph(DenseGraph):
    """Graph of detectron2's FCOS."""

    architecture = fcos.FCOS

    @property
    def maps(self) -> tuple[str, ...]:
        return "logits", "deltas", "quality"

    def score(self, logits: Tensor, *others: Tensor) -> Tensor:
        return (logits.sigmoid() * others[0].sigmoid()).sqrt()


@register
class PriorGraph(DenseGraph):
    """Graph of the dense detectors of :mod:`distill.nets`."""

    architecture = PriorDetector

    @property
    def maps(self) -> tuple[str, ...]:
        return ("logits", "deltas", "quality")[: 2 + self.model.score_maps]

    def scored(self, maps: Sequence[list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        rows = [[x[0].float() for x in levels] for levels in self.model.rows(maps)]
        logits, regression, *others = rows
        scores = [self.model.scores(*x) for x in zip(logits, *others)]
        return (scores if self.model.multi_label else list(map(best_class, scores))), regression


@register
class RTMDetGraph(PriorGraph):
    """Graph of RTMDet."""

    architecture = RTMDet
    clips_before_nms = True


@register
class RTMDetInsGraph(RTMDetGraph):
    """Graph of RTMDet-Ins; ``image_masks`` (D, h, w) are logits of the padded image."""

    architecture = RTMDetIns

    @property
    def maps(self) -> tuple[str, ...]:
        return "logits", "deltas", "kernels", "prototypes"

    def info(self) -> dict[str, Any]:
        return {**super().info(), "mask_stride": self.model.strides[0]}

    def boxes(self, regression: Tensor, priors: Tensor) -> Tensor:
        return super().boxes(regression[:, :4], priors)

    def masks(self, maps: Sequence[list[Tensor]], regression: Tensor, priors: Tensor) -> Values:
        centres, sides = (priors[:, :2] + priors[:, 2:]) / 2, priors[:, 2] - priors[:, 0]
        (prototypes,) = maps[3]
        logits = dynamic_masks(
            regression[:, 4:], centres, sides, prototypes[0].float(), self.model.strides[0]
        )
        return {"image_masks": logits}


# ---- R-CNNs.


class RCNNPredictions(NamedTuple):
    """Predictions of an R-CNN.

    Attributes:
        features: maps of the backbone.
        rpn: outputs of the RPN's head by name.
        proposals: (P, 4) XYXY.
        scores: (P, K + 1) probabilities; the last column is the background.
        boxes: (P, K or 1, 4) XYXY of each class, or of all classes, clipped to the image.
    """

    features: dict[str, Tensor]
    rpn: Values
    proposals: Tensor
    scores: Tensor
    boxes: Tensor


@register
class RCNNGraph(Graph):
    """Graph of Faster, Mask and Cascade R-CNN with an FPN.

    Outputs are those of :class:`DenseGraph`, and with masks ``roi_masks`` (D, M, M), probabilities
    on a grid over each box. Raw outputs are the maps of the RPN, such as ``objectness_s4``, and
    ``proposals``, ``proposal_scores`` and ``proposal_boxes``, see :class:`RCNNPredictions`.

    Raises:
        ConfigError: if the network has parts that no graph has.
    """

    architecture = GeneralizedRCNN

    def __init__(self, model: nn.Module, **parts: bool):
        check_rcnn(model)
        super().__init__(model, **parts)
        heads = self.model.roi_heads
        cascade = isinstance(heads, CascadeROIHeads)
        self.box_heads = list(heads.box_head) if cascade else [heads.box_head]
        self.predictors = list(heads.box_predictor) if cascade else [heads.box_predictor]

    def info(self) -> dict[str, Any]:
        last = self.predictors[-1]
        return {
            "score_threshold": last.test_score_thresh,
            "nms_threshold": last.test_nms_thresh,
            "max_detections": last.test_topk_per_image,
        }

    def predict(self, features: dict[str, Tensor], image_size: Tensor) -> RCNNPredictions:
        rpn, proposals = self.propose(features, image_size)
        return self.classify(features, rpn, proposals, image_size)

    def raw_values(self, image: Tensor, image_size: Tensor, found: Values) -> Values:
        """Return the raw outputs; those of the second stage are for the proposals of the file."""
        features = self.features(image)
        rpn, proposals = self.propose(features, image_size)
        second = self.classify(features, rpn, found["proposals"], image_size)
        return {**self.compared(features, second), "proposals": proposals}

    def propose(self, features: dict[str, Tensor], image_size: Tensor) -> tuple[Values, Tensor]:
        """Return the outputs of the RPN's head, and (P, 4) proposals by descending objectness."""
        rpn = self.model.proposal_generator
        levels = [features[name] for name in rpn.in_features]
        logits, deltas = rpn.rpn_head(levels)
        priors = rpn.anchor_generator(levels)
        found = [self._candidates(k, *x) for k, x in enumerate(zip(logits, deltas, priors))]
        boxes, scores, level = (torch.cat(x) for x in zip(*found))
        boxes = clipped(boxes, image_size)
        above = indices(nonempty(boxes, rpn.min_box_size))
        order = class_nms(boxes[above], scores[above], level[above], rpn.nms_thresh)
        strides = rpn.anchor_generator.strides
        maps = {f"objectness_s{stride}": x for stride, x in zip(strides, logits)}
        maps |= {f"anchor_deltas_s{stride}": x for stride, x in zip(strides, deltas)}
        return maps, boxes[above][order[: rpn.post_nms_topk[False]]]

    def _candidates(
        self, level: int, logits: Tensor, deltas: Tensor, priors: Boxes
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the boxes (C, 4), logits and level of a level's proposals before NMS."""
        rpn = self.model.proposal_generator
        best, index = largest(logits[0].permute(1, 2, 0).flatten(), rpn.pre_nms_topk[False])
        valid = indices(best > -torch.inf)
        best, index = best[valid], index[valid]
        regression = permute_to_N_HWA_K(deltas, 4)[0, index]
        boxes = rpn.box2box_transform.apply_deltas(regression, priors.tensor[index])
        return boxes, best, torch.full_like(index, level)

    def classify(
        self, features: dict[str, Tensor], rpn: Values, proposals: Tensor, image_size: Tensor
    ) -> RCNNPredictions:
        """Return the predictions of the box heads for (P, 4) proposals."""
        heads = self.model.roi_heads
        levels = [features[name] for name in heads.box_in_features]
        boxes, probabilities = proposals, []
        for head, predictor in zip(self.box_heads, self.predictors):
            boxes = clipped(boxes, image_size)  # those of an earlier stage may be outside
            logits, deltas = predictor(head(pooled(heads.box_pooler, levels, boxes)))
            boxes = predictor.box2box_transform.apply_deltas(deltas, boxes)
            sigmoid = getattr(predictor, "use_sigmoid_ce", False)
            probabilities.append(logits.sigmoid() if sigmoid else logits.softmax(1))
        scores = torch.stack(probabilities).mean(0)
        boxes = clipped(boxes.unflatten(1, (-1, 4)), image_size)
        return RCNNPredictions(features, rpn, proposals, scores, boxes)

    def raw(self, predictions: RCNNPredictions) -> Values:
        return {
            **predictions.rpn,
            "proposals": predictions.proposals,
            "proposal_scores": predictions.scores,
            "proposal_boxes": predictions.boxes,
        }

    def final(self, predictions: RCNNPredictions, image_size: Tensor) -> Values:
        last = self.predictors[-1]
        scores = predictions.scores[:, :-1]
        rows, classes = divided(indices(scores.flatten() > last.test_score_thresh), scores.shape[1])
        agnostic = predictions.boxes.shape[1] == 1
        boxes = predictions.boxes[rows, torch.zeros_like(classes) if agnostic else classes]
        scores = scores[rows, classes]
        order = class_nms(boxes, scores, classes, last.test_nms_thresh)
        if last.test_topk_per_image >= 0:
            order = order[: last.test_topk_per_image]
        boxes, scores, classes = boxes[order], scores[order], classes[order]
        values = {"boxes": boxes, "scores": scores, "classes": classes}
        if self.model.roi_heads.mask_on:
            values["roi_masks"] = self.masks(predictions.features, boxes, classes)
        return values

    def masks(self, features: dict[str, Tensor], boxes: Tensor, classes: Tensor) -> Tensor:
        """Return the (D, M, M) probabilities of the masks of (D, 4) boxes."""
        heads = self.model.roi_heads
        levels = [features[name] for name in heads.mask_in_features]
        logits = heads.mask_head.layers(pooled(heads.mask_pooler, levels, boxes))
        if logits.shape[1] == 1:
            return logits[:, 0].sigmoid()
        index = classes[:, None, None, None].expand(-1, 1, *logits.shape[2:])
        return logits.gather(1, index)[:, 0].sigmoid()


@register
class PanopticGraph(RCNNGraph):
    """Graph of Panoptic FPN, whose ``sem_seg`` is that of :class:`SemanticGraph`.

    Instances and semantic classes are combined outside of the graph: the rule is a loop in which
    each object depends on the one before.
    """

    architecture = PanopticFPN

    def info(self) -> dict[str, Any]:
        rule = {
            "overlap": self.model.combine_overlap_thresh,
            "stuff_area": self.model.combine_stuff_area_thresh,
            "score": self.model.combine_instances_score_thresh,
        }
        return {**super().info(), "panoptic": rule}

    def raw(self, predictions: RCNNPredictions) -> Values:
        logits = sem_seg_logits(self.model.sem_seg_head, predictions.features)
        return {**super().raw(predictions), "sem_seg_logits": logits}

    def final(self, predictions: RCNNPredictions, image_size: Tensor) -> Values:
        values = super().final(predictions, image_size)
        return values | {"sem_seg": self.model.sem_seg_head(predictions.features)[0][0]}


def check_rcnn(model: Any) -> None:
    """Raise a ConfigError if an R-CNN has a part that :class:`RCNNGraph` cannot export."""
    generator, heads = model.proposal_generator, model.roi_heads
    if type(generator) is not RPN:
        raise ConfigError(
            f"MODEL.PROPOSAL_GENERATOR.NAME {type(generator).__name__} cannot be exported; an RPN "
            "can."
        )
    if not isinstance(heads, StandardROIHeads):
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME {type(heads).__name__} cannot be exported; StandardROIHeads and "
            "CascadeROIHeads on an FPN can."
        )
    if heads.keypoint_on:
        raise ConfigError(
            "MODEL.KEYPOINT_ON is True, and keypoints cannot be exported; set it to False to "
            "export boxes and masks only."
        )
    if heads.mask_on and not isinstance(heads.mask_head, BaseMaskRCNNHead):
        raise ConfigError(
            f"MODEL.ROI_MASK_HEAD.NAME {type(heads.mask_head).__name__} cannot be exported; "
            "MaskRCNNConvUpsampleHead can."
        )


def pooled(pooler: ROIPooler, levels: list[Tensor], boxes: Tensor) -> Tensor:
    """Pool the features of (P, 4) boxes, each from the level of its size: (P, C, S, S).

    Args:
        pooler: its levels do the work.
        levels: one map (1, C, Hi, Wi) per level.
        boxes: (P, 4) XYXY.
    """
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)
    if len(levels) == 1:
        return pooler.level_poolers[0](levels[0], rois)
    side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    ratio = side / pooler.canonical_box_size + 1e-8
    level = pooler.canonical_level + ratio.log2()  # FPN, Eq. 1, as in detectron2
    level = level.floor().clamp(pooler.min_level, pooler.max_level) - pooler.min_level
    chosen = [indices(level == k) for k in range(len(levels))]
    parts = [pool(x, rois[i]) for pool, x, i in zip(pooler.level_poolers, levels, chosen)]
    return torch.cat(parts)[torch.cat(chosen).argsort()]


# ---- Semantic segmenters.


@register
class SemanticGraph(Graph):
    """Graph of a semantic segmenter.

    ``sem_seg`` (K, H, W) are logits of the padded image. The raw output ``sem_seg_logits`` has the
    stride of the head.
    """

    architecture = SemanticSegmentor

    def predict(self, features: dict[str, Tensor], image_size: Tensor) -> dict[str, Tensor]:
        return features

    def raw(self, predictions: Any) -> Values:
        return {"sem_seg_logits": sem_seg_logits(self.model.sem_seg_head, predictions)}

    def final(self, predictions: Any, image_size: Tensor) -> Values:
        return {"sem_seg": self.model.sem_seg_head(predictions)[0][0]}


def sem_seg_logits(head: Any, features: dict[str, Tensor]) -> Tensor:
    """Return a semantic head's logits, (1, K, h, w), before they are enlarged to the image.

    detectron2's ``DeepLabV3Head`` has no method for that, and its enlarged ones are returned.
    """
    return head.layers(features) if hasattr(head, "layers") else head(features)[0]


# ---- Layers that exporters lack.


class MeanGrid(nn.Module):
    """``AdaptiveAvgPool2d`` as two matrix products, for maps whose size is not fixed.

    Args:
        size: number of cells along each side.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, size, size)."""
        rows, columns = (self.weights(n, x) for n in x.shape[-2:])
        return rows @ x @ columns.T

    def weights(self, length: int, x: Tensor) -> Tensor:
        """Return the (size, length) weights of the mean in each cell, as ``x``.

        Cell k covers the indices from ⌊k · length / size⌋ to ⌈(k + 1) · length / size⌉.
        """
        cell = torch.arange(self.size, device=x.device)
        start = cell * length // self.size
        end = ((cell + 1) * length + self.size - 1) // self.size
        index = torch.arange(length, device=x.device)
        inside = (index >= start[:, None]) & (index < end[:, None])
        return inside.to(x) / (end - start)[:, None]


def exportable(model: nn.Module) -> nn.Module:
    """Return a copy of the network in evaluation mode for an exporter.

    It has no layers that exporters lack, and one convolution in place of several that are equal to
    it (YOLOv7).
    """
    model = deepcopy(model).eval().requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d) and isinstance(child.output_size, int):
                setattr(parent, name, MeanGrid(child.output_size))
            elif isinstance(child, RepConv | ImplicitConv):
                setattr(parent, name, child.fused())
    return model

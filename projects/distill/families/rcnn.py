"""Faster, Mask, Cascade R-CNN and Panoptic FPN."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from detectron2.layers import cat
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.roi_heads import BaseMaskRCNNHead, CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from torch import Tensor, nn

from ..structures import Batch, Masks, NetworkInfo, NetworkOutputs, ROIs
from .base import Family, whole_images
from .dense import decode_dense, dense_outputs
from .detector_losses import DetectorLosses
from .layout import dense_layout
from .recorder import Recorder
from .semantic import ask_sem_seg, read_sem_seg, sem_seg_modules

RPN_HEAD = "proposal_generator.rpn_head"
BOX_POOLER = "roi_heads.box_pooler"
MASK_HEAD = "roi_heads.mask_head"
MASK_PREDICTOR = "roi_heads.mask_head.predictor"


class RCNNFamily(Family):
    """R-CNNs; those with C4 have no box predictions to compare.

    Boxes are read from the arguments of ``box_pooler`` and ``mask_head``, because
    TRAIN_ON_PRED_BOXES rewrites those in the proposals. Labels are read from the output of
    ``roi_heads``.
    """

    architecture = GeneralizedRCNN

    def __init__(self, model: nn.Module):
        super().__init__(model)
        heads = self.model.roi_heads
        predictors: Any = heads.box_predictor
        box_heads: Any = getattr(heads, "box_head", None)  # not with C4
        cascade = isinstance(heads, CascadeROIHeads)
        self.predictors = list(predictors) if cascade else [predictors]
        self.box_heads = list(box_heads) if cascade else [box_heads]
        self.predictor_names = [
            f"roi_heads.box_predictor.{k}" if cascade else "roi_heads.box_predictor"
            for k in range(len(self.predictors))
        ]

    @property
    def outputs(self) -> frozenset[str]:
        outputs = {*super().outputs}
        if hasattr(self.model.proposal_generator, "rpn_head"):  # not with precomputed proposals
            outputs |= {"dense", "dense_boxes", "detections"}
        heads = self.model.roi_heads
        mask_head = getattr(heads, "mask_head", None)
        if isinstance(heads, StandardROIHeads):  # C4 has one block for pooled features and boxes
            outputs.add("rois")
            if isinstance(mask_head, BaseMaskRCNNHead) and hasattr(mask_head, "predictor"):
                outputs.add("masks")
        if hasattr(self.model, "sem_seg_head"):
            outputs.add("sem_seg")
        return frozenset(outputs)

    @property
    def num_classes(self) -> int:
        return self.model.roi_heads.num_classes

    def info(
        self, name: str, classes: tuple[str, ...], sem_seg_classes: tuple[str, ...] = ()
    ) -> NetworkInfo:
        info = super().info(name, classes, sem_seg_classes)
        generator, heads = self.model.proposal_generator, self.model.roi_heads
        sigmoid = any(getattr(x, "use_sigmoid_ce", False) for x in self.predictors)
        cropped = getattr(heads, "box_in_features", None) or heads.in_features
        info = replace(info, box_in_features=tuple(cropped), use_sigmoid_ce=sigmoid)
        if "dense" not in info.outputs:  # without an RPN, detector losses cannot be computed
            return info
        losses = DetectorLosses(self.model)
        return replace(
            info,
            dense=dense_layout(generator, generator.in_features, info.features, objectness=True),
            detector_levels=losses.levels,
            detector_losses=losses,
        )

    def recorded_modules(self, needs: Collection[str]) -> list[str]:
        names = super().recorded_modules(needs)
        if "dense" in needs:
            names.append(RPN_HEAD)
        if "rois" in needs:
            names += [BOX_POOLER, *self.predictor_names, "roi_heads"]
        if "masks" in needs:
            names += [MASK_HEAD, MASK_PREDICTOR]
        return list(dict.fromkeys(names + sem_seg_modules(needs)))

    def read(self, recorder: Recorder, batch: Batch, needs: Collection[str]) -> NetworkOutputs:
        outputs = super().read(recorder, batch, needs)
        if "dense" in needs:
            outputs.dense = dense_outputs(recorder[RPN_HEAD].output, 1)
        decode_dense(self.model.proposal_generator, outputs, needs)
        if "rois" in needs:
            outputs.rois = self._read_rois(recorder, batch)
        if "masks" in needs:
            outputs.masks = self._read_masks(recorder)
        read_sem_seg(outputs, recorder, needs)
        return outputs

    def _read_rois(self, recorder: Recorder, batch: Batch) -> list[ROIs]:
        proposals: list[Instances] = recorder["roi_heads"].output[0]
        stages = []
        for k, pooled in enumerate(recorder.all(BOX_POOLER)):
            boxes = [b.tensor for b in pooled.args[1]]
            labels = (
                cat([p.gt_classes for p in proposals])
                if k == 0
                else self._relabel(boxes, batch.instances, k)
            )
            logits, deltas = recorder[self.predictor_names[k]].output
            stages.append(ROIs(boxes, logits, self._unweighted(deltas, k), labels))
        return stages

    def _relabel(self, boxes: list[Tensor], targets: list[Instances], stage: int) -> Tensor:
        """Return the labels of a later Cascade stage, which matches its boxes at its own IoU."""
        heads = self.model.roi_heads
        labels = []
        for boxes_per_image, target in zip(boxes, targets):
            iou = pairwise_iou(target.gt_boxes, Boxes(boxes_per_image))
            matched, foreground = heads.proposal_matchers[stage](iou)
            background = torch.full_like(matched, heads.num_classes)
            if len(target):
                labels.append(torch.where(foreground == 1, target.gt_classes[matched], background))
            else:
                labels.append(background)
        return cat(labels)

    def _unweighted(self, deltas: Tensor, stage: int) -> Tensor:
        weights = self.predictors[stage].box2box_transform.weights
        parts = deltas.view(len(deltas), deltas.shape[1] // 4, 4).unbind(-1)
        return torch.stack([x / w for x, w in zip(parts, weights)], -1)  # no copy to the device

    def _read_masks(self, recorder: Recorder) -> Masks:
        foreground: list[Instances] = recorder[MASK_HEAD].args[1]
        return Masks(
            [x.proposal_boxes.tensor for x in foreground],
            recorder[MASK_PREDICTOR].output,
            cat([x.gt_classes for x in foreground]),
        )

    def answer(
        self,
        images: Tensor,
        student: NetworkOutputs,
        outputs: NetworkOutputs,
        needs: Collection[str],
    ) -> None:
        features = outputs.features
        generator = self.model.proposal_generator
        if "dense" in needs:
            output = generator.rpn_head([features[f] for f in generator.in_features])
            outputs.dense = dense_outputs(output, 1, student.dense)
        decode_dense(generator, outputs, needs)
        if "rois" in needs:
            stage_by_stage = len(student.rois) == len(self.predictors)
            outputs.rois = [
                self._ask_rois(features, rois, k if stage_by_stage else None)
                for k, rois in enumerate(student.rois)
            ]
        if "masks" in needs:
            outputs.masks = self._ask_masks(features, student.masks)
        if "detections" in needs:
            outputs.detections = self._detect(whole_images(images), features)
        ask_sem_seg(self.model, outputs, needs)

    def _detect(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        proposals, _ = self.model.proposal_generator(images, features, None)
        detections: list[Instances] = self.model.roi_heads(images, features, proposals, None)[0]
        return detections

    def _ask_rois(self, features: dict[str, Tensor], rois: ROIs, stage: int | None) -> ROIs:
        """Return this network's predictions for the student's boxes.

        A Cascade answers a Cascade of as many stages stage by stage. For any other student it
        returns the mean of its stages' scores and the first stage's deltas.
        """
        heads = self.model.roi_heads
        pooled = heads.box_pooler(
            [features[f] for f in heads.box_in_features], [Boxes(b) for b in rois.boxes]
        )
        if stage is not None:
            logits, deltas = self.predictors[stage](self.box_heads[stage](pooled))
            return ROIs(rois.boxes, logits, self._unweighted(deltas, stage), rois.labels)
        outputs = [p(h(pooled)) for p, h in zip(self.predictors, self.box_heads)]
        scores = torch.stack([x.float().softmax(1) for x, _ in outputs]).mean(0)
        logits = scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
        deltas = self._unweighted(outputs[0][1], 0)
        return ROIs(rois.boxes, logits, deltas, rois.labels)

    def _ask_masks(self, features: dict[str, Tensor], masks: Masks | None) -> Masks:
        assert masks is not None, "the student's masks have the boxes to ask for"
        heads = self.model.roi_heads
        pooled = heads.mask_pooler(
            [features[f] for f in heads.mask_in_features], [Boxes(b) for b in masks.boxes]
        )
        return Masks(masks.boxes, heads.mask_head.layers(pooled), masks.labels)

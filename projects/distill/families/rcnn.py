"""Faster, Mask, Cascade R-CNN and Panoptic FPN."""

from collections.abc import Collection

import torch
from detectron2.layers import cat
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.roi_heads import BaseMaskRCNNHead, CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from ..errors import ConfigError
from ..structures import Batch, Masks, ROIs, Signals
from .base import Probe
from .dense import decode_dense, dense_signal
from .recorder import Calls
from .semantic import ask_sem_seg, read_sem_seg, sem_seg_taps

RPN_HEAD = "proposal_generator.rpn_head"
BOX_POOLER = "roi_heads.box_pooler"
MASK_HEAD = "roi_heads.mask_head"
MASK_PREDICTOR = "roi_heads.mask_head.predictor"


class RCNNProbe(Probe):
    """Boxes come from the arguments of ``box_pooler`` and ``mask_head``: TRAIN_ON_PRED_BOXES
    rewrites those in the proposals. Labels come from the output of ``roi_heads``."""

    family = GeneralizedRCNN

    def __init__(self, model: nn.Module):
        super().__init__(model)
        heads = self.model.roi_heads
        if not isinstance(heads, StandardROIHeads):
            raise ConfigError(
                f"{type(heads).__name__} shares its box and mask features in one block, which "
                "distillation cannot tap; use an FPN config (ROI_HEADS.NAME StandardROIHeads or "
                "CascadeROIHeads)."
            )
        predictors = heads.box_predictor
        cascade = isinstance(heads, CascadeROIHeads)
        self.predictors = list(predictors) if cascade else [predictors]
        self.box_heads = list(heads.box_head) if cascade else [heads.box_head]
        self.predictor_names = [
            f"roi_heads.box_predictor.{k}" if cascade else "roi_heads.box_predictor"
            for k in range(len(self.predictors))
        ]

    @property
    def signals(self) -> frozenset[str]:
        signals = {*super().signals, "rois"}
        if hasattr(self.model.proposal_generator, "rpn_head"):  # not with precomputed proposals
            signals |= {"dense", "dense_boxes"}
        heads = self.model.roi_heads
        mask_head = getattr(heads, "mask_head", None)
        if isinstance(mask_head, BaseMaskRCNNHead) and hasattr(mask_head, "predictor"):
            signals.add("masks")
        if hasattr(self.model, "sem_seg_head"):
            signals.add("sem_seg")
        return frozenset(signals)

    @property
    def num_classes(self) -> int:
        return self.model.roi_heads.num_classes

    def taps(self, needs: Collection[str]) -> list[str]:
        names = super().taps(needs)
        if "dense" in needs:
            names.append(RPN_HEAD)
        if "rois" in needs:
            names += [BOX_POOLER, *self.predictor_names, "roi_heads"]
        if "masks" in needs:
            names += [MASK_HEAD, MASK_PREDICTOR]
        return list(dict.fromkeys(names + sem_seg_taps(needs)))

    def read(self, calls: Calls, batch: Batch, needs: Collection[str]) -> Signals:
        signals = super().read(calls, batch, needs)
        if "dense" in needs:
            signals.dense = dense_signal(calls[RPN_HEAD].output, 1)
        decode_dense(self.model.proposal_generator, signals, needs)
        if "rois" in needs:
            signals.rois = self._read_rois(calls, batch)
        if "masks" in needs:
            signals.masks = self._read_masks(calls)
        read_sem_seg(signals, calls, needs)
        return signals

    def _read_rois(self, calls: Calls, batch: Batch) -> list[ROIs]:
        proposals: list[Instances] = calls["roi_heads"].output[0]
        stages = []
        for k, pooled in enumerate(calls.all(BOX_POOLER)):
            boxes = [b.tensor for b in pooled.args[1]]
            labels = (
                cat([p.gt_classes for p in proposals])
                if k == 0
                else self._relabel(boxes, batch.instances, k)
            )
            logits, deltas = calls[self.predictor_names[k]].output
            stages.append(ROIs(boxes, logits, self._unweighted(deltas, k), labels))
        return stages

    def _relabel(self, boxes: list[Tensor], targets: list[Instances], stage: int) -> Tensor:
        """Labels of a later Cascade stage: its boxes are matched anew at its own IoU."""
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

    def _read_masks(self, calls: Calls) -> Masks:
        foreground: list[Instances] = calls[MASK_HEAD].args[1]
        return Masks(
            [x.proposal_boxes.tensor for x in foreground],
            calls[MASK_PREDICTOR].output,
            cat([x.gt_classes for x in foreground]),
        )

    def ask(self, images: Tensor, student: Signals, needs: Collection[str]) -> Signals:
        signals = super().ask(images, student, needs)
        features = signals.features
        generator = self.model.proposal_generator
        if "dense" in needs:
            output = generator.rpn_head([features[f] for f in generator.in_features])
            signals.dense = dense_signal(output, 1, student.dense)
        decode_dense(generator, signals, needs)
        if "rois" in needs:
            stage_by_stage = len(student.rois) == len(self.predictors)
            signals.rois = [
                self._ask_rois(features, rois, k if stage_by_stage else None)
                for k, rois in enumerate(student.rois)
            ]
        if "masks" in needs:
            signals.masks = self._ask_masks(features, student.masks)
        ask_sem_seg(self.model, signals, needs)
        return signals

    def _ask_rois(self, features: dict[str, Tensor], rois: ROIs, stage: int | None) -> ROIs:
        """This network's opinion of the student's boxes.

        A Cascade asked by a Cascade of as many stages answers stage by stage; asked by any other
        student, with the mean of its stages' scores and the first stage's deltas.
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
        assert masks is not None, "the student's masks say which boxes to ask about"
        heads = self.model.roi_heads
        pooled = heads.mask_pooler(
            [features[f] for f in heads.mask_in_features], [Boxes(b) for b in masks.boxes]
        )
        return Masks(masks.boxes, heads.mask_head.layers(pooled), masks.labels)

"""Dense detectors: backbone, then one head on every level (RetinaNet, FCOS, GFL, ...)."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from torch import Tensor, nn

from ..losses.boxes import anchor_grid
from ..structures import (
    Batch,
    DenseOutputs,
    DenseTargets,
    HeadFeatures,
    NetworkInfo,
    NetworkOutputs,
    PointMasks,
)
from .base import Family, whole_images
from .detector_losses import DetectorLosses
from .layout import SUBNETS, LastLayers, before_activations, box_dim, dense_layout, subnets
from .recorder import Recorder, record


def dense_outputs(
    output: Sequence[Any], num_classes: int, student: DenseOutputs | None = None, box_dim: int = 4
) -> DenseOutputs:
    """Return the (logits, deltas) of a head, lists of (N, Ai x K, Hi, Wi) maps, as rows.

    Args:
        output: the head's output; entries after the second are left out.
        num_classes: K of the logits.
        student: the student's outputs. Maps are cut to its cells, because a teacher may have
            padded its images further.
        box_dim: numbers that encode a box.
    """
    logits, deltas = output[:2]
    if student is not None:
        logits, deltas = (
            [x[..., :h, :w] for x, (h, w) in zip(maps, student.sizes)] for maps in (logits, deltas)
        )
    return DenseOutputs(
        [permute_to_N_HWA_K(x, num_classes) for x in logits],
        [permute_to_N_HWA_K(x, box_dim) for x in deltas],
        [tuple(x.shape[-2:]) for x in logits],
    )


def decode_dense(detector: Any, outputs: NetworkOutputs, needs: Collection[str]) -> None:
    """Fill ``dense_boxes`` if they are needed.

    Args:
        detector: owner of ``anchor_generator`` and ``box2box_transform``: an RPN or the model.
    """
    if "dense_boxes" not in needs:
        return
    dense = outputs.dense
    assert dense is not None, "the boxes are decoded from the dense outputs"
    generator: DefaultAnchorGenerator = detector.anchor_generator
    cells = zip(generator.cell_anchors, generator.strides, dense.sizes)
    for deltas, (anchors, stride, size) in zip(dense.deltas, cells):
        deltas = deltas.detach().float()  # FCOS would decode in half precision
        grid = anchor_grid(anchors, stride, generator.offset, *size)
        repeated = grid.flatten(0, 2).repeat(len(deltas), 1)
        boxes = detector.box2box_transform.apply_deltas(deltas.flatten(0, 1), repeated)
        outputs.dense_boxes.append(boxes.view(*deltas.shape[:2], 4))


MASK_LOGITS = "mask_logits()"


class DenseFamily(Family):
    """A ``DenseDetector`` whose head returns per-level logits first and box deltas second.

    A detector of masks has a method ``mask_logits`` as :class:`~distill.nets.RTMDetIns`. Its head
    returns kernels and prototypes next.
    """

    architecture = DenseDetector

    def __init__(self, model: nn.Module):
        super().__init__(model)
        # RepPoints assigns twice; the second assignment is that of its classes.
        methods = ("dynamic_targets", "refine_targets", "label_anchors", "targets")
        self.assignment = next((f"{k}()" for k in methods if hasattr(model, k)), None)
        self.subnets = {
            f"head.{name}": before_activations(subnet)
            for name, subnet in subnets(self.model.head).items()
        }

    @property
    def outputs(self) -> frozenset[str]:
        outputs = {*super().outputs, "dense", "dense_boxes", "detections"}
        if self.assignment:
            outputs.add("targets")
        if len(self.subnets) == len(SUBNETS):
            outputs.add("head_features")
        if hasattr(self.model, "mask_logits"):
            outputs.add("point_masks")
        return frozenset(outputs)

    def info(
        self, name: str, classes: tuple[str, ...], sem_seg_classes: tuple[str, ...] = ()
    ) -> NetworkInfo:
        info = super().info(name, classes, sem_seg_classes)
        reusable = "head_features" in info.outputs
        losses = DetectorLosses(self.model)
        return replace(
            info,
            dense=dense_layout(self.model, self.model.head_in_features, info.features),
            last_layers=partial(LastLayers, self.model) if reusable else None,
            detector_levels=losses.levels,
            detector_losses=losses,
        )

    def recorded_modules(self, needs: Collection[str]) -> list[str]:
        names = super().recorded_modules(needs) + (["head"] if "dense" in needs else [])
        if not {"targets", "point_masks"}.isdisjoint(needs) and self.assignment:
            names.append(self.assignment)
        if "point_masks" in needs:
            names.append(MASK_LOGITS)
        return names + (self._subnet_modules() if "head_features" in needs else [])

    def _subnet_modules(self) -> list[str]:
        return [f"{name}.{k}" for name, indices in self.subnets.items() for k in indices]

    def read(self, recorder: Recorder, batch: Batch, needs: Collection[str]) -> NetworkOutputs:
        outputs = super().read(recorder, batch, needs)
        if "dense" in needs:
            outputs.dense = self._dense(recorder["head"].output)
        if "head_features" in needs:
            outputs.head_features = self._head_features(recorder)
        if "targets" in needs and self.assignment:
            assigned = recorder[self.assignment].output  # detectron2's: lists, one entry per image
            labels, boxes = (x if isinstance(x, Tensor) else torch.stack(x) for x in assigned[:2])
            outputs.targets = DenseTargets(labels, boxes)
        if "point_masks" in needs:
            outputs.point_masks = self._read_masks(recorder)
        decode_dense(self.model, outputs, needs)
        return outputs

    def answer(
        self,
        images: Tensor,
        student: NetworkOutputs,
        outputs: NetworkOutputs,
        needs: Collection[str],
    ) -> None:
        if not {"dense", "detections", "point_masks"}.isdisjoint(needs):
            maps = [outputs.features[f] for f in self.model.head_in_features]
            with record(
                self.model, self._subnet_modules() if "head_features" in needs else []
            ) as recorder:
                output = self.model.head(maps)
            if "dense" in needs:
                outputs.dense = self._dense(output, student.dense)
            if "head_features" in needs:
                outputs.head_features = self._head_features(recorder, student.dense)
            if "point_masks" in needs:
                outputs.point_masks = self._ask_masks(output, student.point_masks)
            if "detections" in needs:
                own = [[x.clone() for x in levels] for levels in output]  # it rewrites the logits
                outputs.detections = self.model.forward_inference(whole_images(images), maps, own)
        decode_dense(self.model, outputs, needs)

    def _read_masks(self, recorder: Recorder) -> PointMasks:
        (kernels, _, rows), logits = recorder[MASK_LOGITS]
        assert self.assignment, "a detector of masks assigns points to objects"
        labels = recorder[self.assignment].output[0]
        own = [x[index].where(index >= 0, self.num_classes) for x, index in zip(labels, rows)]
        return PointMasks(rows, logits, torch.cat(own), [tuple(x.shape[-2:]) for x in kernels])

    def _ask_masks(self, output: Sequence[Any], student: PointMasks | None) -> PointMasks:
        """Return this network's masks at the student's points, on the student's cells."""
        assert student is not None, "the student's masks have the points to ask for"
        kernels, prototypes = (
            [x[..., :h, :w] for x, (h, w) in zip(maps, student.sizes)] for maps in output[2:]
        )
        return replace(student, logits=self.model.mask_logits(kernels, prototypes, student.rows))

    def _head_features(
        self, recorder: Recorder, student: DenseOutputs | None = None
    ) -> HeadFeatures:
        """Return the recorded maps, cut to the cells of the student."""
        subnets = []
        for name, indices in self.subnets.items():
            maps = [[call.output for call in recorder.all(f"{name}.{k}")] for k in indices]
            if student is not None:
                maps = [[x[..., :h, :w] for x, (h, w) in zip(row, student.sizes)] for row in maps]
            subnets.append(maps)
        return HeadFeatures(*subnets)

    def _dense(self, output: Sequence[Any], student: DenseOutputs | None = None) -> DenseOutputs:
        """Return the dense outputs; if there is an objectness, its logits are those of scores.

        Background has no class in the training of such a detector, so its class logits alone say
        nothing about it.
        """
        if hasattr(self.model, "score_logits"):
            logits, deltas, objectness = output[:3]
            output = list(map(self.model.score_logits, logits, objectness)), deltas
        return dense_outputs(output, self.model.num_classes, student, box_dim(self.model))

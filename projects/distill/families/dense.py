"""Dense detectors: backbone, then one head on every level (RetinaNet, FCOS, GFL, ...)."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from torch import Tensor, nn

from ..structures import Batch, DenseOutputs, HeadFeatures, NetworkOutputs, Targets
from .base import Family
from .recorder import Recorder, record


def dense_outputs(
    output: Sequence[Any], num_classes: int, student: DenseOutputs | None = None, box_dim: int = 4
) -> DenseOutputs:
    """A head's (logits, deltas) lists of (N, Ai x K, Hi, Wi) maps as a :class:`DenseOutputs`.

    Args:
        output: of the head; further entries are left out.
        num_classes: K of the logits.
        student: cut the maps to the cells that both networks share: a teacher may have padded its
            canvas further.
        box_dim: numbers a box is regressed by.
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
    """Fill ``signals.dense_boxes`` if needed.

    Args:
        detector: what owns ``anchor_generator`` and ``box2box_transform``: an RPN or the model.
    """
    if "dense_boxes" not in needs:
        return
    dense = outputs.dense
    assert dense is not None, "the boxes are decoded from the dense signal"
    for deltas, anchors in zip(dense.deltas, level_anchors(detector.anchor_generator, dense.sizes)):
        deltas = deltas.detach().float()  # FCOS would decode in half precision
        repeated = anchors.repeat(len(deltas), 1)
        boxes = detector.box2box_transform.apply_deltas(deltas.flatten(0, 1), repeated)
        outputs.dense_boxes.append(boxes.view(*deltas.shape[:2], 4))


def level_anchors(generator: DefaultAnchorGenerator, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Each level's (Hi x Wi x Ai, 4) anchors, as ``generator`` has them.

    Its own forward makes the grid on the CPU and waits for the copy to the device.
    """
    anchors = []
    for (height, width), stride, cell in zip(sizes, generator.strides, generator.cell_anchors):
        x, y = (
            (torch.arange(n, device=cell.device) + generator.offset) * stride
            for n in (width, height)
        )
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).repeat(1, 1, 2)
        anchors.append((grid.view(-1, 1, 4) + cell).flatten(0, 1))
    return anchors


SUBNETS = ("cls_subnet", "bbox_subnet")  # of detectron2's RetinaNetHead and those made of it


def before_activations(subnet: nn.Sequential) -> list[int]:
    """Indices of the modules that an activation follows: convolutions, or their norms."""
    return [k - 1 for k, module in enumerate(subnet) if isinstance(module, nn.ReLU)]


class DenseFamily(Family):
    """A ``DenseDetector`` whose head returns per-level logits first and box deltas second."""

    architecture = DenseDetector

    def __init__(self, model: nn.Module):
        super().__init__(model)
        # RepPoints assigns twice: its classes by the second.
        methods = ("refine_targets", "label_anchors", "targets")
        self.assignment = next((f"{k}()" for k in methods if hasattr(model, k)), None)
        subnets = (getattr(self.model.head, name, None) for name in SUBNETS)
        self.subnets = {
            f"head.{name}": before_activations(subnet)
            for name, subnet in zip(SUBNETS, subnets)
            if isinstance(subnet, nn.Sequential)
        }

    @property
    def outputs(self) -> frozenset[str]:
        outputs = {*super().outputs, "dense", "dense_boxes"}
        if self.assignment:
            outputs.add("targets")
        if len(self.subnets) == len(SUBNETS):
            outputs.add("head_features")
        return frozenset(outputs)

    def recorded_modules(self, needs: Collection[str]) -> list[str]:
        names = super().recorded_modules(needs) + (["head"] if "dense" in needs else [])
        if "targets" in needs and self.assignment:
            names.append(self.assignment)
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
            assigned = recorder[
                self.assignment
            ].output  # detectron2's are lists, one entry a picture
            labels, boxes = (x if isinstance(x, Tensor) else torch.stack(x) for x in assigned)
            outputs.targets = Targets(labels, boxes)
        decode_dense(self.model, outputs, needs)
        return outputs

    def ask(
        self, images: Tensor, student: NetworkOutputs, needs: Collection[str]
    ) -> NetworkOutputs:
        outputs = super().ask(images, student, needs)
        if "dense" in needs:
            maps = [outputs.features[f] for f in self.model.head_in_features]
            with record(
                self.model, self._subnet_modules() if "head_features" in needs else []
            ) as recorder:
                outputs.dense = self._dense(self.model.head(maps), student.dense)
            if "head_features" in needs:
                outputs.head_features = self._head_features(recorder, student.dense)
        decode_dense(self.model, outputs, needs)
        return outputs

    def _head_features(
        self, recorder: Recorder, student: DenseOutputs | None = None
    ) -> HeadFeatures:
        """Of the recorded calls, cut to the cells of the student."""
        subnets = []
        for name, indices in self.subnets.items():
            maps = [[call.output for call in recorder.all(f"{name}.{k}")] for k in indices]
            if student is not None:
                maps = [[x[..., :h, :w] for x, (h, w) in zip(row, student.sizes)] for row in maps]
            subnets.append(maps)
        return HeadFeatures(*subnets)

    def _dense(self, output: Sequence[Any], student: DenseOutputs | None = None) -> DenseOutputs:
        box_dim = getattr(self.model, "box_dim", 4)  # detectron2's have 4
        return dense_outputs(output, self.model.num_classes, student, box_dim)

"""Dense detectors: backbone, then one head on every level (RetinaNet, FCOS, GFL, ...)."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from torch import Tensor

from ..structures import Batch, Dense, Signals
from ..taps import Calls
from .base import Probe


def dense_signal(
    output: Sequence[Any], num_classes: int, student: Dense | None = None, box_dim: int = 4
) -> Dense:
    """A head's (logits, deltas) lists of (N, Ai x K, Hi, Wi) maps as a :class:`Dense`.

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
    return Dense(
        [permute_to_N_HWA_K(x, num_classes) for x in logits],
        [permute_to_N_HWA_K(x, box_dim) for x in deltas],
        [tuple(x.shape[-2:]) for x in logits],
    )


def decode_dense(detector: Any, signals: Signals, needs: Collection[str]) -> None:
    """Fill ``signals.dense_boxes`` if needed.

    Args:
        detector: what owns ``anchor_generator`` and ``box2box_transform``: an RPN or the model.
    """
    if "dense_boxes" not in needs:
        return
    dense = signals.dense
    assert dense is not None, "the boxes are decoded from the dense signal"
    for deltas, anchors in zip(dense.deltas, level_anchors(detector.anchor_generator, dense.sizes)):
        deltas = deltas.detach().float()  # FCOS would decode in half precision
        repeated = anchors.repeat(len(deltas), 1)
        boxes = detector.box2box_transform.apply_deltas(deltas.flatten(0, 1), repeated)
        signals.dense_boxes.append(boxes.view(*deltas.shape[:2], 4))


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


class DenseProbe(Probe):
    """A ``DenseDetector`` whose head returns per-level logits first and box deltas second."""

    family = DenseDetector

    @property
    def signals(self) -> frozenset[str]:
        return super().signals | {"dense", "dense_boxes"}

    def taps(self, needs: Collection[str]) -> list[str]:
        return super().taps(needs) + (["head"] if "dense" in needs else [])

    def read(self, calls: Calls, batch: Batch, needs: Collection[str]) -> Signals:
        signals = super().read(calls, batch, needs)
        if "dense" in needs:
            signals.dense = self._dense(calls["head"].output)
        decode_dense(self.model, signals, needs)
        return signals

    def ask(self, images: Tensor, student: Signals, needs: Collection[str]) -> Signals:
        signals = super().ask(images, student, needs)
        if "dense" in needs:
            maps = [signals.features[f] for f in self.model.head_in_features]
            signals.dense = self._dense(self.model.head(maps), student.dense)
        decode_dense(self.model, signals, needs)
        return signals

    def _dense(self, output: Sequence[Any], student: Dense | None = None) -> Dense:
        box_dim = getattr(self.model, "box_dim", 4)  # detectron2's have 4
        return dense_signal(output, self.model.num_classes, student, box_dim)

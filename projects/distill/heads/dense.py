"""Base of heads that compare dense predictions anchor by anchor."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..losses.boxes import anchor_grid
from ..structures import DenseLayout, NetworkInfo, NetworkOutputs
from .classes import PredictionDistillHead


def layout_of(net: NetworkInfo) -> DenseLayout:
    """Return the layout of the dense head of a network that has one."""
    assert net.dense is not None, f"the {net.name} has no dense head"
    return net.dense


def dense_classes(net: NetworkInfo) -> tuple[str, ...]:
    """Return the classes of a dense head's logits."""
    return ("object",) if layout_of(net).objectness else net.classes


def grid_problem(student: NetworkInfo, teacher: NetworkInfo) -> str | None:
    """Return why dense outputs are of different points or kinds of classes, or None."""
    s, t = layout_of(student), layout_of(teacher)
    if s.objectness != t.objectness:
        return "one network's dense head is an RPN (objectness), the other's predicts classes"
    if s.strides != t.strides:
        scaled = "" if teacher.scale == 1 else f" at MODEL.DISTILL.TEACHER.SCALE {teacher.scale:g}"
        ours, theirs = (f"[{', '.join(f'{x:g}' for x in y.strides)}]" for y in (s, t))
        return f"the dense heads' strides differ (student {ours}, teacher {theirs}{scaled})"
    return None


def anchor_problem(student: NetworkInfo, teacher: NetworkInfo) -> str | None:
    """Return why dense outputs at the same index are of different anchors, or None."""
    s, t = layout_of(student), layout_of(teacher)
    for level, (a, b) in enumerate(zip(s.anchors, t.anchors)):
        if len(a) != len(b):
            student_has = f"{len(a)} anchors per cell in the student"
            return f"level {level} has {student_has}, {len(b)} in the teacher"
        if not torch.allclose(a, b, atol=1e-3):
            return f"the anchors of level {level} differ (student {_sizes(a)}, teacher {_sizes(b)})"
    return None


def _sizes(anchors: Tensor) -> str:
    sides = anchors[:, 2:] - anchors[:, :2]
    return ", ".join(f"{w:.3g} x {h:.3g}" for w, h in sides.tolist()) + " pixels"


class AnchorGrids(nn.Module):
    """The anchors of a dense head on maps of any size.

    They are made of buffers, so that no step copies them to the device.

    Args:
        layout: layout of the head.
    """

    def __init__(self, layout: DenseLayout):
        super().__init__()
        self.strides = layout.strides
        self.offset = layout.offset
        for k, anchors in enumerate(layout.anchors):
            self.register_buffer(f"level{k}", anchors, persistent=False)

    def forward(self, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return one (H, W, A, 4) XYXY tensor per level of (H, W) cells."""
        return [
            anchor_grid(self.get_buffer(f"level{k}"), stride, self.offset, *size)
            for k, (size, stride) in enumerate(zip(sizes, self.strides))
        ]


class DenseDistillHead(PredictionDistillHead):
    """Base of heads that compare dense outputs in detectron2's (N, R, K) layout.

    For an R-CNN the RPN is the dense head, with objectness as its only class. Both networks must
    have the same strides and anchors. A subclass writes :meth:`losses`, one part per level.

    Args:
        num_levels: number of levels of both dense heads.
    """

    needs = frozenset({"dense"})

    @configurable
    def __init__(self, *, num_levels: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.parts = tuple(f"level{k}" for k in range(num_levels))

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        ret["num_levels"] = len(layout_of(student).strides)
        return ret

    @classmethod
    def class_names(cls, net: NetworkInfo) -> tuple[str, ...]:
        return dense_classes(net)

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        return (
            cls.missing_outputs(student, teacher)
            or grid_problem(student, teacher)
            or anchor_problem(student, teacher)
            or super().problem(student, teacher)
        )

    def logits(
        self, student: NetworkOutputs, teacher: NetworkOutputs
    ) -> list[tuple[Tensor, Tensor]]:
        """Return (N, R, K') logits of the shared classes, one (student, teacher) pair per level."""
        assert student.dense is not None and teacher.dense is not None
        return [
            self.classes.select(s, t) for s, t in zip(student.dense.logits, teacher.dense.logits)
        ]

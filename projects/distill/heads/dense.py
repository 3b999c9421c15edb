"""Heads that compare dense predictions anchor by anchor."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..structures import NetworkInfo, NetworkOutputs
from .classes import PredictionDistillHead


class DenseLayout(NamedTuple):
    """Where the rows of a dense head's (N, R, K) outputs lie in the picture."""

    objectness: bool  # an RPN's, which knows no classes
    levels: list[str]  # the features it reads, finest first
    strides: list[int]
    anchors: list[Tensor]  # (A, 4) a level, relative to the cell's origin
    offset: float  # of the cells' origins from the picture's, in strides
    thresholds: tuple[float, float]  # IoU below which an anchor is negative, from which positive

    @classmethod
    def of(cls, net: NetworkInfo) -> "DenseLayout":
        model: Any = net.model
        rpn = getattr(model, "proposal_generator", None)
        names = list(rpn.in_features if rpn else model.head_in_features)
        detector = rpn or model
        return cls(
            rpn is not None,
            names,
            [net.features[name].stride for name in names],
            [x.detach().cpu() for x in detector.anchor_generator.cell_anchors],
            detector.anchor_generator.offset,
            _thresholds(detector),
        )


def _thresholds(detector: Any) -> tuple[float, float]:
    """Of its matcher; 0.4 and 0.5, RetinaNet's, where the assignment is adaptive."""
    matcher = getattr(detector, "anchor_matcher", None)
    bounds = getattr(matcher, "thresholds", None)  # the matcher adds both infinities
    return (bounds[1], bounds[-2]) if bounds else (0.4, 0.5)


def dense_classes(net: NetworkInfo) -> tuple[str, ...]:
    """The classes of a dense head's logits."""
    return ("object",) if DenseLayout.of(net).objectness else net.classes


def grid_problem(student: NetworkInfo, teacher: NetworkInfo) -> str | None:
    """Why dense outputs do not speak of the same points and classes, or None."""
    s, t = DenseLayout.of(student), DenseLayout.of(teacher)
    if s.objectness != t.objectness:
        return "one network's dense head is an RPN (objectness), the other's predicts classes"
    if s.strides != t.strides:
        return f"the dense heads' strides differ (student {s.strides}, teacher {t.strides})"
    return None


def anchor_problem(student: NetworkInfo, teacher: NetworkInfo) -> str | None:
    """Why dense outputs at the same index speak of different boxes, or None."""
    s, t = DenseLayout.of(student), DenseLayout.of(teacher)
    for level, (a, b) in enumerate(zip(s.anchors, t.anchors)):
        if len(a) != len(b):
            return (
                f"level {level} has {len(a)} anchors a cell in the student, {len(b)} in the teacher"
            )
        if not torch.allclose(a, b, atol=1e-3):
            return f"the anchors of level {level} differ (student {_sizes(a)}, teacher {_sizes(b)})"
    return None


def _sizes(anchors: Tensor) -> str:
    sides = anchors[:, 2:] - anchors[:, :2]
    return ", ".join(f"{w:.3g} x {h:.3g}" for w, h in sides.tolist()) + " pixels"


class AnchorGrids(nn.Module):
    """The anchors of a dense head on maps of any size.

    Args:
        layout: of the head.
    """

    def __init__(self, layout: DenseLayout):
        super().__init__()
        self.strides = layout.strides
        for k, (anchors, stride) in enumerate(zip(layout.anchors, layout.strides)):
            self.register_buffer(f"level{k}", anchors + layout.offset * stride, persistent=False)

    def forward(self, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """(H, W, A, 4) XYXY a level of (H, W) cells."""
        grids = []
        for k, ((height, width), stride) in enumerate(zip(sizes, self.strides)):
            anchors: Tensor = self.get_buffer(f"level{k}")
            y, x = (torch.arange(n, device=anchors.device) * stride for n in (height, width))
            corner = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
            grids.append(anchors + corner.repeat(1, 1, 2)[:, :, None])
        return grids


class DenseDistillHead(PredictionDistillHead):
    """Dense outputs of both networks in detectron2's (N, R, K) layout.

    For an R-CNN the RPN is the dense head, with objectness as its only class. Both networks must
    have the same strides and anchors. A subclass writes :meth:`losses`, one part a level.

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
        ret["num_levels"] = len(DenseLayout.of(student).strides)
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
        """(N, R, K') logits of the shared classes of every level."""
        assert student.dense is not None and teacher.dense is not None
        return [
            self.classes.select(s, t) for s, t in zip(student.dense.logits, teacher.dense.logits)
        ]

"""Heads that compare dense predictions anchor by anchor."""

from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..losses import dense_kd
from ..structures import NetSpec, Signals
from .base import DISTILL_HEAD_REGISTRY, reduce_mean
from .classes import PredictionDistillHead


class DenseLayout(NamedTuple):
    """Where the rows of a dense head's (N, R, K) outputs lie in the picture."""

    objectness: bool  # an RPN's, which knows no classes
    strides: list[int]
    anchors: list[Tensor]  # (A, 4) a level, relative to the cell

    @classmethod
    def of(cls, net: NetSpec) -> "DenseLayout":
        model: Any = net.model
        rpn = getattr(model, "proposal_generator", None)
        names = rpn.in_features if rpn else model.head_in_features
        generator = (rpn or model).anchor_generator
        return cls(
            rpn is not None,
            [net.features[name].stride for name in names],
            [x.detach().cpu() for x in generator.cell_anchors],
        )


def layout_problem(student: NetSpec, teacher: NetSpec) -> str | None:
    """Why dense outputs at the same index speak of different boxes, or None."""
    s, t = DenseLayout.of(student), DenseLayout.of(teacher)
    if s.objectness != t.objectness:
        return "one network's dense head is an RPN (objectness), the other's predicts classes"
    if s.strides != t.strides:
        return f"the dense heads' strides differ (student {s.strides}, teacher {t.strides})"
    for level, (a, b) in enumerate(zip(s.anchors, t.anchors)):
        if a.shape != b.shape or not torch.allclose(a, b, atol=1e-3):
            return (
                f"the anchors of level {level} differ (student {len(a)}, teacher {len(b)} a cell)"
            )
    return None


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
    def from_config(cls, cfg: CfgNode, student: NetSpec, teacher: NetSpec) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        ret["num_levels"] = len(DenseLayout.of(student).strides)
        return ret

    @classmethod
    def class_names(cls, net: NetSpec) -> tuple[str, ...]:
        return ("object",) if DenseLayout.of(net).objectness else net.classes

    @classmethod
    def problem(cls, student: NetSpec, teacher: NetSpec) -> str | None:
        missing = cls.missing_signals(student, teacher)
        return missing or layout_problem(student, teacher) or super().problem(student, teacher)

    def logits(self, student: Signals, teacher: Signals) -> list[tuple[Tensor, Tensor]]:
        """(N, R, K') logits of the shared classes of every level."""
        assert student.dense is not None and teacher.dense is not None
        return [
            self.classes.select(s, t) for s, t in zip(student.dense.logits, teacher.dense.logits)
        ]


@DISTILL_HEAD_REGISTRY.register()
class DenseKD(DenseDistillHead):
    """Class logits weighted by the teacher's confidence; see :func:`distill.losses.dense_kd`.

    All levels share one normaliser, so that a level counts as much as the teacher finds in it.
    """

    def losses(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        levels = [dense_kd(s, t, self.temperature) for s, t in self.logits(student, teacher)]
        mass = reduce_mean(torch.stack([m for _, m in levels]).sum(), minimum=1e-6)
        return {part: numerator / mass for part, (numerator, _) in zip(self.parts, levels)}

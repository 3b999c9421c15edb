"""Bases of heads of semantic segmentation, where every pixel has a class."""

from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..section import TEXTS, Key, Section
from ..structures import SEM_SEG_HEAD, NetworkInfo, NetworkOutputs
from .classes import PredictionDistillHead
from .fpn import FPNDistillHead, on_grid


class SemSegDistillHead(PredictionDistillHead):
    """Base of heads that compare semantic logits of the shared classes, before upsampling.

    They are compared on the student's cells. A subclass writes :meth:`loss`, or :meth:`losses` for
    several parts.

    Args:
        stride, teacher_stride: strides of the student's and the teacher's logits in pixels.
    """

    needs = frozenset({"sem_seg"})

    @configurable
    def __init__(self, *, stride: float, teacher_stride: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.stride = stride
        self.teacher_stride = teacher_stride

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        stride, theirs = (net.maps[SEM_SEG_HEAD].stride for net in (student, teacher))
        return {**ret, "stride": stride, "teacher_stride": theirs}

    @classmethod
    def class_names(cls, net: NetworkInfo) -> tuple[str, ...]:
        return net.sem_seg_classes

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        return cls.missing_outputs(student, teacher) or super().problem(student, teacher)

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        return {"": self.loss(*self.logits(student, teacher))}

    def logits(self, student: NetworkOutputs, teacher: NetworkOutputs) -> tuple[Tensor, Tensor]:
        """Return the (N, K', H, W) logits of student and teacher."""
        assert student.sem_seg is not None and teacher.sem_seg is not None
        s = student.sem_seg.logits
        strides = self.stride, self.teacher_stride
        t = on_grid(teacher.sem_seg.logits, s, *strides, student.batch)
        s, t = self.classes.select(s.movedim(1, -1), t.movedim(1, -1))
        return s.movedim(-1, 1), t.movedim(-1, 1)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the scalar loss of (N, K', H, W) logits."""
        raise NotImplementedError


class RelationDistillHead(FPNDistillHead):
    """Base of heads that compare relations within each network's maps.

    Channels may differ: there are no adapters. By default the maps are the features of the semantic
    head, if the student has one.
    """

    section = Section(
        IN_FEATURES=Key(
            (),
            "maps of the student to compare; empty: the semantic head's (sem_seg_head) if it has "
            "such a head, else all levels whose stride the teacher has",
            TEXTS,
        )
    )
    adapts = False
    balance_share = 0.1

    @classmethod
    def level_names(cls, cfg: CfgNode, student: NetworkInfo) -> tuple[str, ...]:
        default = (SEM_SEG_HEAD,) if student.sem_seg else ()
        return super().level_names(cfg, student) or default

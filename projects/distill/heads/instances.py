"""Objects that a head compares: the annotated ones, or those that the teacher detects."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor, nn

from ..errors import ConfigError
from ..section import FRACTION, Key, Section, one_of
from ..structures import NetworkInfo, NetworkOutputs
from .base import Losses
from .classes import ClassMap, no_shared_class
from .fpn import FPNDistillHead

INSTANCES = ("ground_truth", "teacher")


class TeacherInstances(nn.Module):
    """Selection of a teacher's detections.

    If the teacher's class names are known, detections of classes that the student lacks are left
    out.

    Args:
        score: least score.
        student, teacher: class names of the student and of the detections.
    """

    own_class: Tensor

    def __init__(self, score: float, student: tuple[str, ...], teacher: tuple[str, ...]):
        super().__init__()
        self.score = score
        self.known = no_shared_class(student, teacher) is None
        classes = ClassMap(student, teacher)
        own = torch.full((len(teacher) + 1,), -1)  # the last entry is for labels without a name
        own[classes.in_teacher] = classes.in_student
        self.register_buffer("own_class", own, persistent=False)

    def forward(self, detections: list[Instances], size: tuple[int, int]) -> list[Instances]:
        """Return the selected detections, cut to images of (height, width) ``size``.

        Their ``pred_classes`` are the student's.
        """
        return [self._selected(x, size) for x in detections]

    def _selected(self, found: Instances, size: tuple[int, int]) -> Instances:
        found = found[found.scores >= self.score]
        found.pred_boxes.clip(size)  # the teacher may have padded further
        kept = found.pred_boxes.nonempty()
        if self.known:
            own = self.own_class[found.pred_classes.clamp(max=len(self.own_class) - 1)]
            found.pred_classes = own
            kept = kept & (own >= 0)
        return found[kept]


class InstanceHead(FPNDistillHead):
    """Base of heads of feature maps that read objects: annotated ones, or a teacher's detections.

    Args:
        selection: selects the teacher's detections; None: the objects are the annotated ones.
    """

    section = Section(
        INSTANCES=Key(
            "ground_truth",
            "objects whose regions are compared; teacher: those that the teacher detects",
            one_of(*INSTANCES),
        ),
        INSTANCE_SCORE=Key(0.5, "least score of a teacher's detection", FRACTION),
    )

    @configurable
    def __init__(self, *, selection: TeacherInstances | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.selection = selection
        self.reads_labels = selection is None
        if selection is not None:
            self.needs = self.needs | {"detections"}

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        score, source = ret.pop("instance_score"), ret.pop("instances")
        if source == "teacher":
            check_detections(cls.__name__, student, teacher)
            names = student.classes, teacher.detection_classes
            ret["selection"] = TeacherInstances(score, *names)
        return ret


class RegionHead(InstanceHead):
    """Base of the heads whose losses read the objects from the student's batch."""

    def with_objects(self, student: NetworkOutputs, teacher: NetworkOutputs) -> NetworkOutputs:
        """Return the student's outputs with the objects that the losses read."""
        if self.selection is None:
            return student
        batch = student.batch
        truth = [
            Instances(x.image_size, gt_boxes=x.pred_boxes, gt_classes=x.pred_classes)
            for x in self.selection(teacher.detections, batch.padded_size)
        ]
        return replace(student, batch=replace(batch, instances=truth))

    def forward(
        self,
        student: NetworkOutputs,
        teacher: NetworkOutputs | None,
        weigh: Callable[[Losses], dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        if teacher is not None:
            student = self.with_objects(student, teacher)
        return super().forward(student, teacher, weigh)


def check_detections(head: str, student: NetworkInfo, teacher: NetworkInfo) -> None:
    """Raise ConfigError if a teacher has no detections of the student's classes.

    Args:
        head: name of the head that reads them.
    """
    key = f"MODEL.DISTILL.{head.upper()}.INSTANCES"
    if "detections" not in teacher.outputs:
        raise ConfigError(
            f"{key} is teacher, but the teacher ({teacher.kind}) predicts no detections; set "
            "INSTANCES ground_truth, or MODEL.DISTILL.TEACHER.DETECTIONS to a file of detections."
        )
    problem = no_shared_class(student.classes, teacher.detection_classes)
    if problem and teacher.detection_classes:
        raise ConfigError(f"{key} is teacher, but {problem}.")

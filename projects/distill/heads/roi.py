"""Base of heads that compare box predictions on the student's sampled boxes."""

from typing import NamedTuple

from torch import Tensor

from ..structures import NetworkInfo, NetworkOutputs, ROIs
from .classes import PredictionDistillHead


class ROIPair(NamedTuple):
    """Predictions of both networks on the same boxes, in the classes that both know (K').

    Attributes:
        student_logits, teacher_logits: (ΣRi, K' + 1), background last.
        student_deltas, teacher_deltas: (ΣRi, 4) at the box's class.
        labels: (ΣRi,) in [0, K'], K' is background, -1 is a class that the teacher lacks.
        foreground, background: (ΣRi,) bool; boxes of a class the teacher lacks are neither.
    """

    student_logits: Tensor
    teacher_logits: Tensor
    student_deltas: Tensor
    teacher_deltas: Tensor
    labels: Tensor
    foreground: Tensor
    background: Tensor


class ROIDistillHead(PredictionDistillHead):
    """Base of heads that compare box predictions on the boxes that the student sampled.

    A subclass writes :meth:`loss` for one box stage. Stages of a Cascade are averaged.
    """

    needs = frozenset({"rois"})
    reads_labels = True

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        problem = super().problem(student, teacher)
        if problem:
            return problem
        for net in (student, teacher):
            if net.use_sigmoid_ce:
                return f"the {net.name} scores boxes by sigmoids (ROI_BOX_HEAD.USE_SIGMOID_CE)"
        return None

    def pair(self, student: ROIs, teacher: ROIs) -> ROIPair:
        """Return the predictions of one box stage in the shared classes."""
        labels = student.labels
        shared = self.classes.position[labels]
        background = labels == len(self.classes.position) - 1
        return ROIPair(
            *self.classes.select_with_background(student.logits, teacher.logits),
            *self.classes.at_label(student.deltas, teacher.deltas, labels),
            shared,
            (shared >= 0) & ~background,
            background,
        )

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for s, t in zip(student.rois, teacher.rois):
            for name, value in self.loss(self.pair(s, t)).items():
                total[name] = total.get(name, 0) + value / len(student.rois)
        return total

    def loss(self, rois: ROIPair) -> dict[str, Tensor]:
        """Return the named scalar losses of one box stage."""
        raise NotImplementedError

"""Classes of two networks, matched by name."""

import logging

import torch
from torch import Tensor, nn

from ..structures import NetSpec

logger = logging.getLogger(__name__)


class ClassMap(nn.Module):
    """Columns of the classes that both networks list, by name.

    Its index tensors are buffers, so that no step copies them to the device.

    Args:
        student, teacher: class names of the two networks in the order of their outputs.
    """

    in_student: Tensor
    in_teacher: Tensor
    position: Tensor
    teacher_label: Tensor

    def __init__(self, student: tuple[str, ...], teacher: tuple[str, ...]):
        super().__init__()
        index = {name: i for i, name in enumerate(teacher)}
        shared = [i for i, name in enumerate(student) if name in index]
        self.dropped = [name for name in student if name not in index]
        self.identity = student == teacher
        position = torch.full((len(student) + 1,), -1)
        position[[*shared, len(student)]] = torch.arange(len(shared) + 1)
        teacher_label = torch.zeros(len(student) + 1, dtype=torch.long)
        teacher_label[shared] = torch.tensor([index[student[i]] for i in shared], dtype=torch.long)
        for name, value in (
            ("in_student", torch.tensor(shared, dtype=torch.long)),
            ("in_teacher", teacher_label[shared]),
            ("position", position),
            ("teacher_label", teacher_label),
        ):
            self.register_buffer(name, value, persistent=False)

    @classmethod
    def build(cls, head: str, student: NetSpec, teacher: NetSpec) -> "ClassMap":
        """Logs the student's classes that the teacher lacks."""
        classes = cls(student.classes, teacher.classes)
        if classes.dropped:
            names = ", ".join(classes.dropped)
            logger.warning("%s skips classes that the teacher does not know: %s", head, names)
        return classes

    def select(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Last-dimension columns of the shared classes in both, K -> K'."""
        if self.identity:
            return student, teacher
        return student[..., self.in_student], teacher[..., self.in_teacher]

    def select_with_background(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`select` for (R, K + 1) logits whose last column is background."""
        if self.identity:
            return student, teacher
        s, t = self.select(student[:, :-1], teacher[:, :-1])
        return torch.cat([s, student[:, -1:]], 1), torch.cat([t, teacher[:, -1:]], 1)

    def known(self, labels: Tensor) -> Tensor:
        """Whether the teacher knows each label in [0, K]; background (K) is known."""
        return self.position[labels] >= 0

    def at_label(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Entries of (R, K or 1, ...) class-specific or class-agnostic outputs at each box's label.

        Labels outside the shared classes read an arbitrary entry; mask them with :meth:`known`.
        """
        return _gather(student, labels), _gather(teacher, self.teacher_label[labels])


def _gather(x: Tensor, labels: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x[:, 0]
    rows = torch.arange(len(x), device=x.device)
    return x[rows, labels.clamp(max=x.shape[1] - 1)]


def no_shared_class(student: NetSpec, teacher: NetSpec) -> str | None:
    """The reason against comparing predictions of networks without a common class, or None."""
    if set(student.classes) & set(teacher.classes):
        return None
    return (
        f"student classes ({_some(student.classes)}) and teacher classes "
        f"({_some(teacher.classes)}) have no name in common; set MODEL.DISTILL.TEACHER.CLASSES"
    )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")

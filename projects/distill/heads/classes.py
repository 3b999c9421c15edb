"""Base of heads that compare predictions, whose classes are matched by name."""

import logging
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..section import POSITIVE, Key, Section
from ..structures import NetworkInfo
from .base import DistillHead

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

    def select(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns of the shared classes, K -> K' in the last dimension."""
        if self.identity:
            return student, teacher
        return student[..., self.in_student], teacher[..., self.in_teacher]

    def select_with_background(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same for (R, K + 1) logits, whose last column is background."""
        if self.identity:
            return student, teacher
        s, t = self.select(student[:, :-1], teacher[:, :-1])
        return torch.cat([s, student[:, -1:]], 1), torch.cat([t, teacher[:, -1:]], 1)

    def shared_labels(self, labels: Tensor) -> Tensor:
        """Return positions among the shared classes, -1 for other labels and background."""
        classes = len(self.position) - 1
        inside = (labels >= 0) & (labels < classes)
        return self.position[labels.where(inside, 0)].where(inside, -1)

    def known(self, labels: Tensor) -> Tensor:
        """Return True for labels in [0, K] that the teacher knows, as it does background (K)."""
        return self.position[labels] >= 0

    def at_label(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (R, ...) entries at each box's label of (R, K or 1, ...) outputs.

        Class-agnostic outputs have a 1. For labels outside the shared classes the entry is
        arbitrary; mask it with :meth:`known`.
        """
        return _gather(student, labels), _gather(teacher, self.teacher_label[labels])


def _gather(x: Tensor, labels: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x[:, 0]
    rows = torch.arange(len(x), device=x.device)
    return x[rows, labels.clamp(max=x.shape[1] - 1)]


class PredictionDistillHead(DistillHead):
    """Base of the heads that compare class-wise outputs.

    Args:
        classes: the classes that both networks list.
        temperature: T > 0 of the divergence.
    """

    section = Section(TEMPERATURE=Key(1.0, "temperature T of the logits", POSITIVE))

    @configurable
    def __init__(self, *, classes: ClassMap, temperature: float = 1.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.classes = classes
        self.temperature = temperature

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        names = cls.class_names(student), cls.class_names(teacher)
        ret["classes"] = class_map(cls.__name__, *names)
        return ret

    @classmethod
    def class_names(cls, net: NetworkInfo) -> tuple[str, ...]:
        """Return the classes of the outputs that this head compares."""
        return net.classes

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        problem = super().problem(student, teacher)
        return problem or no_shared_class(cls.class_names(student), cls.class_names(teacher))


def class_map(head: str, student: tuple[str, ...], teacher: tuple[str, ...]) -> ClassMap:
    """Return the classes that both networks list, and log which ones ``head`` leaves out."""
    classes = ClassMap(student, teacher)
    if classes.dropped:
        names = ", ".join(classes.dropped)
        logger.warning("%s skips classes unknown to the teacher: %s", head, names)
    return classes


def no_shared_class(student: tuple[str, ...], teacher: tuple[str, ...]) -> str | None:
    """Return why predictions of networks without a common class cannot be compared, or None."""
    if set(student) & set(teacher):
        return None
    return (
        f"student classes ({_some(student)}) and teacher classes ({_some(teacher)}) have no name "
        "in common; set MODEL.DISTILL.TEACHER.CLASSES"
    )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")

"""Base of heads that compare instance masks."""

import torch.nn.functional as F
from torch import Tensor

from ..structures import NetworkOutputs
from .classes import PredictionDistillHead


class InstanceMaskDistillHead(PredictionDistillHead):
    """Base of heads that compare mask logits of the student's foreground instances, at their class.

    A subclass writes :meth:`loss` for one (ΣRi, M, M) pair.
    """

    needs = frozenset({"masks"})
    reads_labels = True

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        assert student.masks is not None and teacher.masks is not None
        labels = student.masks.labels
        s, t = self.classes.at_label(student.masks.logits, teacher.masks.logits, labels)
        if t.shape[-2:] != s.shape[-2:]:
            t = F.interpolate(t[:, None], s.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return {"": self.loss(s, t, self.classes.known(labels))}

    def loss(self, student: Tensor, teacher: Tensor, known: Tensor) -> Tensor:
        """Return the scalar loss of (ΣRi, M, M) logits.

        Args:
            known: (ΣRi,) bool, True if the teacher knows the class.
        """
        raise NotImplementedError

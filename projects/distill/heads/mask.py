"""Heads that compare instance masks."""

from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..losses import binary_kl
from ..structures import NetSpec, Signals
from .base import DISTILL_HEAD_REGISTRY, DistillHead, reduce_mean
from .classes import ClassMap, no_shared_class


class InstanceMaskDistillHead(DistillHead):
    """Mask logits of both networks for the *student's* foreground instances, at their class.

    A subclass writes :meth:`loss` for one (ΣRi, M, M) pair.
    """

    needs = frozenset({"masks"})

    @configurable
    def __init__(self, *, classes: ClassMap, **kwargs: Any):
        super().__init__(**kwargs)
        self.classes = classes

    @classmethod
    def from_config(cls, cfg: CfgNode, student: NetSpec, teacher: NetSpec) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        ret["classes"] = ClassMap.build(cls.__name__, student, teacher)
        return ret

    @classmethod
    def problem(cls, student: NetSpec, teacher: NetSpec) -> str | None:
        return super().problem(student, teacher) or no_shared_class(student, teacher)

    def losses(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        assert student.masks is not None and teacher.masks is not None
        labels = student.masks.labels
        s, t = self.classes.at_label(student.masks.logits, teacher.masks.logits, labels)
        if t.shape[-2:] != s.shape[-2:]:
            t = F.interpolate(t[:, None], s.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return {"": self.loss(s, t, self.classes.known(labels))}

    def loss(self, student: Tensor, teacher: Tensor, known: Tensor) -> Tensor:
        """Scalar loss of (ΣRi, M, M) logits; ``known`` (ΣRi,): the teacher knows the class."""
        raise NotImplementedError


@DISTILL_HEAD_REGISTRY.register()
class MaskKD(InstanceMaskDistillHead):
    """T² KL(σ(t/T) || σ(s/T)) of the mask logits, averaged over cells and instances.

    Args:
        temperature: T > 0.
    """

    @configurable
    def __init__(self, *, temperature: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.temperature = temperature

    @classmethod
    def from_config(cls, cfg: CfgNode, student: NetSpec, teacher: NetSpec) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        ret["temperature"] = cls.section(cfg).TEMPERATURE
        return ret

    def loss(self, student: Tensor, teacher: Tensor, known: Tensor) -> Tensor:
        divergence = binary_kl(student, teacher, self.temperature).mean(dim=(1, 2))
        weight = known.to(divergence.dtype)
        return (weight * divergence).sum() / reduce_mean(weight.sum())

"""Channel-wise distillation (CWD) of feature maps and of semantic logits."""

from typing import Any

from detectron2.config import configurable
from torch import Tensor

from ..losses import NORMALIZE, cwd
from ..section import POSITIVE, Key, Section, one_of
from ..structures import Batch
from .base import DISTILL_HEAD_REGISTRY
from .fpn import FPNDistillHead
from .semantic import SemSegDistillHead


@DISTILL_HEAD_REGISTRY.register()
class CWD(FPNDistillHead):
    """CWD of feature maps: compare where each channel is active; see :func:`distill.losses.cwd`.

    Levels are summed, as in MMRazor's detectors, whose weight is the default. MMYOLO's recipe for
    RTMDet has ``NORMALIZE`` channel, ``WEIGHT`` 1, and ``IN_FEATURES`` conv_p3, conv_p4, conv_p5.
    It ends when the strong augmentation ends (``STOP_ITER``).

    Args:
        temperature: 𝒯 > 0 of the softmax over cells.
        normalize: which maps are compared, see :func:`distill.losses.cwd`.
    """

    section = Section(
        WEIGHT=10.0,
        TEMPERATURE=Key(1.0, "temperature 𝒯 of the softmax over cells", POSITIVE),
        NORMALIZE=Key(
            "none",
            "channel: compare maps whose channels have mean 0 and deviation 1; none: the maps "
            "themselves",
            one_of(*NORMALIZE),
        ),
    )
    summed = True

    @configurable
    def __init__(self, *, temperature: float = 1.0, normalize: str = "none", **kwargs: Any):
        super().__init__(**kwargs)
        self.temperature = temperature
        self.normalize = normalize

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        return cwd(student, teacher, self.temperature, self.normalize)


@DISTILL_HEAD_REGISTRY.register()
class CWDLogits(SemSegDistillHead):
    """CWD of semantic logits: compare where each class is; see :func:`distill.losses.cwd`."""

    section = Section(WEIGHT=3.0, TEMPERATURE=4.0)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cwd(student, teacher, self.temperature)

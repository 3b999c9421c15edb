"""Distillation of decoupled features (DeFeat)."""

from typing import Any

from detectron2.config import configurable

from ..losses import defeat, defeat_masks
from ..section import Key, Section, at_least
from ..structures import NetworkOutputs
from .base import DISTILL_HEAD_REGISTRY, Losses
from .fpn import BoxedFPNHead, small_convolution
from .instances import RegionHead


@DISTILL_HEAD_REGISTRY.register()
class DeFeat(RegionHead, BoxedFPNHead):
    """DeFeat: compare objects and background apart, each object on one level.

    See :func:`distill.losses.defeat`. This is the part on the neck's maps, as in the released
    configuration. Levels are averaged.

    Args:
        foreground_weight, background_weight: factors of both terms.
    """

    section = Section(
        FOREGROUND_WEIGHT=Key(
            3.0, "factor of the cells of objects", at_least(0), term="foreground"
        ),
        BACKGROUND_WEIGHT=Key(
            12.0, "factor of the cells of the background", at_least(0), term="background"
        ),
    )
    summed = False
    adapter = staticmethod(small_convolution)

    @configurable
    def __init__(self, *, foreground_weight: float, background_weight: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.foreground_weight = foreground_weight
        self.background_weight = background_weight

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> Losses:
        maps = self.maps(student, teacher)
        strides = [level.stride for level in self.levels]
        masks = defeat_masks(
            student.batch.boxes, [(s.shape[2], s.shape[3]) for s, _ in maps], strides
        )
        losses = {}
        for part, (s, t), mask in zip(self.parts, maps, masks):
            inside, outside = defeat(s, t, mask)
            losses[part] = {
                "foreground": self.foreground_weight * inside / len(maps),
                "background": self.background_weight * outside / len(maps),
            }
        return losses

"""Heads that compare the backbone's feature maps level by level."""

import logging
from math import ceil
from typing import Any, NamedTuple

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..errors import ConfigError, choices
from ..losses import fitnet, frequency_mask
from ..structures import Batch, NetSpec, Signals
from .base import DISTILL_HEAD_REGISTRY, DistillHead, RandomState

logger = logging.getLogger(__name__)


class Level(NamedTuple):
    """A student level and its partner in the teacher, with their strides in pixels."""

    student: str
    teacher: str
    stride: int
    teacher_stride: int


def match_levels(
    student: dict[str, ShapeSpec],
    teacher: dict[str, ShapeSpec],
    names: tuple[str, ...],
    key: str = "IN_FEATURES",
) -> list[Level]:
    """Pair feature levels by stride.

    Args:
        student, teacher: the backbones' ``output_shape()``.
        names: the student's levels to pair; empty: every level whose stride the teacher has too,
            or, without any, all.
        key: the config key that gave ``names``, for the message.

    Returns:
        Pairs, finest first. Where several levels share a stride (dilated stages), the deepest are
        paired with the deepest. A named level without an equal stride is paired with the nearest.

    Raises:
        ConfigError: a name is not an output of the student's backbone.
    """
    for name in names:
        if name not in student:
            raise ConfigError(
                f"{key}: the student's backbone has no output '{name}'; "
                f"it has: {choices(name, student)}."
            )
    strides = {shape.stride for shape in teacher.values()}
    wanted = names or [n for n, s in student.items() if s.stride in strides] or list(student)
    pairs = []
    for name in wanted:
        stride = student[name].stride
        nearest = min(strides, key=lambda x: (abs(x / stride - 1), x))
        partners = [n for n, s in teacher.items() if s.stride == nearest]
        siblings = [n for n, s in student.items() if s.stride == stride]
        from_deepest = len(siblings) - siblings.index(name)
        partner = partners[-min(from_deepest, len(partners))]
        pairs.append(Level(name, partner, stride, nearest))
    return sorted(pairs, key=lambda level: level.stride)


class FPNDistillHead(DistillHead):
    """Feature distillation: levels matched by stride, channels by 1x1 adapters, sizes by resizing.

    A subclass writes :meth:`loss` for one level. Levels are averaged.

    Args:
        levels: pairs from :func:`match_levels`.
        channels: student and teacher channels of each pair.
    """

    needs = frozenset({"features"})

    @configurable
    def __init__(self, *, levels: list[Level], channels: list[tuple[int, int]], **kwargs: Any):
        super().__init__(**kwargs)
        self.levels = levels
        self.parts = tuple(level.student for level in levels)
        self.adapters = nn.ModuleDict(
            {
                level.student: nn.Identity() if s == t else nn.Conv2d(s, t, kernel_size=1)
                for level, (s, t) in zip(levels, channels)
            }
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, student: NetSpec, teacher: NetSpec) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        names = cls.level_names(cfg, student)
        key = f"MODEL.DISTILL.{cls.__name__.upper()}.IN_FEATURES"
        ret["levels"] = match_levels(student.features, teacher.features, names, key)
        ret["channels"] = [
            (student.features[x.student].channels, teacher.features[x.teacher].channels)
            for x in ret["levels"]
        ]
        pairs = ", ".join(f"{x.student}~{x.teacher}" for x in ret["levels"])
        logger.info("%s compares the levels (student~teacher) %s", cls.__name__, pairs)
        return ret

    @classmethod
    def level_names(cls, cfg: CfgNode, student: NetSpec) -> tuple[str, ...]:
        """The student's levels to compare; empty: see :func:`match_levels`."""
        return tuple(cls.section(cfg).get("IN_FEATURES", ()))

    def maps(self, student: Signals, teacher: Signals) -> list[tuple[Tensor, Tensor]]:
        """Adapted student and sized teacher maps, (N, C, H, W) each, of every level."""
        pairs = []
        for level in self.levels:
            s, t = student.features[level.student], teacher.features[level.teacher]
            # Cells beyond the shared canvas are the teacher's padding: cut, then resize.
            height, width = (ceil(x / level.teacher_stride) for x in student.batch.canvas)
            t = t[..., :height, :width]
            if t.shape[-2:] != s.shape[-2:]:
                t = F.interpolate(t, size=s.shape[-2:], mode="bilinear", align_corners=False)
            pairs.append((self.adapters[level.student](s), t))
        return pairs

    def losses(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        maps = self.maps(student, teacher)
        return {
            level.student: self.loss(s, t, level.stride, student.batch) / len(maps)
            for level, (s, t) in zip(self.levels, maps)
        }

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        """Scalar loss of one level; both maps (N, C, H, W), ``stride`` in pixels a cell."""
        raise NotImplementedError


class FrequencyMasks(RandomState):
    """New random frequency masks at every call, one a batch entry.

    Args:
        mask_ratio: ζ in [0, 1), see :func:`distill.losses.frequency_mask`.
        seed: of the masks.
    """

    def __init__(self, mask_ratio: float, seed: int):
        super().__init__(seed)
        self.mask_ratio = mask_ratio

    def forward(self, maps: Tensor) -> Tensor | None:
        """(N, 1, H, W // 2 + 1) for (N, C, H, W) ``maps``; None if nothing is ever masked."""
        if self.mask_ratio == 0:
            return None
        batch, _, height, width = maps.shape
        return frequency_mask(batch, height, width, self.mask_ratio, self.generator(maps.device))


@DISTILL_HEAD_REGISTRY.register()
class FitNet(FPNDistillHead):
    """Mean squared error of feature maps; see :func:`distill.losses.fitnet`."""

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        return fitnet(student, teacher)

"""Bases of heads that compare the backbone's feature maps level by level."""

import logging
from math import ceil, log2
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..errors import ConfigError
from ..losses import frequency_mask
from ..section import TEXTS, Key, Section
from ..structures import SEM_SEG_HEAD, Batch, NetworkInfo, NetworkOutputs
from ..utils.text import choices
from .base import DistillHead, Losses, StepGenerator, Terms
from .classes import ClassMap, class_map, no_shared_class
from .dense import anchor_problem, dense_classes, grid_problem, layout_of

logger = logging.getLogger(__name__)


class Level(NamedTuple):
    """A student level and its partner in the teacher, with their strides in pixels."""

    student: str
    teacher: str
    stride: int
    teacher_stride: float  # a fraction for some MODEL.DISTILL.TEACHER.SCALE


def match_levels(
    student: dict[str, ShapeSpec],
    teacher: dict[str, ShapeSpec],
    names: tuple[str, ...],
    key: str = "IN_FEATURES",
) -> list[Level]:
    """Pair feature levels by stride.

    Args:
        student, teacher: ``NetworkInfo.maps`` of the networks.
        names: the student's levels to pair. If empty: every level of the backbone whose stride the
            teacher has too. If there is no such level, all levels; only the nearest if all maps of
            the teacher have one stride.
        key: the config key that gave ``names``, for the message.

    Returns:
        Pairs, finest first. If several levels share a stride (dilated stages), the deepest are
        paired with the deepest. A named level without an equal stride is paired with the nearest.
        Features of the semantic heads are paired with each other.

    Raises:
        ConfigError: if the student has no such map, or the teacher no semantic head.
    """
    for name in names:
        if name not in student:
            raise ConfigError(
                f"{key}: the student's backbone has no output '{name}'; "
                f"it has: {choices(name, student)}."
            )
    if SEM_SEG_HEAD in names and SEM_SEG_HEAD not in teacher:
        raise ConfigError(
            f"{key}: the teacher has no semantic head to compare '{SEM_SEG_HEAD}'; name levels of "
            f"the backbone: {', '.join(x for x in student if x != SEM_SEG_HEAD)}."
        )
    ours, theirs = ({k: v for k, v in x.items() if k != SEM_SEG_HEAD} for x in (student, teacher))
    strides = {shape.stride for shape in theirs.values()}
    wanted = names or [n for n, s in ours.items() if s.stride in strides]
    if not wanted and len(strides) == 1:
        (stride,) = strides
        nearest = min((s.stride for s in ours.values()), key=lambda x: abs(log2(x / stride)))
        wanted = [n for n, s in ours.items() if s.stride == nearest]
    pairs = []
    for name in wanted or ours:
        partner = SEM_SEG_HEAD if name == SEM_SEG_HEAD else _partner(name, ours, theirs)
        pairs.append(Level(name, partner, student[name].stride, teacher[partner].stride))
    return sorted(pairs, key=lambda level: level.stride)


def _partner(name: str, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> str:
    """Return the teacher's level of the nearest stride, as deep as ``name`` among several."""
    stride = student[name].stride
    nearest = min(
        (s.stride for s in teacher.values()),
        key=lambda x: (round(abs(x / stride - 1), 6), x),  # the finer of two at one distance
    )
    partners = [n for n, s in teacher.items() if s.stride == nearest]
    siblings = [n for n, s in student.items() if s.stride == stride]
    from_deepest = len(siblings) - siblings.index(name)
    return partners[-min(from_deepest, len(partners))]


class FPNDistillHead(DistillHead):
    """Base of heads that compare feature maps.

    Levels are matched by stride, channels by 1x1 adapters, sizes by resizing. A subclass writes
    :meth:`loss` for one level, or :meth:`level_loss` if a level has modules of its own. Levels are
    averaged, or added up if ``summed``.

    Args:
        levels: pairs from :func:`match_levels`.
        channels: student and teacher channels of each pair.
    """

    section = Section(
        IN_FEATURES=Key(
            (), "levels of the student to compare; empty: all whose stride the teacher has", TEXTS
        )
    )
    needs = frozenset({"features"})
    adapts: ClassVar[bool] = True  # False: the loss takes maps of different channels
    summed: ClassVar[bool] = False  # True if the authors of a method sum the levels

    @configurable
    def __init__(self, *, levels: list[Level], channels: list[tuple[int, int]], **kwargs: Any):
        super().__init__(**kwargs)
        if any(level.student == SEM_SEG_HEAD for level in levels):
            self.needs = self.needs | {"sem_seg"}
        self.levels = levels
        self.channels = channels
        self.parts = tuple(level.student for level in levels)
        self.adapters = nn.ModuleDict(
            {
                level.student: self.adapter(s, t) if self.adapts else nn.Identity()
                for level, (s, t) in zip(levels, channels)
            }
        )

    @staticmethod
    def adapter(student: int, teacher: int) -> nn.Module:
        """Build the layer that maps student channels to teacher channels."""
        return nn.Identity() if student == teacher else nn.Conv2d(student, teacher, kernel_size=1)

    def teacher_maps(self) -> frozenset[str] | None:
        reads_more = self.needs - {"features"}
        return None if reads_more else frozenset(level.teacher for level in self.levels)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        ret.pop("in_features", None)
        names = cls.level_names(cfg, student)
        key = f"MODEL.DISTILL.{cls.__name__.upper()}.IN_FEATURES"
        maps = student.maps if names else student.outer_maps
        ret["levels"] = match_levels(maps, teacher.maps, names, key)
        ret["channels"] = [
            (student.maps[x.student].channels, teacher.maps[x.teacher].channels)
            for x in ret["levels"]
        ]
        pairs = ", ".join(f"{x.student}~{x.teacher}" for x in ret["levels"])
        logger.info("%s compares the levels (student~teacher) %s", cls.__name__, pairs)
        return ret

    @classmethod
    def level_names(cls, cfg: CfgNode, student: NetworkInfo) -> tuple[str, ...]:
        """Return the student's levels to compare; if empty, see :func:`match_levels`."""
        return tuple(cls.config_node(cfg).get("IN_FEATURES", ()))

    def maps(self, student: NetworkOutputs, teacher: NetworkOutputs) -> list[tuple[Tensor, Tensor]]:
        """Return one pair of (N, C, H, W) maps per level: student adapted, teacher resized."""
        pairs = []
        for level in self.levels:
            s, t = student.maps[level.student], teacher.maps[level.teacher]
            t = on_grid(t, s, level.stride, level.teacher_stride, student.batch)
            pairs.append((self.adapters[level.student](s), t))
        return pairs

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> Losses:
        maps = self.maps(student, teacher)
        share = 1 if self.summed else 1 / len(maps)
        losses: dict[str, Tensor | Terms] = {}
        for level, (s, t) in zip(self.levels, maps):
            loss = self.level_loss(level, s, t, student.batch)
            if isinstance(loss, Tensor):
                losses[level.student] = loss * share
            else:
                losses[level.student] = {term: x * share for term, x in loss.items()}
        return losses

    def level_loss(
        self, level: Level, student: Tensor, teacher: Tensor, batch: Batch
    ) -> Tensor | Terms:
        """Return the scalar loss of one level, or its terms; both maps are (N, C, H, W)."""
        return self.loss(student, teacher, level.stride, batch)

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        """Return the scalar loss of one level; both maps are (N, C, H, W).

        Args:
            stride: size of a cell in pixels.
        """
        raise NotImplementedError


def on_grid(
    teacher: Tensor, student: Tensor, stride: float, teacher_stride: float, batch: Batch
) -> Tensor:
    """Return the teacher's map, resized to the student's cells.

    Args:
        teacher, student: (N, C, H, W), each of any C, H and W.
        stride, teacher_stride: size in pixels of a cell of the student's and the teacher's map.

    Returns:
        (N, C, H, W): C of the teacher, H and W of the student.
    """
    # Cells beyond the student's padded size are the teacher's own padding: cut, then resize.
    height, width = (ceil(round(x / teacher_stride, 6)) for x in batch.padded_size)
    teacher = teacher[..., :height, :width]
    if not log2(stride / teacher_stride).is_integer():
        return _resampled(teacher, teacher_stride / stride, student.shape[-2:])
    if teacher.shape[-2:] == student.shape[-2:]:
        return teacher
    return F.interpolate(teacher, size=student.shape[-2:], mode="bilinear", align_corners=False)


def _resampled(x: Tensor, ratio: float, size: tuple[int, ...]) -> Tensor:
    """Resize (N, C, H, W) maps by exactly ``ratio``, and cut them to ``size``.

    Cells of a fraction of pixels, or of 14 pixels, seldom end with the padded size. So a ratio of
    numbers of cells would shift the far cells.
    """
    height, width = size
    down, right = (max(ceil(n / ratio) + 1 - m, 0) for n, m in zip(size, x.shape[-2:]))
    x = F.pad(x, (0, right, 0, down), mode="replicate")
    x = F.interpolate(x, scale_factor=ratio, mode="bilinear", align_corners=False)
    return x[..., :height, :width]


class BatchNorm(nn.BatchNorm2d):
    """torch's ``BatchNorm2d`` that accepts one image of one cell, which torch's refuses.

    Such a cell has no deviation: it is normalised by the running statistics.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) for (N, C, H, W)."""
        if x.numel() > x.shape[1]:
            return super().forward(x)
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)


def cell_labels(labels: Tensor, height: int, width: int) -> Tensor:
    """Return the (N, height, width) labels of the pixels at the cells' centres."""
    pixels = labels[:, None].float()  # exact up to 2^24 classes
    return F.interpolate(pixels, size=(height, width), mode="nearest-exact")[:, 0].long()


class FrequencyMasks(StepGenerator):
    """New random frequency masks at every call, one per image or crop.

    Args:
        mask_ratio: ζ in [0, 1), see :func:`distill.losses.frequency_mask`.
        seed: seed of the masks.
    """

    def __init__(self, mask_ratio: float, seed: int):
        super().__init__(seed)
        self.mask_ratio = mask_ratio

    def forward(self, maps: Tensor) -> Tensor | None:
        """Return (N, 1, H, W // 2 + 1) for (N, C, H, W) maps, or None if ``mask_ratio`` is 0."""
        if self.mask_ratio == 0:
            return None
        batch, _, height, width = maps.shape
        return frequency_mask(batch, height, width, self.mask_ratio, self.generator(maps.device))


class BoxedFPNHead(FPNDistillHead):
    """Base of the heads that read ground-truth boxes too. Levels are summed."""

    summed = True

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        if not student.has_boxes:
            return f"a {student.kind} has no ground-truth boxes"
        return super().problem(student, teacher)


class DenseFPNHead(FPNDistillHead):
    """Base of the heads that read dense predictions too, on the levels that the dense head reads.

    Levels are summed.

    Args:
        classes: the classes that both dense heads list.
    """

    section = Section(IN_FEATURES=None)
    summed = True
    needs = frozenset({"features", "dense"})

    @configurable
    def __init__(self, *, classes: ClassMap, **kwargs: Any):
        super().__init__(**kwargs)
        self.classes = classes

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        names = dense_classes(student), dense_classes(teacher)
        ret = super().from_config(cfg, student, teacher)
        return {**ret, "classes": class_map(cls.__name__, *names)}

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        return (
            super().problem(student, teacher)
            or grid_problem(student, teacher)
            or anchor_problem(student, teacher)
            or no_shared_class(dense_classes(student), dense_classes(teacher))
        )

    @classmethod
    def level_names(cls, cfg: CfgNode, student: NetworkInfo) -> tuple[str, ...]:
        return tuple(layout_of(student).levels)


def small_convolution(student: int, teacher: int) -> nn.Conv2d:
    """Build the adapter of FGFI and DeFeat: a 3x3 convolution with weights of 1e-4."""
    convolution = nn.Conv2d(student, teacher, kernel_size=3, padding=1)
    nn.init.trunc_normal_(convolution.weight, std=1e-4, a=-2e-4, b=2e-4)
    return convolution

"""Heads that compare the backbone's feature maps level by level."""

import logging
from math import ceil
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..errors import ConfigError, choices
from ..losses import fitnet, frequency_mask, ima
from ..losses.reduce import connected_zero
from ..structures import Batch, NetSpec, Signals
from .base import DISTILL_HEAD_REGISTRY, DistillHead, RandomState, reduce_mean

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


@DISTILL_HEAD_REGISTRY.register()
class FitNet(FPNDistillHead):
    """Mean squared error of feature maps; see :func:`distill.losses.fitnet`."""

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        return fitnet(student, teacher)


IMA_SCOPES = ("auto", "image", "box", "mask")
CROP_SIZE = 14  # cells of a cropped instance, as in the mask head of Mask R-CNN


@DISTILL_HEAD_REGISTRY.register()
class IMA(FPNDistillHead):
    """Instance mask alignment; see :func:`distill.losses.ima`.

    Args:
        scope: what an instance is. "image": every picture of a level. "box": RoIAlign of every
            ground-truth box, on the same boxes and levels in both networks. "mask": as "box",
            the cells weighted by the ground-truth mask.
        mask_ratio: ζ of the frequency mask; 0 switches it off.
        standardize, standardize_teacher, deflate, scale_on, scale_floor: see the loss.
        seed: of the frequency masks.
    """

    @configurable
    def __init__(
        self,
        *,
        scope: str,
        mask_ratio: float,
        standardize: bool,
        standardize_teacher: bool,
        deflate: bool,
        scale_on: str,
        scale_floor: float,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.scope = scope
        self.mask_ratio = mask_ratio
        self.random = RandomState(seed)
        self.options: dict[str, Any] = {
            "standardize": standardize,
            "standardize_teacher": standardize_teacher,
            "deflate": deflate,
            "scale_on": scale_on,
            "scale_floor": scale_floor,
        }
        if scope != "image":
            self.parts = ("",)
            self.pooler = ROIPooler(CROP_SIZE, [1 / x.stride for x in self.levels], 0, "ROIAlignV2")

    @classmethod
    def from_config(cls, cfg: CfgNode, student: NetSpec, teacher: NetSpec) -> dict[str, Any]:
        node = cls.section(cfg)
        scope = cls.resolved_scope(cfg, student)
        if scope != "image" and "dense" not in student.signals:
            raise ConfigError(
                f"MODEL.DISTILL.IMA.SCOPE is {scope}, which needs ground-truth boxes; a "
                f"{type(student.model).__name__} has SCOPE image."
            )
        ret = super().from_config(cfg, student, teacher)
        strides = [x.stride for x in ret["levels"]]
        if scope != "image" and strides != [strides[0] * 2**i for i in range(len(strides))]:
            raise ConfigError(
                f"MODEL.DISTILL.IMA.SCOPE {scope} crops boxes from levels whose strides double, "
                f"but theirs are {strides}; set IN_FEATURES to such levels or SCOPE image."
            )
        return {
            **ret,
            "scope": scope,
            "mask_ratio": node.MASK_RATIO,
            "standardize": node.STANDARDIZE,
            "standardize_teacher": node.STANDARDIZE_TEACHER,
            "deflate": node.DEFLATE,
            "scale_on": node.SCALE_ON,
            "scale_floor": node.SCALE_FLOOR,
            "seed": cfg.SEED,
        }

    @classmethod
    def level_names(cls, cfg: CfgNode, student: NetSpec) -> tuple[str, ...]:
        """Crops come from the levels that the student's own boxes are cropped from."""
        names = super().level_names(cfg, student)
        if names or cls.resolved_scope(cfg, student) == "image" or "rois" not in student.signals:
            return names
        return tuple(student.model.roi_heads.box_in_features)

    @classmethod
    def resolved_scope(cls, cfg: CfgNode, student: NetSpec) -> str:
        scope = cls.section(cfg).SCOPE
        return cls.default_scope(student) if scope == "auto" else scope

    @staticmethod
    def default_scope(student: NetSpec) -> str:
        """The paper is silent (its Fig. 1 shows instance maps): what the family has labels for."""
        if "masks" in student.signals:
            return "mask"
        return "box" if "rois" in student.signals else "image"

    def losses(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        if self.scope == "image":
            return super().losses(student, teacher)
        maps = self.maps(student, teacher)
        boxes = [Boxes(b) for b in student.batch.boxes]
        s = self.pooler([s for s, _ in maps], boxes)
        t = self.pooler([t for _, t in maps], boxes)
        weight = self.instance_masks(student.batch) if self.scope == "mask" else None
        count = s.new_full((), len(s), dtype=torch.float32)
        loss = self.align(s, t, weight) * count / reduce_mean(count)
        return {"": loss + connected_zero(*(s[:1, :1, :1, :1] for s, _ in maps))}

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        return self.align(student, teacher, None)

    def align(self, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
        mask = None
        if self.mask_ratio > 0:
            batch, _, height, width = student.shape
            generator = self.random.generator(student.device)
            mask = frequency_mask(batch, height, width, self.mask_ratio, generator)
        return ima(student, teacher, mask, weight=weight, **self.options)

    @staticmethod
    def instance_masks(batch: Batch) -> Tensor:
        """(ΣRi, 1, CROP_SIZE, CROP_SIZE): ground-truth masks on the crops' grid.

        detectron2 rasterises polygons on the CPU, one by one: the originals are there already.
        """
        originals = [x["instances"] for x in batch.inputs]
        crops = [
            x.gt_masks.crop_and_resize(x.gt_boxes.tensor, CROP_SIZE) for x in originals if len(x)
        ]
        device = batch.instances[0].gt_boxes.device
        if not crops:
            return torch.ones((0, 1, CROP_SIZE, CROP_SIZE), device=device)
        return torch.cat(crops).to(device)[:, None].float()

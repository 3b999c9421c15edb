"""The feature methods that detection papers compare with, on the levels of an FPN."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..losses import (
    defeat,
    defeat_masks,
    feature_richness,
    fgd,
    fgfi,
    fgfi_masks,
    fkd,
    fkd_mask,
    frs,
    frs_classes,
    length_of_gap,
    mgd,
    pkd,
)
from ..structures import Batch, NetworkInfo, NetworkOutputs
from .authors import with_authors_values
from .base import DISTILL_HEAD_REGISTRY, StepGenerator
from .classes import ClassMap, class_map, no_shared_class
from .dense import AnchorGrids, DenseLayout, anchor_problem, dense_classes, grid_problem
from .fpn import BatchNorm, FPNDistillHead, Level


class AuthorsFPNHead(FPNDistillHead):
    """Levels are summed, and values are the authors' where the config does not set them.

    ``VALUES`` in :mod:`distill.heads.authors` has them by the student's detector.
    """

    summed = True

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        values = with_authors_values(cls.__name__, cls.section(cfg), student)
        return {**ret, "weight": values["WEIGHT"], **cls.arguments(values)}

    @classmethod
    def arguments(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Further arguments of the class, from the values of its section."""
        return {}


class BoxedFPNHead(AuthorsFPNHead):
    """What looks at the ground-truth boxes."""

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        if not student.has_boxes:
            return f"a {type(student.model).__name__} has no ground-truth boxes"
        return super().problem(student, teacher)


@DISTILL_HEAD_REGISTRY.register()
class PKD(AuthorsFPNHead):
    """Correlation of channels; see :func:`distill.losses.pkd`.

    The authors compare the four finest levels, of the same channels; others are adapted here.
    """

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        return pkd(student, teacher)


class MGDGenerator(nn.Sequential):
    """Two 3x3 convolutions, with a ReLU between them."""

    def __init__(self, channels: int):
        super().__init__(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )


@DISTILL_HEAD_REGISTRY.register()
class MGD(AuthorsFPNHead):
    """The teacher's map generated from the student's with cells masked out; see
    :func:`distill.losses.mgd`.

    Args:
        mask_ratio: λ, the expected share of the cells that are masked out.
        seed: of the masks.
    """

    @configurable
    def __init__(self, *, mask_ratio: float, seed: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.mask_ratio = mask_ratio
        self.random = StepGenerator(seed)
        self.generators = nn.ModuleDict(
            {level.student: MGDGenerator(t) for level, (_, t) in zip(self.levels, self.channels)}
        )

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        return {**super().from_config(cfg, student, teacher), "seed": cfg.SEED}

    @classmethod
    def arguments(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"mask_ratio": values["MASK_RATIO"]}

    def level_loss(self, level: Level, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        size = (len(student), 1, *student.shape[2:])
        generator = self.random.generator(student.device)
        drawn = torch.rand(size, device=student.device, generator=generator)
        keep = (drawn <= 1 - self.mask_ratio).to(student.dtype)
        return mgd(student, teacher, self.generators[level.student], keep)


class GlobalContext(nn.Module):
    """A map with a vector added to every cell, made of all its cells (Cao et al., "GCNet").

    At the start the vector is 0.

    Args:
        channels: C, at least 2.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.where = nn.Conv2d(channels, 1, kernel_size=1)
        last = nn.Conv2d(channels // 2, channels, kernel_size=1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, channels // 2, kernel_size=1),
            nn.LayerNorm([channels // 2, 1, 1]),
            nn.ReLU(inplace=True),
            last,
        )
        nn.init.kaiming_normal_(self.where.weight)
        for parameter in (self.where.bias, last.weight, last.bias):
            nn.init.zeros_(parameter)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) of the same."""
        share = self.where(x).flatten(1).softmax(1)
        context = torch.einsum("np,ncp->nc", share, x.flatten(2))
        added: Tensor = self.transform(context[..., None, None])
        return x + added


@DISTILL_HEAD_REGISTRY.register()
class FGD(BoxedFPNHead):
    """Objects and background apart, and the relation of all cells; see
    :func:`distill.losses.fgd`.

    α foreground + β background + γ attention + λ relation, the last the squared distance of both
    maps behind a :class:`GlobalContext` each (Eq. 10-12). All are sums over channels and cells.

    Args:
        alpha, beta, gamma, lambda_: factors of the four terms.
        temperature: 𝒯 > 0 of the attention.
    """

    @configurable
    def __init__(
        self,
        *,
        alpha: float,
        beta: float,
        gamma: float,
        lambda_: float,
        temperature: float,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.factors = alpha, beta, gamma
        self.lambda_ = lambda_
        self.temperature = temperature
        names = [level.student for level in self.levels]
        of_teacher = [t for _, t in self.channels]
        self.contexts = nn.ModuleDict(
            {
                name: nn.ModuleList([GlobalContext(c), GlobalContext(c)])
                for name, c in zip(names, of_teacher)
            }
        )

    @classmethod
    def arguments(cls, values: dict[str, Any]) -> dict[str, Any]:
        keys = ("ALPHA", "BETA", "GAMMA", "TEMPERATURE")
        return {**{key.lower(): values[key] for key in keys}, "lambda_": values["LAMBDA"]}

    def level_loss(self, level: Level, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        terms = fgd(student, teacher, batch.boxes, batch.padded_size, self.temperature)
        focal: Tensor = sum(f * x for f, x in zip(self.factors, terms))  # type: ignore[assignment]
        contexts: Any = self.contexts[level.student]
        gap = contexts[0](student).float() - contexts[1](teacher).float()
        return focal + self.lambda_ * gap.square().sum() / max(len(student), 1)


def small_convolution(student: int, teacher: int) -> nn.Conv2d:
    """3x3 with weights of 1e-4: what FGFI and DeFeat adapt the student with."""
    convolution = nn.Conv2d(student, teacher, kernel_size=3, padding=1)
    nn.init.trunc_normal_(convolution.weight, std=1e-4, a=-2e-4, b=2e-4)
    return convolution


@DISTILL_HEAD_REGISTRY.register()
class FGFI(BoxedFPNHead):
    """Cells whose anchors are near an object, see :func:`distill.losses.fgfi`.

    The authors imitate the one map of a VGG; on an FPN these are the maps that the dense head (an
    R-CNN's RPN) reads, and an object is compared with the anchors of all of them. The authors'
    adapter ends with the ReLU of their map; those of an FPN have values below 0.

    Args:
        grids: the student's anchors.
        threshold: ψ in [0, 1].
    """

    adapter = staticmethod(small_convolution)

    @configurable
    def __init__(self, *, grids: AnchorGrids, threshold: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.grids = grids
        self.threshold = threshold

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        grids = AnchorGrids(DenseLayout.of(student))
        return {**super().from_config(cfg, student, teacher), "grids": grids}

    @classmethod
    def arguments(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"threshold": values["THRESHOLD"]}

    @classmethod
    def level_names(cls, cfg: CfgNode, student: NetworkInfo) -> tuple[str, ...]:
        return tuple(DenseLayout.of(student).levels)

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        maps = self.maps(student, teacher)
        grids = self.grids([tuple(s.shape[2:]) for s, _ in maps])
        masks = fgfi_masks(grids, student.batch.boxes, self.threshold)
        return {part: fgfi(s, t, mask) for part, (s, t), mask in zip(self.parts, maps, masks)}


@DISTILL_HEAD_REGISTRY.register()
class DeFeat(BoxedFPNHead):
    """Objects and background apart, each object on one level, see :func:`distill.losses.defeat`.

    The neck's part, which is what the released configuration distils; the levels are averaged.

    Args:
        foreground_weight, background_weight: factors of both terms.
    """

    summed = False
    adapter = staticmethod(small_convolution)

    @configurable
    def __init__(self, *, foreground_weight: float, background_weight: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.foreground_weight = foreground_weight
        self.background_weight = background_weight

    @classmethod
    def arguments(cls, values: dict[str, Any]) -> dict[str, Any]:
        keys = ("FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT")
        return {key.lower(): values[key] for key in keys}

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        maps = self.maps(student, teacher)
        strides = [level.stride for level in self.levels]
        masks = defeat_masks(
            student.batch.boxes, [(s.shape[2], s.shape[3]) for s, _ in maps], strides
        )
        losses = {}
        for part, (s, t), mask in zip(self.parts, maps, masks):
            inside, outside = defeat(s, t, mask)
            loss = self.foreground_weight * inside + self.background_weight * outside
            losses[part] = loss / len(maps)
        return losses


class DenseFPNHead(AuthorsFPNHead):
    """What looks at the maps that the dense head reads, and at what it predicts of each anchor.

    Args:
        classes: that both dense heads list.
    """

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
        return tuple(DenseLayout.of(student).levels)


@DISTILL_HEAD_REGISTRY.register()
class FRS(DenseFPNHead):
    """Features and class logits where the teacher finds something, see
    :func:`distill.losses.frs`; of an R-CNN, the RPN's objectness.

    Args:
        feature_weight, class_weight: factors of both terms.
    """

    @configurable
    def __init__(self, *, feature_weight: float, class_weight: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.feature_weight = feature_weight
        self.class_weight = class_weight
        self.parts = tuple(f"{k}/{term}" for k in self.parts for term in ("feature", "class"))

    @classmethod
    def arguments(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {key.lower(): values[key] for key in ("FEATURE_WEIGHT", "CLASS_WEIGHT")}

    @staticmethod
    def adapter(student: int, teacher: int) -> nn.Module:
        return nn.Conv2d(student, teacher, kernel_size=3, padding=1)

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        assert student.dense is not None and teacher.dense is not None
        losses = {}
        logits = zip(student.dense.logits, teacher.dense.logits)
        for level, (s, t), rows in zip(self.levels, self.maps(student, teacher), logits):
            ours, theirs = (_as_maps(x, s) for x in self.classes.select(*rows))
            score = feature_richness(_as_maps(rows[1], s))
            name = level.student
            losses[f"{name}/feature"] = self.feature_weight * frs(s, t, score)
            losses[f"{name}/class"] = self.class_weight * frs_classes(ours, theirs, score)
        return losses


def _as_maps(rows: Tensor, maps: Tensor) -> Tensor:
    """(N, A·K, H, W) of (N, H·W·A, K) rows, with the H and W of ``maps``."""
    batch, _, height, width = maps.shape
    return rows.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


class NonLocal(nn.Module):
    """Each cell with what the pooled cells say of it (Wang et al., "Non-local neural networks").

    z = x + W (softmax-free: θ(x)ᵀ φ(x) / number of keys) g(x); at the start z = x.

    Args:
        channels: C.
        inside: channels of θ, φ and g.
        stride: side of the pooled cells.
    """

    def __init__(self, channels: int, inside: int, stride: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(channels, inside, 1) for _ in range(3))
        norm = BatchNorm(channels)
        nn.init.zeros_(norm.weight)
        self.outside = nn.Sequential(nn.Conv2d(inside, channels, 1), norm)
        self.pool = nn.MaxPool2d(stride, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) of the same."""
        query = self.query(x).flatten(2)
        key, value = (self.pool(f(x)).flatten(2) for f in (self.key, self.value))
        # Divided first: the sum over the keys could overflow in half precision.
        context = torch.einsum("nck,ndk->ncd", key / key.shape[2], value)
        read = torch.einsum("ncq,ncd->ndq", query, context)
        return x + self.outside(read.unflatten(2, x.shape[2:]))


class FKDAdapters(nn.Module):
    """What FKD compares of one level: maps, pooled maps, and maps related to themselves.

    Args:
        student, teacher: channels.
        inside: channels of the relation.
        stride: side in cells of what a cell is related to.
    """

    def __init__(self, student: int, teacher: int, inside: int, stride: int):
        super().__init__()
        self.map = nn.Conv2d(student, teacher, kernel_size=1)
        self.channels = nn.Linear(student, teacher)
        self.cells = nn.Conv2d(1, 1, kernel_size=3, padding=1)
        self.of_student = NonLocal(student, inside, stride)
        self.of_teacher = NonLocal(teacher, inside, stride)
        self.relation = nn.Conv2d(student, teacher, kernel_size=1)


@DISTILL_HEAD_REGISTRY.register()
class FKD(AuthorsFPNHead):
    """Attended maps, their means over cells and over channels, and their relations, see
    :func:`distill.losses.fkd`.

    Every term is a length, not its square, of the difference in the whole batch.

    Args:
        attention_weight, pooled_weight, relation_weight: factors of the terms.
        temperature: 𝒯 > 0 of the attention.
    """

    adapts = False

    @configurable
    def __init__(
        self,
        *,
        attention_weight: float,
        pooled_weight: float,
        relation_weight: float,
        temperature: float,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.attention_weight = attention_weight
        self.pooled_weight = pooled_weight
        self.relation_weight = relation_weight
        self.temperature = temperature
        self.compared = nn.ModuleDict()
        for level, (s, t) in zip(self.levels, self.channels):
            fine = level.stride <= 8
            stride = max(32 // level.stride, 2)  # the authors': 8, 4, 2, 2, 2 from P2 on
            self.compared[level.student] = FKDAdapters(s, t, 64 if fine else 128, stride)

    @classmethod
    def arguments(cls, values: dict[str, Any]) -> dict[str, Any]:
        keys = ("ATTENTION_WEIGHT", "POOLED_WEIGHT", "RELATION_WEIGHT", "TEMPERATURE")
        return {key.lower(): values[key] for key in keys}

    def level_loss(self, level: Level, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        compared: Any = self.compared[level.student]
        mask = fkd_mask(student, teacher, self.temperature)
        attended = fkd(compared.map(student), teacher, mask)
        channels = length_of_gap(compared.channels(student.mean((2, 3))), teacher.mean((2, 3)))
        cells = length_of_gap(
            compared.cells(student.mean(1, keepdim=True)), teacher.mean(1, keepdim=True)
        )
        related = compared.relation(compared.of_student(student)), compared.of_teacher(teacher)
        return (
            self.attention_weight * attended
            + self.pooled_weight * (channels + cells)
            + self.relation_weight * length_of_gap(*related)
        )

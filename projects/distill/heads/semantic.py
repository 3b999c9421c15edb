"""Heads of semantic segmentation, where every pixel has a class."""

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import get_norm
from detectron2.utils import comm
from torch import Tensor, nn

from ..losses import (
    ClassQueues,
    class_pixels,
    class_regions,
    cross_image_relation,
    cwd,
    ifvd,
    memory_contrast,
    pairwise_affinity,
    pixel_kd,
)
from ..structures import SEM_SEG_HEAD, Batch, NetworkInfo, NetworkOutputs
from ..utils.distributed import reduce_mean
from .base import DISTILL_HEAD_REGISTRY, StepGenerator, gather
from .classes import PredictionDistillHead
from .fpn import FPNDistillHead, cell_labels, on_grid

logger = logging.getLogger(__name__)


class SemSegDistillHead(PredictionDistillHead):
    """Logits of both networks before upsampling, on the student's cells, of the shared classes.

    A subclass writes :meth:`loss`, or :meth:`losses` if it has several parts.

    Args:
        teacher_stride: of the teacher's logits in pixels.
    """

    needs = frozenset({"sem_seg"})

    @configurable
    def __init__(self, *, teacher_stride: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.teacher_stride = teacher_stride

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        return {**ret, "teacher_stride": teacher.maps[SEM_SEG_HEAD].stride}

    @classmethod
    def class_names(cls, net: NetworkInfo) -> tuple[str, ...]:
        return net.sem_seg_classes

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        return cls.missing_outputs(student, teacher) or super().problem(student, teacher)

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        return {"": self.loss(*self.logits(student, teacher))}

    def logits(self, student: NetworkOutputs, teacher: NetworkOutputs) -> tuple[Tensor, Tensor]:
        """(N, K', H, W) of both."""
        assert student.sem_seg is not None and teacher.sem_seg is not None
        s = student.sem_seg.logits
        t = on_grid(teacher.sem_seg.logits, s, self.teacher_stride, student.batch)
        s, t = self.classes.select(s.movedim(1, -1), t.movedim(1, -1))
        return s.movedim(-1, 1), t.movedim(-1, 1)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Scalar loss of (N, K', H, W) logits."""
        raise NotImplementedError


@DISTILL_HEAD_REGISTRY.register()
class PixelKD(SemSegDistillHead):
    """Class probabilities of every cell; see :func:`distill.losses.pixel_kd`."""

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return pixel_kd(student, teacher, self.temperature)


@DISTILL_HEAD_REGISTRY.register()
class CWDLogits(SemSegDistillHead):
    """Where each class is, of the logits; see :func:`distill.losses.cwd`."""

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cwd(student, teacher, self.temperature)


class RelationDistillHead(FPNDistillHead):
    """Relations inside of each network's maps: channels may differ, there are no adapters.

    By default of the features of the semantic head, where there is one.
    """

    adapts = False

    @classmethod
    def level_names(cls, cfg: CfgNode, student: NetworkInfo) -> tuple[str, ...]:
        default = (SEM_SEG_HEAD,) if student.sem_seg else ()
        return super().level_names(cfg, student) or default


@DISTILL_HEAD_REGISTRY.register()
class SKD(RelationDistillHead):
    """Similarities of pooled cells, pair by pair; see :func:`distill.losses.pairwise_affinity`.

    Args:
        scale: side of a pooled cell as a share of the map's.
    """

    @configurable
    def __init__(self, *, scale: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.scale = scale

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        return {**super().from_config(cfg, student, teacher), "scale": cls.section(cfg).SCALE}

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        return pairwise_affinity(student, teacher, self.scale)


@DISTILL_HEAD_REGISTRY.register()
class IFVD(RelationDistillHead):
    """Similarity of each cell to the mean of its class; see :func:`distill.losses.ifvd`.

    Args:
        num_classes: of the semantic labels.
    """

    needs = frozenset({"features", "sem_seg"})

    @configurable
    def __init__(self, *, num_classes: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_classes = num_classes

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        return {**ret, "num_classes": len(student.sem_seg_classes)}

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        labels = cell_labels(batch.sem_seg, *student.shape[2:])
        return ifvd(student, teacher, labels, self.num_classes)


@DISTILL_HEAD_REGISTRY.register()
class CIRKD(RelationDistillHead):
    """Similarities with pixels of other pictures: of the process's batch, and of the past.

    See :func:`distill.losses.cross_image_relation` and :func:`distill.losses.memory_contrast`.
    The memory holds the teacher's features of labelled pixels (``pixel``) and of the regions of a
    class (``region``), from all processes; it is saved with the head.

    Args:
        num_classes: of the semantic labels.
        part_weights: factor of each of the ``parts``.
        pool: side in cells of the patches that ``minibatch`` compares.
        pixels, regions: slots a class of the two memories.
        pixel_keys, region_keys: of all classes together, drawn for a step; at least one a class.
        new_pixels: stored of each class and picture.
        norm: of the projection of the student's features.
        seed: of all that is drawn.
    """

    needs = frozenset({"features", "sem_seg"})
    parts = ("minibatch", "pixel", "region")

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        part_weights: Sequence[float] = (1.0, 0.1, 0.1),
        pool: int = 1,
        pixels: int = 20000,
        regions: int = 2000,
        pixel_keys: int = 4096,
        region_keys: int = 1024,
        new_pixels: int = 16,
        norm: str = "BN",
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.parts = CIRKD.parts
        ((inside, outside),) = kwargs["channels"]
        self.num_classes = num_classes
        self.part_weights = dict(zip(self.parts, part_weights))
        self.pool = pool
        self.new_pixels = new_pixels
        self.pixel_keys = pixel_keys // num_classes + 1  # of each class
        self.region_keys = region_keys // num_classes + 1
        self.random = StepGenerator(seed)
        self.projection = nn.Sequential(
            nn.Conv2d(inside, outside, 1, bias=False),
            get_norm(norm, outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 1, bias=False),
        )
        self.pixel_memory = ClassQueues(num_classes, pixels, outside)
        self.region_memory = ClassQueues(num_classes, regions, outside)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        node, world = cls.section(cfg), comm.get_world_size()
        if cfg.SOLVER.IMS_PER_BATCH // world < 2:
            logger.warning("CIRKD has one picture a process, and no other to compare it with.")
        return {
            **super().from_config(cfg, student, teacher),
            "num_classes": len(student.sem_seg_classes),
            "part_weights": (node.MINIBATCH_WEIGHT, node.PIXEL_WEIGHT, node.REGION_WEIGHT),
            "pool": node.POOL,
            "pixels": node.PIXELS,
            "regions": node.REGIONS,
            "pixel_keys": node.PIXEL_KEYS,
            "region_keys": node.REGION_KEYS,
            "new_pixels": node.NEW_PIXELS,
            "norm": "SyncBN" if world > 1 and cfg.MODEL.DEVICE != "cpu" else "BN",
            "seed": cfg.SEED,
        }

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        ((s, t),) = self.maps(student, teacher)
        labels = cell_labels(student.batch.sem_seg, *s.shape[2:])
        losses = {"minibatch": cross_image_relation(s, t, pool=self.pool)}
        self.remember(t, labels)
        rows = self.projection(s).movedim(1, -1).flatten(0, 2), t.movedim(1, -1).flatten(0, 2)
        labelled = ((labels >= 0) & (labels < self.num_classes)).flatten()
        share = labelled.sum() / reduce_mean(labelled.sum())  # of this process
        generator = self.random.generator(s.device)
        for name, memory, number in (
            ("pixel", self.pixel_memory, self.pixel_keys),
            ("region", self.region_memory, self.region_keys),
        ):
            keys, filled = memory.sample(number, generator)
            loss = memory_contrast(*rows, keys, filled=filled, labelled=labelled)
            losses[name] = loss * share
        return {part: losses[part] * self.part_weights[part] for part in self.parts}

    def remember(self, teacher: Tensor, labels: Tensor) -> None:
        """Store the regions and some pixels of the teacher's maps, those of all processes."""
        generator = self.random.generator(teacher.device)
        regions, present = class_regions(teacher, labels, self.num_classes)
        drawn = class_pixels(teacher, labels, self.num_classes, self.new_pixels, generator)
        pixels, valid = (gather(x).transpose(0, 1).flatten(1, 2) for x in drawn)
        self.region_memory.push(gather(regions).transpose(0, 1), gather(present).T)
        self.pixel_memory.push(pixels, valid)

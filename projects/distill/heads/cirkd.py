"""Cross-image relational distillation (CIRKD)."""

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import get_norm
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import ConfigError
from ..losses import (
    ClassQueues,
    class_pixels,
    class_regions,
    cross_image_relation,
    memory_contrast,
)
from ..section import Key, Section, at_least
from ..structures import NetworkInfo, NetworkOutputs
from ..utils.distributed import gather, reduce_mean
from .base import DISTILL_HEAD_REGISTRY, StepGenerator
from .fpn import cell_labels
from .semantic import RelationDistillHead

logger = logging.getLogger(__name__)


@DISTILL_HEAD_REGISTRY.register()
class CIRKD(RelationDistillHead):
    """CIRKD: compare similarities with pixels of other images, of the batch and of a memory.

    See :func:`distill.losses.cross_image_relation` and :func:`distill.losses.memory_contrast`.
    The memory holds the teacher's features of labelled pixels (``pixel``) and of the regions of a
    class (``region``). It is filled by all processes and saved with the head.

    Args:
        num_classes: number of classes of the semantic labels.
        part_weights: factor of each of the ``parts``.
        pool: side in cells of the patches that ``minibatch`` compares.
        pixels, regions: slots per class of the two memories.
        pixel_keys, region_keys: number of keys of all classes that are drawn in an iteration; at
            least one per class.
        new_pixels: pixels per class and image that are stored.
        norm: norm layer of the projection of the student's features.
        seed: seed of the drawn pixels and keys.
    """

    section = Section(
        IN_FEATURES=None,
        MINIBATCH_WEIGHT=Key(1.0, "factor of the similarities within the batch", at_least(0)),
        PIXEL_WEIGHT=Key(0.1, "factor of those with the stored pixels", at_least(0)),
        REGION_WEIGHT=Key(0.1, "factor of those with the stored regions", at_least(0)),
        POOL=Key(
            1,
            "side in cells of the patches that are compared within the batch; the cost falls with "
            "its 4th power",
            at_least(1),
        ),
        PIXELS=Key(20000, "stored pixels per class", at_least(1)),
        REGIONS=Key(2000, "stored regions per class", at_least(1)),
        PIXEL_KEYS=Key(
            4096, "stored pixels of all classes that an iteration compares with", at_least(1)
        ),
        REGION_KEYS=Key(
            1024, "stored regions of all classes that an iteration compares with", at_least(1)
        ),
        NEW_PIXELS=Key(16, "pixels per class and image that are stored", at_least(1)),
    )
    needs = frozenset({"features", "sem_seg"})
    reads_labels = True
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
        self.pixel_keys = pixel_keys // num_classes + 1  # per class
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
        world = comm.get_world_size()
        if cfg.SOLVER.IMS_PER_BATCH // world // cfg.SOLVER.ACCUMULATE < 2:
            logger.warning("CIRKD compares images that are computed together: there is only one.")
        ret = super().from_config(cfg, student, teacher)
        ret["part_weights"] = [ret.pop(f"{part}_weight") for part in cls.parts]
        return {
            **ret,
            "num_classes": len(student.sem_seg_classes),
            "norm": "SyncBN" if world > 1 and cfg.MODEL.DEVICE != "cpu" else "BN",
            "seed": cfg.SEED,
        }

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        super().check_config(cfg)
        node, images = cls.config_node(cfg), cfg.SOLVER.IMS_PER_BATCH
        if images * node.NEW_PIXELS > node.PIXELS or images > node.REGIONS:
            raise ConfigError(
                f"SOLVER.IMS_PER_BATCH is {images}, of which a step stores more than "
                f"MODEL.DISTILL.CIRKD.PIXELS {node.PIXELS} or REGIONS {node.REGIONS} hold; raise "
                "them or lower NEW_PIXELS."
            )

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        ((s, t),) = self.maps(student, teacher)
        labels = cell_labels(student.batch.sem_seg, *s.shape[2:])
        losses = {"minibatch": cross_image_relation(s, t, pool=self.pool)}
        self.remember(t, labels)
        rows = self.projection(s).movedim(1, -1).flatten(0, 2), t.movedim(1, -1).flatten(0, 2)
        labelled = ((labels >= 0) & (labels < self.num_classes)).flatten()
        share = labelled.sum() / reduce_mean(labelled.sum())  # this process has
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
        """Store the regions and some pixels of the teacher's maps of all processes."""
        generator = self.random.generator(teacher.device)
        regions, present = class_regions(teacher, labels, self.num_classes)
        drawn = class_pixels(teacher, labels, self.num_classes, self.new_pixels, generator)
        pixels, valid = (gather(x).transpose(0, 1).flatten(1, 2) for x in drawn)
        self.region_memory.push(gather(regions).transpose(0, 1), gather(present).T)
        self.pixel_memory.push(pixels, valid)

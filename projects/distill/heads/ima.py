"""Instance mask alignment (IMA): definition of an instance, and its features."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..errors import ConfigError
from ..losses import ima, ima_classes
from ..losses.ima import (
    IMA_STATISTICS,
    Alignment,
    class_moments,
    deflation,
    image_moments,
    instance_moments,
)
from ..losses.reduce import class_members, connected_zero, same_shape
from ..section import BELOW_1, FRACTION, SWITCH, Key, Section, one_of
from ..structures import Batch, NetworkInfo, NetworkOutputs
from ..utils.distributed import reduce_mean
from .base import DISTILL_HEAD_REGISTRY, Losses
from .fpn import FrequencyMasks, cell_labels
from .instances import INSTANCES, InstanceHead

IMA_SCOPES = ("auto", "image", "box", "mask", "class")
CROPPED = ("box", "mask")  # the scopes that crop instances from the level that fits their size
CROP_SIZE = 14  # cells of a cropped instance, as in the mask head of Mask R-CNN


class Crops(NamedTuple):
    """Features of instances that are cropped from levels of equal channels.

    Attributes:
        rows: index of these instances among all.
        student, teacher: (R, C, CROP_SIZE, CROP_SIZE).
    """

    rows: Any
    student: Tensor
    teacher: Tensor


@DISTILL_HEAD_REGISTRY.register()
class IMA(InstanceHead):
    """IMA: compare aligned and standardized features of instances; see :func:`distill.losses.ima`.

    Args:
        scope: definition of an instance. "image": each image, on every level. "box": RoIAlign of
            each box, on the same boxes and levels in both networks. "mask": the same, with cells
            weighted by the mask. "class": the cells of one semantic class in one image, on every
            level.
        selection: see :class:`InstanceHead`. The teacher's detections are also of objects that are
            not labelled (Fig. 1 has the teacher's maps).
        num_classes: number of classes of the semantic labels; only for scope "class".
        mask_ratio: ζ of the frequency mask; 0 switches it off.
        standardize, standardize_teacher, deflate, scale_on, scale_floor: see the loss.
        statistics: option for scope "class", see :func:`distill.losses.ima_classes`.
        seed: seed of the frequency masks.
    """

    section = Section(
        SCOPE=Key(
            "auto", "definition of an instance; auto: by the student's family", one_of(*IMA_SCOPES)
        ),
        INSTANCES=Key(
            "ground_truth",
            "boxes and masks of SCOPE box and mask; teacher: those of the teacher's detections",
            one_of(*INSTANCES),
        ),
        INSTANCE_SCORE=Key(0.5, "least score of a teacher's detection (paper silent)", FRACTION),
        MASK_RATIO=Key(
            0.15, "ζ: expected share of removed frequencies (Eq. 2; paper silent)", BELOW_1
        ),
        STANDARDIZE=Key(True, "instance standardization (Eq. 5-7)", SWITCH),
        STANDARDIZE_TEACHER=Key(
            True, "standardize the teacher too (Eq. 15); False: Eq. 7 to the letter", SWITCH
        ),
        STATISTICS=Key(
            "instance",
            "cells of μ and σ for SCOPE class: of the instance, or all labelled cells of the image",
            one_of(*IMA_STATISTICS),
        ),
        DEFLATE=Key(True, "adaptive scale deflation (Eq. 8-10)", SWITCH),
        SCALE_ON=Key(
            "standardized",
            "maps whose cosine is α; raw: Eq. 8 to the letter",
            one_of("standardized", "raw"),
        ),
        SCALE_FLOOR=Key(0.1, "f: α becomes f + (1 − f) α; 0: the paper to the letter", FRACTION),
    )

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
        statistics: str = "instance",
        num_classes: int = 0,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.scope = scope
        self.reads_labels = scope == "class" or (scope in CROPPED and self.selection is None)
        self.num_classes = num_classes
        self.masks = FrequencyMasks(mask_ratio, seed)
        self.options: dict[str, Any] = {
            "standardize": standardize,
            "standardize_teacher": standardize_teacher,
            "deflate": deflate,
            "scale_on": scale_on,
            "scale_floor": scale_floor,
        }
        self.class_options = {**self.options, "statistics": statistics}
        if scope in CROPPED:
            self.parts = ("",)
            self.pooler = ROIPooler(CROP_SIZE, [1 / x.stride for x in self.levels], 0, "ROIAlignV2")

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        scope = cls.resolved_scope(cfg, student)
        if cls.config_node(cfg).INSTANCES == "teacher":
            cls.check_teacher(scope, teacher)
        else:
            cls.check_scope(scope, student)
        ret = super().from_config(cfg, student, teacher)
        strides = [x.stride for x in ret["levels"]]
        if scope in CROPPED and strides != [strides[0] * 2**i for i in range(len(strides))]:
            raise ConfigError(
                f"MODEL.DISTILL.IMA.SCOPE {scope} crops boxes from levels whose strides double, "
                f"but theirs are {strides}; set IN_FEATURES to such levels or SCOPE image."
            )
        if scope == "class":
            ret["num_classes"] = len(student.sem_seg_classes)
        return {**ret, "scope": scope, "seed": cfg.SEED}

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        super().check_config(cfg)
        node = cls.config_node(cfg)
        if (node.SCOPE, node.INSTANCES, cfg.MODEL.MASK_ON) == ("mask", "ground_truth", False):
            raise ConfigError(
                "MODEL.DISTILL.IMA.SCOPE is mask, which needs ground-truth masks; "
                "set MODEL.MASK_ON True or SCOPE box."
            )

    @staticmethod
    def check_scope(scope: str, student: NetworkInfo) -> None:
        """Refuse a scope whose instances the student's data do not label."""
        if scope in CROPPED and not student.has_boxes:
            raise ConfigError(
                f"MODEL.DISTILL.IMA.SCOPE is {scope}, which needs ground-truth boxes; a "
                f"{student.kind} has SCOPE class or image."
            )
        if scope == "class" and "sem_seg" not in student.outputs:
            raise ConfigError(
                f"MODEL.DISTILL.IMA.SCOPE is class, which needs semantic labels; a "
                f"{student.kind} has SCOPE image or box."
            )

    @staticmethod
    def check_teacher(scope: str, teacher: NetworkInfo) -> None:
        """Refuse a scope whose instances a teacher's detections do not have."""
        if scope not in CROPPED:
            raise ConfigError(
                "MODEL.DISTILL.IMA.INSTANCES is teacher, whose detections are boxes and masks, but "
                f"SCOPE is {scope}; set SCOPE box or mask, or INSTANCES ground_truth."
            )
        if scope == "mask" and not teacher.detects_masks:
            raise ConfigError(
                "MODEL.DISTILL.IMA.INSTANCES is teacher, but the detections of the teacher "
                f"({teacher.kind}) have no masks; set SCOPE box."
            )

    @classmethod
    def level_names(cls, cfg: CfgNode, student: NetworkInfo) -> tuple[str, ...]:
        """Return the levels to compare; crops are from those that the student's detector reads."""
        names = super().level_names(cfg, student)
        if names or cls.resolved_scope(cfg, student) not in CROPPED:
            return names
        return student.box_in_features or tuple(student.dense.levels if student.dense else ())

    @classmethod
    def resolved_scope(cls, cfg: CfgNode, student: NetworkInfo) -> str:
        scope = cls.config_node(cfg).SCOPE
        return cls.default_scope(student) if scope == "auto" else scope

    @staticmethod
    def default_scope(student: NetworkInfo) -> str:
        """Return the scope for the family's labels; the paper is silent (Fig. 1: instance maps)."""
        for signal, scope in (("masks", "mask"), ("rois", "box"), ("dense", "box")):
            if signal in student.outputs:
                return scope
        return "class" if "sem_seg" in student.outputs else "image"

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> Losses:
        if self.scope not in CROPPED:
            return super().losses(student, teacher)
        maps = self.maps(student, teacher)
        boxes, weight = self.instances(student, teacher)
        losses = []
        for rows, s, t in self.crops(maps, boxes):
            own = None if weight is None else weight[rows]
            losses.append(self.align(s, t, own) * len(s))
        count = losses[0].new_full((), sum(map(len, boxes)), dtype=torch.float32)
        loss = sum(losses) / reduce_mean(count)
        return {"": loss + connected_zero(*(s[:1, :1, :1, :1] for s, _ in maps))}

    def instances(
        self, student: NetworkOutputs, teacher: NetworkOutputs
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the instances of scopes "box" and "mask".

        Returns:
            boxes: (Ri, 4) of each image.
            weight: (ΣRi, 1, CROP_SIZE, CROP_SIZE) weights of the cells; None if all weigh the same.
        """
        masks = self.scope == "mask"
        if self.selection is None:
            return student.batch.boxes, self.instance_masks(student.batch) if masks else None
        found = self.selection(teacher.detections, student.batch.padded_size)
        boxes = [x.pred_boxes.tensor for x in found]
        return boxes, detected_masks(found) if masks else None

    def crops(self, maps: list[tuple[Tensor, Tensor]], boxes: list[Tensor]) -> list[Crops]:
        """Return both networks' features of boxes, by level if levels have other channels."""
        rois = [Boxes(b) for b in boxes]
        if len({t.shape[1] for _, t in maps}) == 1:
            return [Crops(slice(None), *(self.pooler(list(x), rois) for x in zip(*maps)))]
        levels, indexed = self.levels_of(rois), convert_boxes_to_pooler_format(rois)
        found = []
        for k, (pair, pool) in enumerate(zip(maps, self.pooler.level_poolers)):
            rows = (levels == k).nonzero()[:, 0]
            found.append(Crops(rows, *(pool(x, indexed[rows]) for x in pair)))
        return found

    def levels_of(self, boxes: list[Boxes]) -> Tensor:
        """Return the (ΣRi,) indices of the levels from which boxes are cropped."""
        pooler = self.pooler
        canonical = pooler.canonical_box_size, pooler.canonical_level
        return assign_boxes_to_levels(boxes, pooler.min_level, pooler.max_level, *canonical)

    def loss(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        if self.scope == "image":
            return self.align(student, teacher, None)
        labels = cell_labels(batch.sem_seg, *student.shape[2:])
        mask = self.masks(student)
        total, count = ima_classes(
            student, teacher, labels, self.num_classes, mask, **self.class_options
        )
        return total / reduce_mean(count)

    def align(self, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
        return ima(student, teacher, self.masks(student), weight=weight, **self.options)

    def scales(self, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
        """Return the (N,) α of each instance of maps or :meth:`crops`."""
        student, teacher = same_shape(student, teacher)
        moments = instance_moments(student, teacher, self.masks(student), weight)
        return deflation(moments, Alignment(**self.options))[1][:, 0]

    def class_scales(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the (N, K) α of each class of (N, H, W) labels; NaN without a cell."""
        student, teacher = same_shape(student, teacher)
        member = class_members(labels, student, self.num_classes)
        moments, cells = class_moments(student, teacher, member, self.masks(student))
        align = Alignment(**self.class_options)
        scale = deflation(moments, align, image_moments(moments, cells))[1][:, 0]
        return scale.view_as(cells).where(cells > 0, torch.nan)

    @staticmethod
    def instance_masks(batch: Batch) -> Tensor:
        """Return the ground-truth masks on the crops' grid, (ΣRi, 1, CROP_SIZE, CROP_SIZE).

        detectron2 rasterises polygons on the CPU, one by one. So the originals are read, which are
        on the CPU already.
        """
        originals = [x["instances"] for x in batch.inputs]
        crops = [
            x.gt_masks.crop_and_resize(x.gt_boxes.tensor, CROP_SIZE) for x in originals if len(x)
        ]
        device = batch.instances[0].gt_boxes.device
        if not crops:
            return torch.ones((0, 1, CROP_SIZE, CROP_SIZE), device=device)
        return torch.cat(crops).to(device)[:, None].float()


def detected_masks(detections: list[Instances]) -> Tensor:
    """Return the masks of detections on the crops' grid, (ΣRi, 1, CROP_SIZE, CROP_SIZE) in {0, 1}.

    A cell belongs to an object if the mean probability of its pixels is at least one half.
    """
    masks = torch.cat([x.pred_masks for x in detections])
    return (F.adaptive_avg_pool2d(masks.float(), CROP_SIZE) >= 0.5).float()

"""Cross-head distillation (CrossKD): the teacher's head reads the student's features."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..losses import crosskd_aligned, crosskd_bins, crosskd_boxes, crosskd_classes
from ..losses.boxes import box_centerness
from ..losses.reduce import full_precision
from ..section import WHOLE, Key, Presets, Section, at_least
from ..structures import DenseLayout, HeadFeatures, NetworkInfo, NetworkOutputs
from ..utils.distributed import reduce_mean
from .base import DISTILL_HEAD_REGISTRY, DistillHead, NonModuleRef
from .dense import AnchorGrids, anchor_problem, grid_problem, layout_of
from .fpn import FPNDistillHead

TASKS = ("classes", "boxes")  # names of the subnets in :class:`HeadFeatures`


@DISTILL_HEAD_REGISTRY.register()
class CrossKD(DistillHead):
    """CrossKD: compare predictions of the teacher with those of its last layers on the student.

    The last layers of the teacher's head read the student's features before an activation, with
    the teacher's mean and deviation in each channel (:func:`distill.losses.crosskd_aligned`).
    Classes are compared by :func:`distill.losses.crosskd_classes`. Boxes are compared as
    distributions in GFL, by 1 − GIoU in RetinaNet and ATSS, and by −log IoU in FCOS. In ATSS the
    centerness of the student's positives is compared too. The authors compare heads of the same
    channels; others are adapted here by a 1x1 convolution per task.

    Args:
        last_layers: last layers of the teacher's head, which stays outside of this module.
        layout: layout of the teacher's head.
        fcos: True if the networks are FCOS.
        reused_convs: number of last convolutions of its subnets that read the student's features.
        channels: (student, teacher) channels of these features, per task.
        grids: the anchors.
        class_weight, box_weight: factors of ``cls`` and of ``box``.
    """

    section = Section(
        CLASS_WEIGHT=Key(
            Presets(DenseDetector=1.0, FCOS=0.4), "factor of the classes", at_least(0), term="cls"
        ),
        BOX_WEIGHT=Key(
            Presets(DenseDetector=1.0, GFL=4.0, FCOS=0.75),
            "factor of the boxes",
            at_least(0),
            term="box",
        ),
        REUSED_CONVS=Key(
            Presets(DenseDetector=1, FCOS=2),
            "convolutions of the teacher's subnets that read the student's features",
            WHOLE,
        ),
    )
    needs = frozenset({"dense", "dense_boxes", "head_features", "targets"})
    reads_labels = True

    @configurable
    def __init__(
        self,
        *,
        last_layers: Callable[..., list[Tensor]],
        layout: DenseLayout,
        fcos: bool,
        reused_convs: int,
        channels: list[tuple[int, int]],
        grids: AnchorGrids,
        class_weight: float,
        box_weight: float,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.last_layers = NonModuleRef(last_layers)
        self.layout = layout
        self.fcos = fcos
        self.compares_centerness = layout.centerness and not fcos
        self.parts = ("cls", "box", *(("centerness",) if self.compares_centerness else ()))
        self.reused_convs = reused_convs
        self.adapters = nn.ModuleList(FPNDistillHead.adapter(*pair) for pair in channels)
        self.grids = grids
        self.class_weight = class_weight
        self.box_weight = box_weight

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        layout = layout_of(teacher)
        ours, theirs = layout_of(student).subnet_channels, layout.subnet_channels
        assert ours and theirs and teacher.last_layers, "networks with head_features have them"
        reused = min(ret["reused_convs"], *(len(x) - 1 for x in (*ours, *theirs)))
        return {
            **ret,
            "last_layers": teacher.last_layers(reused),
            "layout": layout,
            "fcos": "FCOS" in teacher.kinds,
            "reused_convs": reused,
            "channels": [(s[-1 - reused], t[-1 - reused]) for s, t in zip(ours, theirs)],
            "grids": AnchorGrids(layout_of(student)),
        }

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        if problem := super().problem(student, teacher):
            return problem
        if student.kind != teacher.kind:
            return f"the head of a {teacher.kind} cannot read the features of a {student.kind} head"
        return grid_problem(student, teacher) or anchor_problem(student, teacher)

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        assert student.dense and student.targets and student.head_features
        assert teacher.dense and teacher.head_features
        logits, regression, *others = self.last_layers.value(
            self.aligned(student.head_features, teacher.head_features)
        )
        taught = torch.cat(teacher.dense.logits, 1)
        anchors = torch.cat([x.flatten(0, 2) for x in self.grids(teacher.dense.sizes)])
        anchors = anchors.expand(*taught.shape[:2], 4)
        trained = (student.targets.labels >= 0).float()
        positive = student.targets.positive(student.dense.logits[0].shape[2]).float()
        number = self.number(positive, anchors, student.targets.boxes)
        confidence = full_precision(taught).sigmoid().amax(2) * trained
        classes = crosskd_classes(*_rows(logits, taught), number, trained.flatten())
        if self.layout.reg_max is not None:
            sides = _rows(regression, torch.cat(teacher.dense.deltas, 1))
            bins = (x.unflatten(1, (4, -1)) for x in sides)
            boxes = crosskd_bins(next(bins), next(bins), confidence.flatten())
        else:
            transform = self.layout.box2box_transform
            found = transform.apply_deltas(*_rows(full_precision(regression), anchors))
            truth = torch.cat(teacher.dense_boxes, 1).flatten(0, 1)
            boxes = crosskd_boxes(found, truth, confidence.flatten(), number, log_iou=self.fcos)
        losses = {"cls": classes * self.class_weight, "box": boxes * self.box_weight}
        if self.compares_centerness:
            losses["centerness"] = (
                self.centerness(others[0], teacher.head_features, positive) / number
            )
        return losses

    def aligned(self, student: HeadFeatures, teacher: HeadFeatures) -> list[list[Tensor]]:
        """Return the student's features, aligned with the teacher's, by task and level."""
        aligned = []
        for adapter, task in zip(self.adapters, TASKS):
            pairs = zip(self.held(student, task), self.held(teacher, task))
            aligned.append([crosskd_aligned(adapter(s), t) for s, t in pairs])
        return aligned

    def held(self, head_features: HeadFeatures, task: str) -> list[Tensor]:
        """Return the features that the teacher's last layers read."""
        return getattr(head_features, task)[-1 - self.reused_convs]

    def number(self, positive: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """Return the normaliser of the losses: the positives, in FCOS their centerness."""
        if self.fcos:
            centre = box_centerness(*_rows(anchors, boxes)).view_as(positive)
            return reduce_mean(centre.where(positive > 0, 0).sum())
        return reduce_mean(positive.sum())

    def centerness(self, logits: Tensor, teacher: HeadFeatures, positive: Tensor) -> Tensor:
        """Return the sum over the positives of the cross entropy of (N, R, 1) logits."""
        with torch.no_grad():
            own = self.last_layers.value([self.held(teacher, task) for task in TASKS])[2]
        entropy = F.binary_cross_entropy_with_logits(
            full_precision(logits), full_precision(own).sigmoid(), reduction="none"
        )
        return (entropy[..., 0] * positive).sum()


def _rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten (N, R, ...) to (N·R, ...)."""
    return a.flatten(0, 1), b.flatten(0, 1)

"""The student's features, read on by the teacher's head."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.meta_arch.fcos import FCOS
from torch import Tensor, nn

from ..losses import crosskd_aligned, crosskd_bins, crosskd_boxes, crosskd_classes
from ..losses.reduce import full_precision
from ..nets.atss import centerness_of
from ..section import WHOLE, Key, Presets, Section, at_least
from ..structures import HeadFeatures, NetworkInfo, NetworkOutputs
from ..utils.distributed import reduce_mean
from .base import DISTILL_HEAD_REGISTRY, DistillHead, NonModuleRef
from .dense import AnchorGrids, DenseLayout, anchor_problem, grid_problem
from .fpn import FPNDistillHead

SUBNETS = {"classes": "cls_subnet", "boxes": "bbox_subnet"}  # of a RetinaNetHead, by task


@DISTILL_HEAD_REGISTRY.register()
class CrossKD(DistillHead):
    """The teacher's last layers read the student's features, and what they predict of them is
    compared with what the teacher predicts, see :func:`distill.losses.crosskd_classes`.

    The features are those before an activation, brought to the teacher's mean and deviation in
    each channel (:func:`distill.losses.crosskd_aligned`). Boxes are compared as distributions in
    GFL, by 1 − GIoU in RetinaNet and ATSS, by −log IoU in FCOS; in ATSS the centerness of the
    student's positives, too. The authors compare heads of the same channels; others are adapted
    here by a 1x1 convolution a task.

    Args:
        teacher: the frozen detector, which stays outside of this module.
        reused_convs: last convolutions of its subnets that read the student's features.
        channels: of those features, (student, teacher) a task.
        grids: the anchors.
        class_weight, box_weight: factors of ``cls`` and of ``box``.
    """

    section = Section(
        CLASS_WEIGHT=Key(
            Presets(DenseDetector=1.0, FCOS=0.4), "factor of the classes", at_least(0), term=True
        ),
        BOX_WEIGHT=Key(
            Presets(DenseDetector=1.0, GFL=4.0, FCOS=0.75),
            "factor of the boxes",
            at_least(0),
            term=True,
        ),
        REUSED_CONVS=Key(
            Presets(DenseDetector=1, FCOS=2),
            "convolutions of the teacher's subnets that read the student's features",
            WHOLE,
        ),
    )
    needs = frozenset({"dense", "dense_boxes", "head_features", "targets"})

    @configurable
    def __init__(
        self,
        *,
        teacher: Any,
        reused_convs: int,
        channels: list[tuple[int, int]],
        grids: AnchorGrids,
        class_weight: float,
        box_weight: float,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.fcos = isinstance(teacher, FCOS)
        self.compares_centerness = hasattr(teacher.head, "ctrness") and not self.fcos
        self.parts = ("cls", "box", *(("centerness",) if self.compares_centerness else ()))
        self.reused_convs = reused_convs
        self.taught_by = TeachersHead(teacher, reused_convs)
        self.adapters = nn.ModuleList(FPNDistillHead.adapter(*pair) for pair in channels)
        self.grids = grids
        self.class_weight = class_weight
        self.box_weight = box_weight

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        ours, theirs = (
            [_channels(getattr(net.model.head, name)) for name in SUBNETS.values()]
            for net in (student, teacher)
        )
        reused = min(ret["reused_convs"], *(len(x) - 1 for x in (*ours, *theirs)))
        return {
            **ret,
            "teacher": teacher.model,
            "reused_convs": reused,
            "channels": [(s[-1 - reused], t[-1 - reused]) for s, t in zip(ours, theirs)],
            "grids": AnchorGrids(DenseLayout.of(student)),
        }

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        if problem := super().problem(student, teacher):
            return problem
        ours, theirs = (type(x.model).__name__ for x in (student, teacher))
        if ours != theirs:
            return f"the head of a {theirs} cannot read the features of a {ours} head"
        return grid_problem(student, teacher) or anchor_problem(student, teacher)

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        assert student.dense and student.targets and student.head_features
        assert teacher.dense and teacher.head_features
        logits, regression, *others = self.read(
            self.aligned(student.head_features, teacher.head_features)
        )
        taught = torch.cat(teacher.dense.logits, 1)
        anchors = torch.cat([x.flatten(0, 2) for x in self.grids(teacher.dense.sizes)])
        anchors = anchors.expand(*taught.shape[:2], 4)
        labels = student.targets.labels
        trained = (labels >= 0).float()
        positive = trained * (labels < student.dense.logits[0].shape[2])
        number = self.number(positive, anchors, student.targets.boxes)
        confidence = full_precision(taught).sigmoid().amax(2) * trained
        classes = crosskd_classes(*_rows(logits, taught), number, trained.flatten())
        if hasattr(self.taught_by.value, "reg_max"):
            sides = _rows(regression, torch.cat(teacher.dense.deltas, 1))
            bins = (x.unflatten(1, (4, -1)) for x in sides)
            boxes = crosskd_bins(next(bins), next(bins), confidence.flatten())
        else:
            transform = self.taught_by.value.box2box_transform
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
        """The student's features as the teacher's, by task and level."""
        aligned = []
        for adapter, task in zip(self.adapters, SUBNETS):
            pairs = zip(self.held(student, task), self.held(teacher, task))
            aligned.append([crosskd_aligned(adapter(s), t) for s, t in pairs])
        return aligned

    def held(self, head_features: HeadFeatures, task: str) -> list[Tensor]:
        """The features that the teacher's last layers read."""
        return getattr(head_features, task)[-1 - self.reused_convs]

    def read(self, features: list[list[Tensor]]) -> list[Tensor]:
        """(N, R, D) tensors of what the teacher's head predicts of features by task and level."""
        model = self.taught_by.value
        outputs = self.taught_by.last_layers(list(zip(*features)))
        widths = (model.num_classes, getattr(model, "box_dim", 4), 1)
        return [
            torch.cat([permute_to_N_HWA_K(x, width) for x in maps], 1)
            for maps, width in zip(outputs, widths)
        ]

    def number(self, positive: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """What the losses are divided by: the positives, in FCOS their centerness."""
        if self.fcos:
            centre = centerness_of(*_rows(anchors, boxes)).view_as(positive)
            return reduce_mean(centre.where(positive > 0, 0).sum())
        return reduce_mean(positive.sum())

    def centerness(self, logits: Tensor, teacher: HeadFeatures, positive: Tensor) -> Tensor:
        """Σ of the positives' cross entropy of (N, R, 1) logits."""
        with torch.no_grad():
            own = self.read([self.held(teacher, task) for task in SUBNETS])[2]
        entropy = F.binary_cross_entropy_with_logits(
            full_precision(logits), full_precision(own).sigmoid(), reduction="none"
        )
        return (entropy[..., 0] * positive).sum()


def _channels(subnet: nn.Sequential) -> list[int]:
    """Of what each of its convolutions returns."""
    return [module.out_channels for module in subnet if isinstance(module, nn.Conv2d)]


def _rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(N·R, ...) of (N, R, ...)."""
    return a.flatten(0, 1), b.flatten(0, 1)


class TeachersHead(NonModuleRef):
    """The teacher, and its head's last layers.

    Args:
        model: the frozen detector.
        convs: last convolutions of each subnet of its head.
    """

    def __init__(self, model: Any, convs: int):
        super().__init__(model)
        self.last_layers = last_layers(model.head, convs)


class _Pick(nn.Module):
    """One of the maps of a level."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        return maps[self.index]


def last_layers(head: Any, convs: int) -> Any:
    """A dense head without the first layers, which shares all others with ``head``.

    Args:
        head: a RetinaNetHead or one made of it.
        convs: last convolutions of each subnet that stay.

    Returns:
        The head, whose features are pairs of maps before an activation, one of each task.
    """
    rest = copy.copy(head)
    rest._modules = dict(head._modules)
    for task, name in enumerate(SUBNETS.values()):
        subnet = getattr(head, name)
        activations = [k for k, module in enumerate(subnet) if isinstance(module, nn.ReLU)]
        setattr(rest, name, nn.Sequential(_Pick(task), *subnet[activations[-1 - convs] :]))
    return rest

"""Task integration distillation (TID)."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..losses import (
    TID_AREAS,
    TID_OUTSIDE_KEY,
    TID_SCORES,
    matched_iou,
    tid,
    tid_by_value,
    tid_information,
    tid_mask,
    tid_score,
    tid_value,
)
from ..section import FRACTION, SWITCH, Key, Rule, Section, at_least, one_of
from ..structures import NetworkInfo, NetworkOutputs
from ..utils.distributed import reduce_mean
from .base import DISTILL_HEAD_REGISTRY
from .classes import ClassMap, class_map, no_shared_class
from .dense import dense_classes, grid_problem, layout_of
from .instances import RegionHead

SHARE_OF_POINTS = Rule(lambda x: 1e-6 <= x <= 1, "in (0, 1], and at least 0.000001")


class Judgement(NamedTuple):
    """Scores of the points of one image, in the order of the arguments of ``tid_value``."""

    score_teacher: Tensor  # (P,)
    score_student: Tensor  # (P,)
    tie: Tensor  # (P,) IOU_max · p of the teacher
    boxes: Tensor  # (P, 4) best matching box of each point, of the teacher


@DISTILL_HEAD_REGISTRY.register()
class TID(RegionHead):
    """TID: compare features, weighted by how well both networks do both tasks at each point.

    The dense head of each network is scored at every feature point (DIEM, :meth:`scores`). Points
    at which the teacher does well, and better than the student, get a value (LDAM). It fades
    outside the ground-truth boxes (SFDM, :meth:`values`) and weights the squared error of the
    features that the dense head reads. For an R-CNN the RPN is the dense head, p its objectness.

    Args:
        thresholds: (negative, positive) IoU of the student's and the teacher's own assignment.
        classes: the classes that both dense heads list.
        objectness: True if the dense heads are RPNs, whose only logit is every object's.
        alphas: α_high, α_med, α_low: factors of the loss where V >= 1, V >= 0.01, and below.
        gamma, nms_iou, area, outside_key: see :func:`distill.losses.tid_value`.
        top, parts, raw_iou: see :func:`distill.losses.tid_score`.
    """

    section = Section(
        IN_FEATURES=None,
        GAMMA=Key(
            0.05, "γ: share of the points in the key and weak areas (paper silent)", SHARE_OF_POINTS
        ),
        TOP=Key(0.025, "share of the points whose Score_c is 1.5", SHARE_OF_POINTS),
        SCORE=Key("both", "tasks that the score judges", one_of(*TID_SCORES)),
        RAW_IOU=Key(
            False, "Score_r is IOU_max itself, not IOU_max by the detector's thresholds", SWITCH
        ),
        AREA=Key("both", "areas that have a value", one_of(*TID_AREAS)),
        OUTSIDE_KEY=Key(
            "keep",
            "Score_key outside the key area: keep: the teacher's score, at most 1; zero: 0 (paper "
            "silent)",
            one_of(*TID_OUTSIDE_KEY),
        ),
        NMS_IOU=Key(0.6, "IoU of the NMS of the weak area's boxes (paper silent)", FRACTION),
        ALPHA_HIGH=Key(1.0, "α_high: factor of the loss where V >= 1", at_least(0), term="high"),
        ALPHA_MED=Key(1.0, "α_med: factor where 0.01 <= V < 1", at_least(0), term="medium"),
        ALPHA_LOW=Key(1.0, "α_low: factor where V < 0.01", at_least(0), term="low"),
    )
    needs = frozenset({"features", "dense", "dense_boxes"})

    @configurable
    def __init__(
        self,
        *,
        thresholds: tuple[tuple[float, float], tuple[float, float]],
        classes: ClassMap,
        objectness: bool,
        alphas: tuple[float, float, float],
        gamma: float,
        nms_iou: float,
        area: str,
        outside_key: str,
        top: float,
        parts: str,
        raw_iou: bool,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.thresholds = thresholds
        self.classes = classes
        self.objectness = objectness
        self.alphas = alphas
        self.score_options: dict[str, Any] = {"top": top, "parts": parts, "raw_iou": raw_iou}
        self.value_options: dict[str, Any] = {
            "gamma": gamma,
            "nms_iou": nms_iou,
            "area": area,
            "outside_key": outside_key,
        }

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        ret["alphas"] = tuple(ret.pop(f"alpha_{value}") for value in ("high", "med", "low"))
        ret["parts"] = ret.pop("score")
        return {
            **ret,
            "thresholds": tuple(layout_of(net).thresholds for net in (student, teacher)),
            "classes": class_map(cls.__name__, dense_classes(student), dense_classes(teacher)),
            "objectness": layout_of(student).objectness,
        }

    @classmethod
    def level_names(cls, cfg: CfgNode, student: NetworkInfo) -> tuple[str, ...]:
        return tuple(layout_of(student).levels)

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        return (
            super().problem(student, teacher)
            or grid_problem(student, teacher)
            or no_shared_class(dense_classes(student), dense_classes(teacher))
        )

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        terms = []
        for (s, t), value in zip(self.maps(student, teacher), self.values(student, teacher)):
            alpha = tid_by_value(value, *self.alphas)
            terms.append(tid(s, t, tid_mask(value), alpha))
        mass = reduce_mean(torch.stack([m for _, m in terms]).sum(), minimum=1e-6)
        return {part: numerator / mass for part, (numerator, _) in zip(self.parts, terms)}

    @torch.no_grad()
    def values(self, student: NetworkOutputs, teacher: NetworkOutputs) -> list[Tensor]:
        """Return V, one (N, Hi, Wi) map per level."""
        assert student.dense is not None
        points = torch.cat(
            [
                cell_centres(size, level.stride, student.dense.logits[0].device)
                for size, level in zip(student.dense.sizes, self.levels)
            ]
        )
        images = []
        for i, boxes in enumerate(student.batch.boxes):
            value = tid_value(*self.judgement(student, teacher, i), **self.value_options)
            images.append(value * tid_information(points, boxes))
        return self.by_level(torch.stack(images), student)

    def judgement(self, student: NetworkOutputs, teacher: NetworkOutputs, image: int) -> Judgement:
        """Return the scores of both networks for one image (DIEM)."""
        score_s, _, _ = self.scores(student, student, image, self.thresholds[0])
        score_t, tie, boxes = self.scores(teacher, student, image, self.thresholds[1])
        return Judgement(score_t, score_s, tie, boxes)

    @staticmethod
    def by_level(points: Tensor, student: NetworkOutputs) -> list[Tensor]:
        """Return (N, P) values of the points as one (N, Hi, Wi) map per level."""
        assert student.dense is not None
        sizes = student.dense.sizes
        levels = points.split([h * w for h, w in sizes], 1)
        return [x.view(len(x), *size) for x, size in zip(levels, sizes)]

    def scores(
        self,
        net: NetworkOutputs,
        student: NetworkOutputs,
        image: int,
        thresholds: tuple[float, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scores of one network for the points of one image (DIEM).

        Returns:
            score: (P,).
            tie: (P,) IOU_max · p.
            boxes: (P, 4) decoded box of each point that matches best.
        """
        assert net.dense is not None
        sizes = [h * w for h, w in net.dense.sizes]
        decoded = torch.cat([b[image].view(n, -1, 4) for b, n in zip(net.dense_boxes, sizes)])
        truth = student.batch.instances[image]
        iou, match, anchor = matched_iou(decoded, truth.gt_boxes.tensor)
        column, known = self.columns(truth.gt_classes, match, net is student)
        logits = [
            class_logits(x[image].view(n, -1, x.shape[-1]), c)
            for x, n, c in zip(net.dense.logits, sizes, column.split(sizes))
        ]
        prob = torch.cat(logits).float().sigmoid()
        prob = prob * known * (iou > 0)
        negative, positive = thresholds
        score = tid_score(iou, prob, positive, negative, **self.score_options)
        rows = torch.arange(len(anchor), device=anchor.device)
        return score, iou * prob, decoded[rows, anchor]

    def columns(self, labels: Tensor, match: Tensor, is_student: bool) -> tuple[Tensor, Tensor]:
        """Return the column of the matched object's class in the logits, and if it is known."""
        if self.objectness:
            return torch.zeros_like(match), torch.ones_like(match)
        labels = F.pad(labels, (0, 1))[match]  # without ground truth there is one row to read
        column = labels if is_student else self.classes.teacher_label[labels]
        return column, self.classes.known(labels)


def class_logits(logits: Tensor, column: Tensor) -> Tensor:
    """Return the (P,) largest of the (P, A, K) logits of each point's class in (P,) ``column``."""
    index = column[:, None, None].expand(-1, logits.shape[1], 1)
    return logits.gather(2, index).amax((1, 2))


def cell_centres(size: tuple[int, int], stride: int, device: torch.device) -> Tensor:
    """Return the (H·W, 2) x, y of the cells' centres in pixels, row by row."""
    y, x = (torch.arange(n, device=device) * stride + stride / 2 for n in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)

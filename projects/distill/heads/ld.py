"""Localization distillation (LD) of the distributions of box sides."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..losses import ld, ld_region, padded
from ..section import POSITIVE, SWITCH, Key, Section, at_least
from ..structures import NetworkInfo, NetworkOutputs
from ..utils.distributed import reduce_mean
from .base import DISTILL_HEAD_REGISTRY
from .dense import AnchorGrids, DenseDistillHead, layout_of


@DISTILL_HEAD_REGISTRY.register()
class LD(DenseDistillHead):
    """LD: compare distributions of box sides, and classes; see :func:`distill.losses.ld`.

    ``box`` is the sum over the student's positives, weighted by their largest class probability; a
    side counts 1/4. ``region`` is the sum over the valuable localization region
    (:func:`distill.losses.ld_region`), weighted by the IoU; a side counts 1/16. ``cls`` is the mean
    over the positives, with a softmax over the classes.

    Args:
        grids: the student's anchors.
        candidates: number per level and object in the student's assignment.
        box_weight, region_weight, class_weight: factors of the parts.
        class_temperature: T of ``cls``; ``temperature`` is T of the sides.
        released_region: see :func:`distill.losses.ld_region`.
    """

    section = Section(
        TEMPERATURE=Key(10.0, "temperature T of the distributions of box sides", POSITIVE),
        BOX_WEIGHT=Key(0.25, "factor of the positives' sides", at_least(0), term="box"),
        REGION_WEIGHT=Key(
            0.25,
            "factor of the sides in the valuable localization region",
            at_least(0),
            term="region",
        ),
        CLASS_WEIGHT=Key(10.0, "factor of the positives' classes", at_least(0), term="cls"),
        CLASS_TEMPERATURE=Key(2.0, "temperature T of the classes", POSITIVE),
        RELEASED_REGION=Key(False, "the larger region of the authors' code", SWITCH),
    )
    needs = frozenset({"dense", "targets"})
    reads_labels = True

    @configurable
    def __init__(
        self,
        *,
        grids: AnchorGrids,
        candidates: int = 9,
        box_weight: float,
        region_weight: float,
        class_weight: float,
        class_temperature: float,
        released_region: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.parts = ("box", "region", "cls")
        self.grids = grids
        self.candidates = candidates
        self.factors = {"box": box_weight / 4, "region": region_weight / 16, "cls": class_weight}
        self.class_temperature = class_temperature
        self.released_region = released_region

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        return {
            **super().from_config(cfg, student, teacher),
            "grids": AnchorGrids(layout_of(student)),
            "candidates": layout_of(student).candidates,
        }

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        if problem := super().problem(student, teacher):
            return problem
        bins = []
        for net in (student, teacher):
            reg_max = layout_of(net).reg_max
            if reg_max is None:
                return f"the {net.name} ({net.kind}) predicts no distributions of box sides"
            bins.append(reg_max + 1)
        if bins[0] != bins[1]:
            return f"the distributions have {bins[0]} bins in the student, {bins[1]} in the teacher"
        return None

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        assert student.dense is not None and teacher.dense is not None
        assert student.targets is not None
        logits = torch.cat(student.dense.logits, 1).detach()
        positive = student.targets.positive(logits.shape[2]).float()
        weights = {
            "box": logits.float().sigmoid().amax(2) * positive,
            "region": self.region(student, logits.shape[1]),
        }
        sides = (torch.cat(x.deltas, 1) for x in (student.dense, teacher.dense))
        s, t = (x.unflatten(2, (4, -1)).flatten(0, 2) for x in sides)
        losses = {
            part: ld(s, t, weight.flatten().repeat_interleave(4), self.temperature)
            for part, weight in weights.items()
        }
        classes = zip(*self.logits(student, teacher))
        s, t = (torch.cat(x, 1).flatten(0, 1) for x in classes)
        share = positive.flatten() / reduce_mean(positive.sum())
        losses["cls"] = ld(s, t, share, self.class_temperature)
        return {part: losses[part] * factor for part, factor in self.factors.items()}

    def region(self, student: NetworkOutputs, rows: int) -> Tensor:
        """Return the (N, R) weights of the valuable localization region."""
        assert student.dense is not None
        boxes = padded(student.batch.boxes)
        anchors = [x.flatten(0, 2) for x in self.grids(student.dense.sizes)]
        of_boxes = ld_region(
            anchors, boxes.flatten(0, 1), self.candidates, self.released_region
        ).view(*boxes.shape[:2], rows)
        none = of_boxes.new_zeros(len(boxes), 1, rows)  # for a batch without boxes
        return torch.cat([of_boxes, none], 1).amax(1)

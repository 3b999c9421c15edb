"""Untrained networks and random images, of which only the time is measured."""

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances, PolygonMasks
from torch import nn

from ...data.detections import Found
from ...families import build_family
from ...heads import DISTILL_HEAD_REGISTRY
from ...modeling.distillation import (
    Infos,
    build_all_heads,
    build_balance,
    build_teachers,
    infos_by_teacher,
)
from ...modeling.meta_arch import DistillModel, build_student
from ...structures import DETECTIONS, NetworkOutputs


def synthetic_batch(
    batch: int, height: int, width: int, classes: int, objects: int, seed: int
) -> list[Any]:
    """Return ``batched_inputs`` of random images with boxes, polygons and labels of pixels."""
    g = torch.Generator().manual_seed(seed)
    entries = []
    for _ in range(batch):
        low = torch.rand((objects, 2), generator=g) * torch.tensor([width, height]) * 0.6
        size = torch.tensor([width, height]) * (0.1 + 0.3 * torch.rand((objects, 2), generator=g))
        boxes = torch.cat([low, low + size], 1)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(classes, (objects,), generator=g)
        corners = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes.tolist()]
        instances.gt_masks = PolygonMasks(corners)
        image = torch.randint(0, 256, (3, height, width), generator=g).float()
        labels = torch.randint(classes, (height, width), generator=g)
        found = Found(boxes.numpy(), np.ones(objects), instances.gt_classes.numpy())
        entry: dict[str, Any] = {"image": image, "instances": instances, "sem_seg": labels}
        entry[DETECTIONS] = found.instances((height, width))
        entries.append({**entry, "height": height, "width": width})
    return entries


class Networks:
    """The student, its teachers and the heads of a config, all untrained.

    Args:
        cfg: the whole config.
        every_head: take all heads that work for these networks, instead of those of ``cfg``.
    """

    def __init__(self, cfg: CfgNode, every_head: bool = False):
        torch.manual_seed(0)
        self.cfg = cfg.clone()
        self.cfg.defrost()
        if every_head:
            self.cfg.MODEL.DISTILL.HEADS = tuple(name for name, _ in DISTILL_HEAD_REGISTRY)
        self.student = build_student(self.cfg).train()
        self.teachers = build_teachers(self.cfg, trained=False)
        self.infos: Infos = infos_by_teacher(self.cfg, build_family(self.student), self.teachers)
        if every_head:
            self.cfg.MODEL.DISTILL.HEADS = self._working()
        heads = build_all_heads(self.cfg, self.infos)
        self.heads: dict[str, Any] = dict(heads.to(cfg.MODEL.DEVICE).items())

    def _working(self) -> tuple[str, ...]:
        """Return the heads that work for the student and one of its teachers."""
        return tuple(
            name
            for name, cls in DISTILL_HEAD_REGISTRY
            if any(cls.problem(*pair) is None for pair in self.infos.values())
        )

    def model(self, names: list[str], balanced: bool = False) -> DistillModel:
        """Return the distilled student with some of the heads.

        Args:
            balanced: with the balance of the config, if it has one.
        """
        heads = nn.ModuleDict({name: self.heads[name] for name in names})
        student, _ = next(iter(self.infos.values()))
        balance = build_balance(self.cfg, student, heads) if balanced else None
        return DistillModel(
            student=self.student, teacher=self.teachers, heads=heads, balance=balance
        ).train()


def said(model: DistillModel, inputs: list[Any]) -> NetworkOutputs:
    """Return the recorded outputs of the student for ``inputs``, without gradients."""
    needs = model.active_needs()
    with torch.no_grad(), model.family.record(needs) as calls:
        model.student(inputs)
    return model.family.read(calls, model.family.batch(calls, inputs), needs)


def answers(model: DistillModel, student: NetworkOutputs) -> dict[str, NetworkOutputs]:
    """Return the answer of each teacher whose heads are in the model."""
    needs = {name: model.active_needs(teacher=name) for name in model.teachers}
    return {
        name: x.ask(student, needs[name], model.teacher_maps(name))
        for name, x in model.teachers.items()
        if needs[name]
    }

"""Outputs of two networks, made by hand, for the tests of heads.

Expected losses are computed from the maps, the boxes and the parameters of the head, without
distill.losses: by tests/reference/literal_methods.py and plain loops.
"""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from distill.heads.fpn import Level
from distill.structures import ROIs
from tests.support.networks import outputs

CANVAS = (64, 80)  # the second image is smaller


SIZES = {"p3": (8, 10), "p4": (4, 5)}


LEVELS = [Level("p3", "c3", 8, 8), Level("p4", "c4", 16, 16)]


BOXES = [[[3.0, 5.0, 42.0, 37.0], [8.0, 8.0, 16.0, 16.0], [30.5, 20.25, 79.0, 60.0]], []]


CLASSES = ("circle", "square", "star")


def truth(boxes=None):
    found = []
    for size, own in zip([CANVAS, (48, 64)], BOXES if boxes is None else boxes):
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.tensor(own).reshape(-1, 4))
        instances.gt_classes = torch.arange(len(own))
        found.append(instances)
    return found


def heard(student=3, teacher=4, boxes=None, seed=0):
    """Return outputs of two networks with so many channels for two images, in float64."""
    g = torch.Generator().manual_seed(seed)

    def maps(channels, prefix):
        return {
            f"{prefix}{name[1]}": torch.randn(2, channels, *size, generator=g).double()
            for name, size in SIZES.items()
        }

    ours, theirs = maps(student, "p"), maps(teacher, "c")
    for x in ours.values():
        x.requires_grad_()
    return outputs(CANVAS, truth(boxes), **ours), outputs(CANVAS, truth(boxes), **theirs)


def of_both_levels(cls, channels=(3, 4), **kw):
    torch.manual_seed(0)
    return cls(levels=LEVELS, channels=[channels] * 2, **kw).double()


def number(x):
    return x.detach().double().numpy()


def pairs(head, student, teacher):
    """Level names, adapted student maps and teacher maps as arrays."""
    for level in LEVELS:
        s = head.adapters[level.student](student.features[level.student])
        yield level.student, number(s), number(teacher.features[level.teacher])


def check(head, student, teacher, expected):
    """The head's losses are the expected ones, and its gradient reaches all that learns."""
    found = head(student, teacher)
    assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, rel=1e-6)
    assert all(abs(x) > 1e-9 for x in expected.values())
    sum(found.values()).backward()
    assert all(x.grad.abs().sum() > 0 for x in student.features.values())
    assert all(p.grad is not None for p in head.parameters())
    assert all(not x.requires_grad for x in teacher.features.values())


FACTORS = {"alpha": 2.0, "beta": 0.7, "gamma": 0.3, "lambda_": 0.05}


def batch_normalized(norm, x):
    """As in training."""
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    scale, shift = (number(p)[:, None, None] for p in (norm.weight, norm.bias))
    return (x - mean) / np.sqrt(variance + norm.eps) * scale + shift


def boxes(rows=7, classes=3, stages=1):
    """Return both networks' outputs for boxes of so many stages, with float64 logits."""
    g = torch.Generator().manual_seed(stages)
    found = []
    for _ in range(2):
        found.append(
            [
                ROIs(
                    [torch.zeros(rows, 4)],
                    torch.randn(rows, classes + 1, generator=g).double() * 2,
                    torch.zeros(rows, 1, 4),
                    torch.arange(rows) % (classes + 1),  # the last is background
                )
                for _ in range(stages)
            ]
        )
    student, teacher = outputs(CANVAS), outputs(CANVAS)
    student.rois, teacher.rois = found
    for x in student.rois:
        x.logits.requires_grad_()
    return student, teacher

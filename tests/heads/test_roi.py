"""Test heads that compare the sampled boxes, against the formulas of KD and DKD."""

import numpy as np
import pytest
import torch

from distill.heads import DKD, KD
from distill.heads.classes import ClassMap
from distill.structures import ROIs
from tests.reference import literal_methods as literal
from tests.support.heads import PADDED_SIZE, to_numpy
from tests.support.networks import CLASSES, outputs


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
    student, teacher = outputs(PADDED_SIZE), outputs(PADDED_SIZE)
    student.rois, teacher.rois = found
    for x in student.rois:
        x.logits.requires_grad_()
    return student, teacher


ROI_HEADS = {
    KD: ({"temperature": 2.0}, lambda s, t, labels: literal.kd(s, t, 2.0)),
    DKD: (
        {"alpha": 1.5, "beta": 0.25, "temperature": 2.0},
        lambda s, t, labels: literal.dkd(s, t, labels, 1.5, 0.25, 2.0),
    ),
}


of_boxes = pytest.mark.parametrize("cls", ROI_HEADS)


@of_boxes
@pytest.mark.parametrize("stages", [1, 3])
def test_box_heads_are_means_over_all_sampled_boxes_and_stages(cls, stages):
    keys, formula = ROI_HEADS[cls]
    student, teacher = boxes(stages=stages)
    head = cls(classes=ClassMap(CLASSES, CLASSES), weight=3.0, **keys)
    (found,) = head(student, teacher).values()
    each = [
        formula(to_numpy(s.logits), to_numpy(t.logits), s.labels.numpy())
        for s, t in zip(student.rois, teacher.rois)
    ]
    assert found.item() == pytest.approx(3 * np.mean(each))
    found.backward()
    assert all((x.logits.grad.abs().sum(1) > 0).all() for x in student.rois)


@of_boxes
def test_box_heads_leave_out_what_the_teacher_does_not_know(cls):
    """The teacher's classes are star, hexagon, circle: nothing is said of boxes of squares."""
    keys, formula = ROI_HEADS[cls]
    student, teacher = boxes()
    head = cls(classes=ClassMap(CLASSES, ("star", "hexagon", "circle")), **keys)
    (found,) = head(student, teacher).values()
    known = np.arange(7) % 4 != 1
    s, t = to_numpy(student.rois[0].logits), to_numpy(teacher.rois[0].logits)
    s, t = s[known][:, [0, 2, 3]], t[known][:, [2, 0, 3]]
    labels = np.array([0, -1, 1, 2])[np.arange(7) % 4][known]
    assert found.item() == pytest.approx(formula(s, t, labels))


@of_boxes
def test_no_sampled_box_is_a_connected_zero(cls):
    student, teacher = boxes(rows=0)
    head = cls(classes=ClassMap(CLASSES, CLASSES), **ROI_HEADS[cls][0])
    (found,) = head(student, teacher).values()
    found.backward()
    assert found == 0 and student.rois[0].logits.grad is not None

"""Test KD and DKD on hand-made outputs against its formula."""

import numpy as np
import pytest

from distill.heads import DKD, KD
from distill.heads.classes import ClassMap
from tests.reference import literal_methods as literal
from tests.support.heads import CLASSES, boxes, number
from tests.support.networks import built_head

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
        formula(number(s.logits), number(t.logits), s.labels.numpy())
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
    s, t = number(student.rois[0].logits), number(teacher.rois[0].logits)
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


@of_boxes
def test_box_heads_have_the_authors_keys(cls):
    head = built_head(cls, "faster")
    assert head.weight == 1 and head.temperature == 1
    assert cls is KD or (head.alpha, head.beta) == (1, 0.25)

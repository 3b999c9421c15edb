"""Test FRS: both terms against the formula, and the warm-up."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from distill.heads import FRS
from distill.heads.classes import ClassMap
from distill.structures import DenseOutputs
from tests.reference import literal_methods as literal
from tests.support.heads import (
    SIZES,
    check_losses,
    level_maps,
    random_outputs,
    to_numpy,
    two_level_head,
)
from tests.support.networks import CLASSES, built_head


def dense(classes=3, seed=3):
    """Return (N, H·W·A, K) logits per level of both networks, with two anchors per cell."""
    g = torch.Generator().manual_seed(seed)
    rows = {name: h * w * 2 for name, (h, w) in SIZES.items()}
    logits = [
        [torch.randn(2, r, classes, generator=g).double() * 2 for r in rows.values()]
        for _ in range(2)
    ]
    return [DenseOutputs(x, [], [*SIZES.values()]) for x in logits]


@pytest.mark.parametrize("shared", [CLASSES, ("star", "hexagon", "circle")])
def test_frs_weighs_cells_by_the_teachers_best_class(shared):
    """The score is of all classes that the teacher knows, the class term of those of both."""
    head = two_level_head(
        FRS,
        classes=ClassMap(CLASSES, shared),
        feature_weight=0.5,
        class_weight=2.0,
        weight=3.0,
    )
    student, teacher = random_outputs()
    student.dense, teacher.dense = dense()
    for x in student.dense.logits:
        x.requires_grad_()
    columns = ([0, 1, 2], [0, 1, 2]) if shared == CLASSES else ([0, 2], [2, 0])
    expected = {}
    for k, (name, s, t) in enumerate(level_maps(head, student, teacher)):
        height, width = SIZES[name]
        ours, theirs = (
            to_numpy(x.dense.logits[k]).reshape(2, height, width, 2, 3) for x in (student, teacher)
        )
        score = literal.expit(theirs).max((3, 4))
        picked = [x[..., c].reshape(2, height, width, -1) for x, c in zip((ours, theirs), columns)]
        logits = [x.transpose(0, 3, 1, 2) for x in picked]
        expected[f"loss_frs/{name}/feature"] = 1.5 * literal.frs(s, t, score)
        expected[f"loss_frs/{name}/class"] = 6 * literal.frs_classes(*logits, score)
    check_losses(head, student, teacher, expected)
    assert all(x.grad.abs().sum() > 0 for x in student.dense.logits)


def test_frs_warms_up_linearly_for_500_iterations():
    head = built_head(FRS, "retinanet")
    for iteration, factor in ((0, 0.0), (250, 0.5), (500, 1.0), (10**5, 1.0)):
        with EventStorage(iteration):
            assert head.factor() == factor

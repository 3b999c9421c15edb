"""LD on hand-made signals: regions, weights and temperatures by plain loops."""

import re

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from distill.heads import LD
from distill.heads.classes import ClassMap
from distill.heads.dense import AnchorGrids
from distill.structures import DenseLayout, DenseOutputs, DenseTargets
from tests.reference import literal_methods as literal
from tests.support.networks import (
    distilled,
    image_dict,
    kd_losses,
    network_info,
    outputs,
    tiny_cfg,
    tiny_model,
)

CLASSES = ("circle", "square", "star")
SIZES, STRIDES = [(6, 8), (3, 4)], [8, 16]
ROWS = [48, 12]
BINS = 5
BOXES = [[[3.5, 4.25, 41.0, 37.5], [22.75, 11.5, 60.25, 46.0]], []]
FACTORS = {"box_weight": 0.25, "region_weight": 0.5, "class_weight": 10.0}


def grids():
    cells = [torch.tensor([[-2.0, -2, 2, 2]]) * stride for stride in STRIDES]
    return AnchorGrids(DenseLayout(False, ["p3", "p4"], STRIDES, cells, 0.5, (0.4, 0.5)))


def head_of(classes=CLASSES, candidates=4, **keys):
    return LD(
        classes=ClassMap(CLASSES, classes),
        num_levels=2,
        grids=grids(),
        candidates=candidates,
        temperature=10.0,
        class_temperature=2.0,
        **{**FACTORS, **keys},
    ).double()


def heard(boxes=None, positives=((3, 0), (17, 2), (52, 1)), seed=0):
    """Return outputs for two images, in float64; the first has one positive row per class."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for own in BOXES if boxes is None else boxes:
        found.append(Instances((48, 64), gt_boxes=Boxes(torch.tensor(own).reshape(-1, 4))))
    both = []
    for _ in range(2):
        said = outputs((48, 64), found)
        logits, sides = (
            3 * torch.randn(2, sum(ROWS), k, generator=g).double() for k in (3, 4 * BINS)
        )
        levels = ([x.clone() for x in y.split(ROWS, 1)] for y in (logits, sides))
        said.dense = DenseOutputs(*levels, SIZES)
        both.append(said)
    student = both[0]
    labels = torch.full((2, sum(ROWS)), 3)
    labels[:, ::5] = -1
    for row, label in positives:
        labels[0, row] = label
    student.targets = DenseTargets(labels, torch.zeros(2, sum(ROWS), 4))
    for x in (*student.dense.logits, *student.dense.deltas):
        x.requires_grad_()
    return both


def number(levels):
    """(N, R, D) of all levels."""
    return torch.cat(levels, 1).detach().numpy()


def expected_terms(student, teacher, candidates=4, released=False, columns=None):
    labels = student.targets.labels.numpy()
    positive = (labels >= 0) & (labels < 3)
    s, t = (number(x.dense.logits) for x in (student, teacher))
    sides = [number(x.dense.deltas).reshape(2, -1, 4, BINS) for x in (student, teacher)]
    anchors = [x.reshape(-1, 4).numpy() for x in grids()(SIZES)]
    boxes = [x.gt_boxes.tensor.double().numpy() for x in student.batch.instances]
    region = np.stack([literal.vlr(anchors, x, candidates, not released) for x in boxes])

    def of_sides(weight):
        return literal.ld(*(x.reshape(-1, BINS) for x in sides), np.repeat(weight.ravel(), 4), 10.0)

    picked = [x[positive][:, c] for x, c in zip((s, t), columns or (slice(None),) * 2)]
    each = np.full(positive.sum(), 1 / max(positive.sum(), 1))
    return {
        "loss_ld/box": of_sides(literal.expit(s).max(2) * positive) / 4,
        "loss_ld/region": of_sides(region) / 16,
        "loss_ld/cls": literal.ld(*picked, each, 2.0),
    }


@pytest.mark.parametrize("released", [False, True])
def test_the_three_terms(released):
    head, (student, teacher) = head_of(released_region=released, weight=3.0), heard()
    found = head(student, teacher)
    terms = expected_terms(student, teacher, released=released)
    expected = {k: 3 * f * v for (k, v), f in zip(terms.items(), FACTORS.values())}
    assert all(x > 0.01 for x in expected.values())
    assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, rel=1e-6)


def test_the_released_region_is_another():
    values = [head_of(released_region=x)(*heard())["loss_ld/region"] for x in (False, True)]
    assert values[0] != values[1]


@pytest.mark.parametrize("candidates", [1, 9, 100])
def test_candidates_are_the_assignments(candidates):
    student, teacher = heard()
    found = head_of(candidates=candidates)(student, teacher)["loss_ld/region"]
    expected = expected_terms(student, teacher, candidates)["loss_ld/region"]
    assert found.item() == pytest.approx(0.5 * expected, rel=1e-6)


def rows_with_gradient(levels):
    return torch.cat([x.grad for x in levels], 1).abs().sum(2) > 0


@pytest.mark.parametrize("part", FACTORS)
def test_only_the_positives_and_the_region_learn(part):
    student, teacher = heard()
    off = dict.fromkeys(FACTORS, 0.0)
    sum(head_of(**{**off, part: 1.0})(student, teacher).values()).backward()
    positive = (student.targets.labels >= 0) & (student.targets.labels < 3)
    sides, logits = (rows_with_gradient(x) for x in (student.dense.deltas, student.dense.logits))
    anchors = [x.reshape(-1, 4).numpy() for x in grids()(SIZES)]
    region = literal.vlr(anchors, np.array(BOXES[0]), 4, True) > 0
    expected = {
        "box_weight": positive,
        "region_weight": torch.stack([torch.from_numpy(region), torch.zeros(60).bool()]),
        "class_weight": torch.zeros_like(positive),
    }[part]
    assert (~expected).sum() > 0
    assert torch.equal(sides, expected)
    # The weight of the sides, a probability, teaches the logits nothing.
    assert torch.equal(logits, positive & (part == "class_weight"))


def test_classes_are_matched_by_name():
    student, teacher = heard()
    found = head_of(classes=("star", "hexagon", "circle"))(student, teacher)
    expected = expected_terms(student, teacher, columns=([0, 2], [2, 0]))
    assert found["loss_ld/cls"].item() == pytest.approx(10 * expected["loss_ld/cls"])
    assert found["loss_ld/box"].item() == pytest.approx(0.25 * expected["loss_ld/box"])


@pytest.mark.parametrize("boxes", [None, [[], []]])
def test_without_positives_the_zero_is_connected(boxes):
    student, teacher = heard(boxes, positives=())
    found = head_of()(student, teacher)
    zeros = {"loss_ld/box", "loss_ld/cls"} | (set() if boxes is None else {"loss_ld/region"})
    assert {k for k, v in found.items() if v == 0} == zeros
    sum(found[k] for k in zeros).backward()
    gradients = [x.grad for x in (*student.dense.deltas, *student.dense.logits)]
    assert all(x is not None and not x.any() for x in gradients)


def test_the_box_terms_grow_with_the_number_of_positives_and_the_class_term_does_not():
    """As released: only the class term is a mean."""
    same = heard(positives=[(20, 1)])
    twice = heard(positives=[(20, 1), (21, 1)])
    for x in (*same, *twice):
        for levels in (x.dense.logits, x.dense.deltas):
            levels[0].data[0, 21] = levels[0].data[0, 20]
    one, two = (head_of()(*x) for x in (same, twice))
    assert two["loss_ld/box"].item() == pytest.approx(2 * one["loss_ld/box"].item())
    assert two["loss_ld/cls"].item() == pytest.approx(one["loss_ld/cls"].item())


# ---- In a detector


def test_a_batch_without_any_box_trains():
    model = distilled("gfl", ["LD"])
    found = kd_losses(model, [image_dict(0, objects=0), image_dict(1, 96, 64, objects=0)])
    assert all(x == 0 for x in found.values())
    sum(found.values()).backward()
    assert all(p.grad is not None for p in model.student.head.parameters())


def test_the_students_own_candidates():
    """The candidates are those of the network, not of the config."""
    student = network_info("student", tiny_model("gfl", "MODEL.GFL.CANDIDATES", 5))
    assert LD(tiny_cfg("gfl"), student, network_info("teacher", tiny_model("gfl"))).candidates == 5


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        (("atss",), ("gfl",), "the student .ATSS. predicts no distributions of box sides"),
        (("gfl",), ("atss",), "the teacher .ATSS. predicts no distributions of box sides"),
        (("gfl",), ("gfl", "MODEL.GFL.REG_MAX", 8), "17 bins in the student, 9 in the teacher"),
        (("gfl",), ("gfl", "MODEL.GFL.ANCHOR_SIZE", 4.0), "anchors of level 0 differ"),
    ],
)
def test_what_cannot_be_compared(student, teacher, message):
    nets = (
        network_info("student", tiny_model(*student)),
        network_info("teacher", tiny_model(*teacher)),
    )
    assert re.search(message, LD.problem(*nets))

"""GID: which boxes are general instances, and what is compared of them, by plain loops."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import nn
from torchvision.ops import roi_align

from distill import losses
from distill.heads import GID
from distill.heads.classes import ClassMap
from distill.heads.dense import AnchorGrids
from distill.heads.fpn import Level
from distill.structures import DenseLayout, DenseOutputs
from tests.reference import literal_methods as literal
from tests.support.networks import (
    built_head,
    distilled,
    image_dict,
    kd_losses,
    network_info,
    outputs,
    outspoken_model,
    tiny_model,
)

# ---- General instances


def found(score, boxes, sizes=((100, 200),), **keys):
    """Wrap one list of boxes per image."""
    score, boxes = torch.tensor(score).float(), torch.tensor(boxes).float()
    boxes, valid = losses.general_instances(score, boxes, sizes, **keys)
    assert not boxes[~valid].any()
    assert all((x[:-1] >= x[1:]).all() for x in valid)  # those that there are come first
    return [x[v].tolist() for x, v in zip(boxes, valid)]


def literal_instances(score, boxes, size, number=10, candidates=3000):
    """Return the instances of one image."""
    kept: list[np.ndarray] = []
    for r in np.argsort(-score, kind="stable")[:candidates]:
        x1, x2 = np.clip(boxes[r, [0, 2]], 0, size[1])
        y1, y2 = np.clip(boxes[r, [1, 3]], 0, size[0])
        box = np.array([x1, y1, x2, y2])
        small = min(x2 - x1, y2 - y1) <= 10
        if len(kept) < number and not small and not (iou(box, kept) > 0.3).any():
            kept.append(box)
    return kept


def iou(box, others):
    """(P,) of a box with P others."""
    others = np.reshape(others, (-1, 4))
    first, last = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    both = (last - first).clip(0).prod(1)
    return both / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - both)


A, NEAR_A, B, C = [0, 0, 40, 40], [0, 0, 40, 50], [60, 0, 100, 40], [120, 20, 170, 90]


def test_the_best_of_overlapping_boxes_stays():
    assert found([[0.3, 0.9, 0.5]], [[A, NEAR_A, B]]) == [[NEAR_A, B]]
    assert found([[0.9, 0.3, 0.5]], [[A, NEAR_A, B]]) == [[A, B]]


def test_images_do_not_suppress_each_other():
    boxes = [[A, NEAR_A], [NEAR_A, A]]
    sizes = [(100, 200), (100, 200)]
    assert found([[0.9, 0.8], [0.9, 0.8]], boxes, sizes) == [[A], [NEAR_A]]


@pytest.mark.parametrize("side, kept", [(10, False), (10.5, True)])
def test_small_boxes_are_dropped(side, kept):
    for small in ([5, 5, 5 + side, 60], [5, 5, 60, 5 + side]):
        assert found([[0.9, 0.5]], [[small, C]]) == [[small, C] if kept else [C]]


def test_a_box_that_is_dropped_suppresses_nothing():
    small = [0, 0, 10, 12]
    inside = [0, 0, 11, 12]
    assert literal.plain_iou(small, inside) > 0.3
    assert found([[0.9, 0.5]], [[small, inside]]) == [[inside]]


def test_boxes_are_clipped_to_their_own_image():
    """A box in the padding of its image is too small after clipping."""
    boxes = [[[-20, -5, 30, 40], [110, 10, 260, 60]]] * 2
    assert found([[0.9, 0.5]] * 2, boxes, [(100, 200), (50, 115)]) == [
        [[0, 0, 30, 40], [110, 10, 200, 60]],
        [[0, 0, 30, 40]],
    ]


def test_the_first_of_an_image_are_kept():
    boxes = [[[20 * k, 0, 20 * k + 15, 15] for k in range(9)]]
    score = [[0.1, 0.9, 0.3, 0.8, 0.2, 0.5, 0.4, 0.7, 0.6]]
    order = np.argsort(score[0])[::-1]
    assert found(score, boxes, number=4) == [[boxes[0][k] for k in order[:4]]]
    assert found(score, boxes, number=9) == [[boxes[0][k] for k in order]]
    assert found(score, boxes, number=4, candidates=2) == [[boxes[0][k] for k in order[:2]]]


@pytest.mark.parametrize("boxes", [[[[0, 0, 5, 5]]], np.zeros((1, 0, 4))])
def test_there_may_be_none(boxes):
    boxes, valid = losses.general_instances(
        torch.ones(1, len(boxes[0])), torch.tensor(boxes).float(), [(64, 64)]
    )
    assert boxes.shape == (1, 10, 4) and valid.shape == (1, 10)
    assert not boxes.any() and not valid.any()


@pytest.mark.parametrize("seed", range(6))
def test_general_instances(seed):
    rng = np.random.default_rng(seed)
    score = rng.random((3, 60))
    first = rng.uniform(-20, 130, (3, 60, 2))
    boxes = np.concatenate([first, first + rng.uniform(1, 60, (3, 60, 2))], 2)
    sizes = [(100, 140), (60, 140), (100, 30)]
    keys = {"number": (3, 10, 40)[seed % 3], "candidates": (30, 3000)[seed % 2]}
    for own, s, b, size in zip(found(score, boxes, sizes, **keys), score, boxes, sizes):
        expected = literal_instances(s, b, size, **keys)
        assert len(own) == len(expected) > 0
        np.testing.assert_allclose(own, expected, rtol=1e-5)


# ---- Terms


@pytest.mark.parametrize("valid", [[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0] * 5, [1] * 5])
def test_rows_that_are_not_valid_count_nothing(valid):
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 3, 10, 10, generator=g).double()
    valid = torch.tensor(valid).bool()
    student[~valid] = teacher[~valid] = 7e3
    student.requires_grad_()
    for loss, shape in ((losses.gid_feature, (3, 10, 10)), (losses.gid_relation, (300,))):
        s, t = student.view(5, *shape), teacher.view(5, *shape)
        found, alone = loss(s, t, valid), loss(s[valid], t[valid])
        torch.testing.assert_close(found, alone)
        expected = getattr(literal, loss.__name__)(s[valid].detach().numpy(), t[valid].numpy())
        assert found.item() == pytest.approx(expected)
        (gradient,) = torch.autograd.grad(found, student)
        (own,) = torch.autograd.grad(alone, student)
        torch.testing.assert_close(gradient, own)


# ---- The head


CLASSES = ("circle", "square", "star")
CANVAS = (128, 160)
IMAGES = [(128, 160), (120, 128)]
SIZES = {"p2": (32, 40), "p3": (16, 20)}
STRIDES = {"p2": 4, "p3": 8}
FACTORS = {"feature_weight": 0.5, "relation_weight": 40.0, "class_weight": 0.1, "box_weight": 2.0}
LEVELS = [Level(n, n, STRIDES[n], STRIDES[n]) for n in SIZES]


def grids():
    """Two anchors a cell, of sides 4 and 16 cells."""
    sides = torch.tensor([4.0, 16.0])[:, None] * torch.tensor([-0.5, -0.5, 0.5, 0.5])
    cells = [sides * s for s in STRIDES.values()]
    return AnchorGrids(DenseLayout(False, [*SIZES], [*STRIDES.values()], cells, 0.5, (0.4, 0.5)))


def head_of(channels=(3, 3), shared_adapter=False, classes=CLASSES, **keys):
    torch.manual_seed(0)
    return GID(
        levels=LEVELS,
        channels=[channels] * 2,
        classes=ClassMap(CLASSES, classes),
        strides=[*STRIDES.values()],
        grids=grids(),
        threshold=0.5,
        shared_adapter=shared_adapter,
        **{**FACTORS, **keys},
    ).double()


def heard(channels=(3, 3), seed=0, numbers=4):
    """Return outputs of two networks with so many channels for two images, in float64.

    Args:
        numbers: how many encode a box.
    """
    g = torch.Generator().manual_seed(seed)
    instances = [Instances(size, gt_boxes=Boxes(torch.zeros(0, 4))) for size in IMAGES]
    anchors = torch.cat([x.flatten(0, 2) for x in grids()([*SIZES.values()])])
    rows = [2 * h * w for h, w in SIZES.values()]
    both = []
    for c in channels:
        maps = {n: torch.randn(2, c, *s, generator=g).double() for n, s in SIZES.items()}
        said = outputs(CANVAS, instances, **maps)
        logits, deltas = (
            torch.randn(2, sum(rows), k, generator=g).double().split(rows, 1) for k in (3, numbers)
        )
        said.dense = DenseOutputs([*logits], [*deltas], [*SIZES.values()])
        moved = anchors + 8 * torch.randn(2, sum(rows), 4, generator=g)
        said.dense_boxes = [*moved.split(rows, 1)]
        both.append(said)
        # The first instance: a large box on the coarser level, of which the teacher is sure.
        said.dense_boxes[1][0, 7] = torch.tensor([0.0, 0, 128, 126])
        said.dense.logits[1][0, 7] = 12.0 * len(both) - 18
    student = both[0]
    for x in (*student.features.values(), *student.dense.logits, *student.dense.deltas):
        x.requires_grad_()
    return both


def number(x):
    return x.detach().double().numpy()


def joined(levels):
    return number(torch.cat(levels, 1))


def encoded(net):
    """Return (N, R, 4) box deltas, or expected distances of (N, R, 4 · bins) distributions."""
    deltas = joined(net.dense.deltas)
    if deltas.shape[2] == 4:
        return deltas
    sides = np.exp(deltas.reshape(*deltas.shape[:2], 4, -1))
    return (sides / sides.sum(3, keepdims=True)) @ np.arange(sides.shape[3])


def crops(maps, boxes):
    """Return (K, C, 10, 10) crops of one image's boxes, each from the level of its size."""
    parts = []
    for box in boxes:
        side = np.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        name = "p3" if np.floor(4 + np.log2(side / 224)) >= 3 else "p2"
        where = torch.tensor(np.array([[0, *box]]))
        parts.append(roi_align(maps[name][None], where, 10, 1 / STRIDES[name], 2, aligned=True))
    return number(torch.cat(parts))


def expected_terms(head, student, teacher, columns=(slice(None), slice(None))):
    """Return the four parts without factors, and the instances of each image."""
    s, t = (joined(x.dense.logits)[..., c] for x, c in zip((student, teacher), columns))
    prob_s, prob_t = (literal.expit(x.max(2)) for x in (s, t))
    own, other = (joined(x.dense_boxes) for x in (student, teacher))
    boxes = np.where((prob_t > prob_s)[..., None], other, own)
    anchors = np.concatenate([number(x).reshape(-1, 4) for x in grids()([*SIZES.values()])])
    cropped, chosen, selected = ([], []), [], np.zeros(prob_s.shape, dtype=bool)
    for n, size in enumerate(IMAGES):
        instances = literal_instances(np.abs(prob_t - prob_s)[n], boxes[n], size)
        chosen.append(np.stack(instances))
        ours = {k: head.adapters[k](x)[n] for k, x in student.features.items()}
        theirs = {k: x[n] for k, x in teacher.features.items()}
        for parts, maps in zip(cropped, (ours, theirs)):
            parts.append(crops(maps, instances))
        for box in instances:
            near = iou(box, anchors)
            selected[n] |= (near >= 0.5) | (near == near.max())
    ours, theirs = (np.concatenate(x) for x in cropped)
    flat = (x.reshape(len(x), -1) for x in (ours, theirs))
    gap = np.abs(encoded(student) - encoded(teacher))
    terms = {
        "feature": literal.gid_feature(ours, theirs),
        "relation": literal.gid_relation(*flat),
        "cls": literal.bce(s, literal.expit(t)).sum(2)[selected].sum() / selected.sum(),
        "box": gap.sum(2)[selected].sum() / selected.sum(),
    }
    return terms, chosen


@pytest.mark.parametrize("numbers", [4, 20])
@pytest.mark.parametrize(
    "channels, shared", [((3, 3), False), ((3, 3), True), ((2, 3), False), ((2, 3), True)]
)
def test_the_four_terms(channels, shared, numbers):
    head = head_of(channels, shared, weight=3.0, distributions=numbers > 4)
    student, teacher = heard(channels, numbers=numbers)
    losses_found = head(student, teacher)
    terms, chosen = expected_terms(head, student, teacher)
    assert [len(x) for x in chosen] == [10, 10]
    factors = dict(zip(terms, FACTORS.values()))
    expected = {f"loss_gid/{k}": 3 * factors[k] * v for k, v in terms.items()}
    assert {k: v.item() for k, v in losses_found.items()} == pytest.approx(expected, rel=1e-5)
    sum(losses_found.values()).backward()
    for x in (*student.features.values(), *student.dense.logits, *student.dense.deltas):
        assert x.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())


def test_only_the_shared_classes_speak():
    head = head_of(classes=("star", "hexagon", "circle"))
    student, teacher = heard()
    columns = ([0, 2], [2, 0])
    terms, _ = expected_terms(head, student, teacher, columns)
    found = head(student, teacher)
    for (name, value), factor in zip(terms.items(), FACTORS.values()):
        assert found[f"loss_gid/{name}"].item() == pytest.approx(factor * value, rel=1e-5)


def test_no_instance_at_all_is_a_connected_zero():
    head, (student, teacher) = head_of((2, 3), True), heard((2, 3))
    for said in (student, teacher):
        said.dense_boxes = [torch.zeros_like(x) for x in said.dense_boxes]
    found = head(student, teacher)
    assert all(x == 0 for x in found.values())
    sum(found.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())
    assert all(x.grad is not None for x in student.features.values())


def test_fewer_than_three_instances_have_no_relation():
    head, (student, teacher) = head_of(), heard()
    big = torch.tensor([0.0, 0.0, 90.0, 90.0])
    for said in (student, teacher):  # one box per image
        said.dense_boxes = [big.expand(x.shape).clone() for x in said.dense_boxes]
    found = head(student, teacher)
    assert found["loss_gid/relation"] == 0
    assert all(found[f"loss_gid/{k}"] > 0 for k in ("feature", "cls", "box"))


def test_the_surer_network_gives_the_box():
    head, (student, teacher) = head_of(), heard()
    rows = student.dense.logits[0].shape[1]
    with torch.no_grad():
        for x in (*student.dense.logits, *teacher.dense.logits):
            x.fill_(-9.0)
        student.dense.logits[0][0, 3, 1] = 2.0  # the student is surer of a row of the first level
        teacher.dense.logits[1][0, 4, 2] = 1.0  # the teacher of one of the second
    own, other = torch.tensor([[5.0, 5, 45, 60], [80, 20, 150, 90]])
    student.dense_boxes[0][0, 3], teacher.dense_boxes[0][0, 3] = own, own + 11
    student.dense_boxes[1][0, 4], teacher.dense_boxes[1][0, 4] = other + 7, other
    assert rows > 4
    logits = [torch.cat(x.dense.logits, 1) for x in (student, teacher)]
    boxes, valid = head.instances(student, teacher, logits)
    assert valid[0, :2].all() and torch.equal(boxes[0, :2], torch.stack([own, other]))


# ---- Built from a config


def test_all_levels_share_one_3x3_adapter():
    head = built_head(GID, "retinanet", teacher_channels=24)
    assert len({id(x) for x in head.adapters.values()}) == 1
    assert head.adapters["p4"].weight.shape == (24, 16, 3, 3)
    assert len(list(head.parameters())) == 2
    assert list(head.adapters) == [level.student for level in head.levels]


@pytest.mark.parametrize("channels, parameters", [(16, 0), (24, 10)])
def test_as_released_only_other_channels_are_adapted(channels, parameters):
    opts = ("MODEL.DISTILL.GID.SHARED_ADAPTER", False)
    head = built_head(GID, "retinanet", *opts, teacher_channels=channels)
    assert len(list(head.parameters())) == parameters
    kinds = {nn.Identity} if channels == 16 else {nn.Conv2d}
    assert {type(x) for x in head.adapters.values()} == kinds


def test_levels_are_cropped_as_detectron2_assigns_them():
    head = built_head(GID, "retinanet")
    assert head.pooler.output_size == (10, 10)
    assert [x.spatial_scale for x in head.pooler.level_poolers] == [1 / 2**k for k in range(2, 7)]
    assert {x.sampling_ratio for x in head.pooler.level_poolers} == {2}
    assert all(x.aligned for x in head.pooler.level_poolers)


def test_the_students_matcher_gives_the_threshold():
    opts = ("MODEL.RETINANET.IOU_THRESHOLDS", [0.3, 0.6])
    student, teacher = tiny_model("retinanet", *opts), tiny_model("retinanet")
    head = distilled("retinanet", ["GID"], student=student, teacher=teacher).heads["GID"]
    assert head.threshold == 0.6


def test_instances_do_not_lie_in_the_padding():
    model = distilled("retinanet", ["GID"], teacher=outspoken_model("retinanet", seed=1, fpn=24))
    chosen = []
    head = model.heads["GID"]
    instances = head.instances
    head.instances = lambda *args: chosen.append(instances(*args)) or chosen[-1]
    kd_losses(model, [image_dict(0, 64, 128), image_dict(1, 128, 64, objects=0)])
    boxes, valid = chosen[0]
    assert valid.any(1).all()
    for own, there, (height, width) in zip(boxes, valid, [(64, 128), (128, 64)]):
        assert (own[there] <= torch.tensor([width, height] * 2)).all()


def test_encodings_that_differ_are_refused():
    gfl, atss = (network_info("student", tiny_model(family)) for family in ("gfl", "atss"))
    finer = network_info("teacher", tiny_model("gfl", "MODEL.GFL.REG_MAX", 7))
    assert GID.problem(gfl, finer) is None  # distances are comparable, however many bins
    assert "encode boxes" in GID.problem(gfl, atss) and "encode boxes" in GID.problem(atss, gfl)
    weights = ("MODEL.RETINANET.BBOX_REG_WEIGHTS", [10.0, 10.0, 5.0, 5.0])
    other = network_info("teacher", tiny_model("retinanet", *weights))
    assert "encode boxes" in GID.problem(network_info("student", tiny_model("retinanet")), other)
    faster = (
        network_info("student", tiny_model("faster")),
        network_info("teacher", tiny_model("faster")),
    )
    assert "RPN" in GID.problem(*faster)

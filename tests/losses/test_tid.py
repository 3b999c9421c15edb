"""Test TID: scores of points, the areas that they select, and the masked error."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from distill import losses
from distill.losses import (
    fitnet,
    matched_iou,
    tid,
    tid_by_value,
    tid_information,
    tid_mask,
    tid_score,
    tid_value,
)
from tests.reference import literal
from tests.support.cases import for_each

SIZES = [(1, 1), (1, 4), (3, 1), (4, 4), (5, 7), (8, 5)]
SCORES = (0.4, 0.6, 1.5, 2.0, 2.25, 3.0)  # all possible scores
NO_GT = torch.zeros(0, 4)
few_examples = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_boxes(rng, *shape, low=0.0, high=64.0):
    """Draw (..., 4) float32 boxes; some are a pixel or a point."""
    corner = rng.uniform(low, high, (*shape, 2))
    size = rng.choice([0.0, 1.0, 12.0, 40.0], (*shape, 1)) * rng.uniform(0.7, 1.3, (*shape, 2))
    return torch.from_numpy(np.concatenate([corner, corner + size], -1)).float()


def disjoint_boxes(count):
    """Return (count, 4) boxes that do not overlap."""
    x = 10.0 * torch.arange(count)
    return torch.stack([x, 0 * x, x + 8, 0 * x + 8], 1)


def doubles(*tensors):
    return [x.double().numpy() for x in tensors]


def image(seed, points=60, anchors=2, objects=3):
    """Return (P, A, 4) decoded boxes, ground truth and (P,) probabilities: hits and misses."""
    rng = np.random.default_rng(seed)
    gt = draw_boxes(rng, objects)
    gt[:1] = torch.tensor([10.0, 10, 60, 40])
    decoded = draw_boxes(rng, points, anchors)
    hits = torch.from_numpy(rng.random((points, anchors)) < 0.5)
    if objects:
        near = gt[torch.from_numpy(rng.integers(0, objects, (points, anchors)))]
        near = near + torch.from_numpy(rng.normal(0, 3, near.shape)).float()
        near[..., 2:] = torch.maximum(near[..., 2:], near[..., :2])
        decoded = torch.where(hits[..., None], near, decoded)
    iou, _, _ = matched_iou(decoded, gt)
    prob = torch.from_numpy(rng.uniform(0, 1, points)).float() * (iou > 0)
    return decoded, gt, prob


# DIEM: matched_iou, tid_score


def test_matched_iou_by_hand():
    gt = torch.tensor([[0.0, 0, 10, 10], [20.0, 0, 30, 10]])
    boxes = torch.tensor(
        [
            [[0.0, 0, 10, 5], [20.0, 0, 28, 10]],  # IoU 1/2 with the first box, 0.8 with the second
            [[5.0, 0, 15, 10], [50.0, 0, 60, 10]],  # IoU 50/150 and 0
            [[10.0, 0, 20, 10], [40.0, 0, 41, 1]],  # touches both boxes; IoU 0
        ]
    )
    iou, match, anchor = matched_iou(boxes, gt)
    torch.testing.assert_close(iou, torch.tensor([0.8, 1 / 3, 0.0]))
    assert match.tolist() == [1, 0, 0]
    assert anchor[:2].tolist() == [1, 0]


@for_each("seed", range(20))
def test_matched_iou_equals_the_literal_form(seed):
    rng = np.random.default_rng(seed)
    points, anchors, objects = (1, 7, 30)[seed % 3], 1 + seed % 4, (1, 2, 9, 20)[seed % 4]
    boxes = draw_boxes(rng, points, anchors)
    gt = draw_boxes(rng, objects, low=-40.0, high=100.0)  # also outside the image
    iou, match, anchor = matched_iou(boxes, gt)
    expected = literal.matched_iou(*doubles(boxes, gt))
    assert iou.dtype == torch.float32
    np.testing.assert_allclose(iou, expected, rtol=1e-5, atol=1e-6)
    for p, (m, a) in enumerate(zip(match.tolist(), anchor.tolist())):
        reached = literal.box_iou(*doubles(boxes[p, a], gt[m]))
        np.testing.assert_allclose(reached, expected[p], rtol=1e-5, atol=1e-6)


def test_matched_iou_with_500_objects():
    rng = np.random.default_rng(0)
    boxes = draw_boxes(rng, 40, 3, high=600.0)
    gt = draw_boxes(rng, 500, high=600.0)
    iou, match, anchor = matched_iou(boxes, gt)
    pairs = box_iou(boxes.flatten(0, 1).double(), gt.double()).nan_to_num(0.0).view(40, 3, 500)
    torch.testing.assert_close(iou.double(), pairs.amax((1, 2)), rtol=1e-5, atol=1e-6)
    rows = torch.arange(40)
    torch.testing.assert_close(pairs[rows, anchor, match], iou.double(), rtol=1e-5, atol=1e-6)
    assert match.max() > 400  # the best is not always among the first
    assert (iou == 0).any() and (match[iou == 0] == 0).all()


def test_without_ground_truth_nothing_matches():
    iou, match, anchor = matched_iou(draw_boxes(np.random.default_rng(0), 5, 2), NO_GT)
    assert iou.tolist() == [0] * 5
    assert (match.shape, anchor.shape) == ((5,), (5,))
    assert (match == 0).all() and ((anchor >= 0) & (anchor < 2)).all()


@few_examples
@given(seeds)
def test_matched_iou_does_not_know_an_order(seed):
    rng = np.random.default_rng(seed)
    boxes, gt = draw_boxes(rng, 9, 3), draw_boxes(rng, 11)
    iou = matched_iou(boxes, gt)[0]
    order = rng.permutation(9)
    assert torch.equal(matched_iou(boxes[order], gt)[0], iou[order])
    assert torch.equal(matched_iou(boxes, gt[rng.permutation(11)])[0], iou)
    assert torch.equal(matched_iou(boxes[:, rng.permutation(3)], gt)[0], iou)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [3.0, 2.0, 1.5, 0.4, 0.4]),
        ({"parts": "reg"}, [2.0, 2.0, 1.5, 0.4, 0.4]),
        ({"parts": "cls"}, [1.5, 1.0, 1.0, 1.0, 1.0]),
        ({"top": 0.5}, [3.0, 3.0, 2.25, 0.4, 0.4]),
        ({"top": 1.0}, [3.0, 3.0, 2.25, 0.4 * 1.5, 0.4]),  # p = 0 is never in the top
        ({"raw_iou": True}, [0.9 * 1.5, 0.5, 0.45, 0.4, 0.0]),
        ({"raw_iou": True, "parts": "reg"}, [0.9, 0.5, 0.45, 0.4, 0.0]),
    ],
    ids=str,
)
def test_score_by_hand(options, expected):
    iou = torch.tensor([0.9, 0.5, 0.45, 0.4, 0.0])  # the thresholds themselves: 0.5 and 0.4
    prob = torch.tensor([0.8, 0.7, 0.6, 0.5, 0.0])
    found = tid_score(iou, prob, 0.5, 0.4, **options)
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(
    "points, top, count",
    [(1, 0.025, 1), (39, 0.025, 1), (40, 0.025, 1), (41, 0.025, 2), (120, 0.025, 3), (7, 0.3, 3)],
)
def test_size_of_the_top(points, top, count):
    prob = torch.rand(points, generator=generator()) + 0.1
    score = tid_score(torch.zeros(points), prob, 0.5, 0.4, top, parts="cls")
    chosen = score == 1.5
    assert chosen.sum() == count
    assert points == count or prob[chosen].min() > prob[~chosen].max()


def test_equal_probabilities_go_by_iou_and_then_by_position():
    prob = torch.tensor([0.2, 0.9, 0.9, 0.9, 0.1])
    for iou, expected in (
        ([0.0] * 5, [1, 1.5, 1, 1, 1]),
        ([0.9, 0.1, 0.3, 0.2, 0.9], [1, 1, 1.5, 1, 1]),
    ):
        score = tid_score(torch.tensor(iou), prob, 0.5, 0.4, parts="cls")
        assert score.tolist() == expected


@for_each("seed", range(20))
@pytest.mark.parametrize("parts", ["both", "cls", "reg"])
@pytest.mark.parametrize("raw_iou", [False, True])
def test_score_equals_the_literal_form(seed, parts, raw_iou):
    rng = np.random.default_rng(seed)
    points = (1, 3, 40, 41, 200)[seed % 5]
    iou = torch.from_numpy(rng.uniform(0, 1, points) * (rng.random(points) < 0.6)).float()
    prob = torch.from_numpy(rng.integers(0, 9, points) / 8).float() * (iou > 0)
    options = (*((0.5, 0.4), (0.7, 0.3))[seed % 2], (0.025, 0.2)[seed % 2], parts, raw_iou)
    found = tid_score(iou, prob, *options)
    np.testing.assert_allclose(found, literal.tid_score(*doubles(iou, prob), *options), rtol=1e-6)


def test_an_image_without_objects_scores_alike_everywhere():
    iou = matched_iou(draw_boxes(np.random.default_rng(0), 50, 2), NO_GT)[0]
    assert (tid_score(iou, torch.zeros(50), 0.5, 0.4) == 0.4).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"parts": "iou"}, "parts must be one of both, cls, reg, got 'iou'"),
        ({"top": 0.0}, r"top must be in \(0, 1\], got 0.0"),
        ({"top": 1.5}, r"top must be in \(0, 1\], got 1.5"),
        ({"positive": 0.3}, "positive 0.3 is below negative 0.4"),
    ],
)
def test_score_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        tid_score(torch.ones(3), torch.ones(3), **{"positive": 0.5, "negative": 0.4, **options})


# LDAM: tid_value


def test_value_by_hand():
    # k = 2 of 5. The key area has the scores 3 and, by the tie-break, the second 2. The weak area
    # has the gains 2.6 and 1.6.
    teacher = torch.tensor([2.0, 3.0, 2.0, 2.0, 0.4])
    student = torch.tensor([0.4, 0.4, 2.0, 1.5, 0.6])
    tie = torch.tensor([0.3, 0.1, 0.7, 0.6, 0.9])
    arguments = (teacher, student, tie, disjoint_boxes(5), 0.4)
    for area, expected in {
        "both": [0.0, 4.5, 2.0, 0.0, 0.0],
        "key": [0.0, 3.0, 2.0, 0.0, 0.0],
        "weak": [1.5, 1.5, 1.0, 1.0, 1.0],
    }.items():
        assert tid_value(*arguments, area=area, outside_key="zero").tolist() == expected
    # Outside the key area a score counts, up to 1.
    kept = torch.tensor([1.5, 4.5, 2.0, 1.0, 0.4])
    torch.testing.assert_close(tid_value(*arguments), kept)


@pytest.mark.parametrize(
    "tie, expected",
    [
        ([0.0, 0.0, 0.0, 0.0], [1, 1, 0, 0]),  # equal ties: the lower index wins
        ([0.1, 0.2, 0.3, 0.2], [0, 1, 1, 0]),
        ([0.1, 0.1 + 1e-6, 0.1 + 2e-6, 0.1], [0, 1, 1, 0]),
    ],
)
@pytest.mark.parametrize("area", ["key", "weak"])
def test_ties_are_broken_exactly(tie, expected, area):
    score = torch.full((4,), 2.0)
    student = torch.full((4,), 0.4)
    options = {"area": area, "outside_key": "zero"}
    found = tid_value(score, student, torch.tensor(tie), disjoint_boxes(4), 0.5, **options)
    assert (found > 1).int().tolist() == expected


def test_a_tie_break_never_outranks_the_score():
    teacher = torch.tensor([0.5, 0.5 + 1e-6, 0.5 + 2e-6, 0.0])  # raw IoUs may be this close
    tie = torch.tensor([1.0, 0.5, 0.0, 1.0])
    for area in ("key", "weak"):
        options = {"area": area, "outside_key": "zero"}
        found = tid_value(teacher, torch.zeros(4), tie, disjoint_boxes(4), 0.5, **options)
        chosen = found > (1 if area == "weak" else 0)
        assert chosen.tolist() == [False, True, True, False]


def test_points_where_the_student_is_as_good_are_not_weak():
    teacher, student = torch.tensor([[2.0, 0.4, 3.0, 1.5], [2.0, 0.6, 1.5, 2.0]])
    found = tid_value(teacher, student, torch.ones(4), disjoint_boxes(4), 1.0, area="weak")
    assert found.tolist() == [1, 1, 1.5, 1]


def test_one_object_does_not_take_the_whole_weak_area():
    # 30 points decode the same large object and gain more than the point of the small one.
    rng = np.random.default_rng(0)
    large = torch.tensor([0.0, 0, 100, 100]) + torch.from_numpy(rng.uniform(-2, 2, (30, 4)))
    boxes = torch.cat([large.float(), torch.tensor([[200.0, 0, 220, 20]])])
    teacher = torch.tensor([3.0] * 30 + [2.0])
    tie = torch.from_numpy(rng.uniform(0, 1, 31)).float()
    arguments = (teacher, torch.full((31,), 0.4), tie, boxes, 0.05)  # k = 2

    def weak(nms_iou):
        found = tid_value(*arguments, nms_iou=nms_iou, area="weak")
        return set((found == 1.5).nonzero()[:, 0].tolist())

    best, second = tie[:30].argsort(descending=True)[:2].tolist()
    assert weak(0.6) == {best, 30}
    assert weak(1.0) == {best, second}  # without suppression


@pytest.mark.parametrize("side, survives", [(50.0, True), (70.0, False)])
def test_boxes_below_the_iou_of_the_nms_survive(side, survives):
    boxes = torch.tensor([[0.0, 0, 100, 10], [0.0, 0, side, 10]])  # IoU = side / 100
    found = tid_value(torch.tensor([3.0, 2]), torch.zeros(2), torch.zeros(2), boxes, 1.0)
    assert found.tolist() == [4.5, 3.0 if survives else 2.0]


def test_at_most_2000_candidates_enter_the_nms():
    points, k = 50_000, 2_500
    gain = torch.zeros(points)
    gain[torch.randperm(points, generator=generator())[:2_300]] = 1 + torch.arange(2_300) / 1024
    found = tid_value(gain, torch.zeros(points), gain, disjoint_boxes(points), 0.05, area="weak")
    assert k > 2_300
    assert torch.equal(found == 1.5, gain > gain.sort(descending=True).values[2_000])


@pytest.mark.parametrize("area", ["both", "key", "weak"])
@pytest.mark.parametrize("kind", ["scores", "raw"])
@for_each("seed", range(20))
def test_value_equals_the_literal_form(seed, kind, area):
    rng = np.random.default_rng(seed)
    points = (1, 2, 19, 20, 21, 77)[seed % 6]
    if kind == "scores":
        scores = rng.choice(SCORES, (2, points))
    else:  # IoUs, many of them 0
        scores = rng.uniform(0, 1, (2, points)) * (rng.random((2, points)) < 0.5)
    teacher, student = torch.from_numpy(scores).float()
    tie = torch.from_numpy(rng.integers(0, 4, points) / 4).float()
    boxes = draw_boxes(rng, points, high=20.0)
    options = ((0.05, 0.2, 1.0)[seed % 3], (0.6, 0.3)[seed % 2], area, ("keep", "zero")[seed % 2])
    found = tid_value(teacher, student, tie, boxes, *options)
    expected = literal.tid_value(*doubles(teacher, student, tie, boxes), *options)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@few_examples
@given(st.lists(st.sampled_from(SCORES), min_size=1, max_size=60), st.sampled_from([0.05, 0.2, 1]))
def test_the_key_area_has_exactly_k_points(scores, gamma):
    score, tie = torch.tensor(scores), torch.zeros(len(scores))
    boxes = disjoint_boxes(len(scores))
    found = tid_value(score, score, tie, boxes, gamma, outside_key="zero")
    k = math.ceil(round(gamma * len(scores), 9))
    assert (found > 0).sum() == k
    assert sorted(found[found > 0].tolist()) == sorted(score.tolist())[-k:]


@few_examples
@given(st.lists(st.tuples(*[st.sampled_from(SCORES)] * 2), min_size=1, max_size=40), seeds)
def test_value_moves_with_its_points(scores, seed):
    rng = np.random.default_rng(seed)
    teacher, student = torch.tensor(scores).unbind(1)
    tie = torch.from_numpy(rng.permutation(len(scores))).float()  # distinct: no index decides
    arguments = teacher, student, tie, draw_boxes(rng, len(scores), high=20.0)
    order = rng.permutation(len(scores))
    for area in ("both", "key", "weak"):
        expected = tid_value(*arguments, gamma=0.2, area=area)[order]
        found = tid_value(*(x[order] for x in arguments), gamma=0.2, area=area)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"outside_key": "one"}, "outside_key must be keep or zero, got 'one'"),
        ({"area": "all"}, "area must be one of both, key, weak, got 'all'"),
        ({"gamma": 0.0}, r"gamma must be in \(0, 1\], got 0.0"),
        ({"gamma": 2.0}, r"gamma must be in \(0, 1\], got 2.0"),
    ],
)
def test_value_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        tid_value(torch.ones(3), torch.ones(3), torch.ones(3), disjoint_boxes(3), **options)


# SFDM: tid_information, tid_mask, tid


@pytest.mark.parametrize(
    "point, expected",
    [
        ((4, 2), 1),  # inside
        ((8, 2), 1),  # on the border
        ((10, 2), 0.5),  # a quarter of the width away
        ((-1, 2), 0.75),
        ((4, 5), 0.5),  # a quarter of the height away
        ((12, 2), 0),
        ((4, -3), 0),
        ((10, 5), 1 - math.hypot(0.5, 0.5)),  # off a corner
        ((11, 5.5), 0),  # within the band in each direction, but not in both together
    ],
)
def test_information_by_hand(point, expected):
    box = torch.tensor([[0.0, 0, 8, 4]])
    found = tid_information(torch.tensor([point], dtype=torch.float32), box)
    torch.testing.assert_close(found, torch.tensor([float(expected)]))


@pytest.mark.parametrize(
    "gt, expected",
    [
        (NO_GT, [0, 0, 0]),
        (torch.tensor([[-30.0, 0, -10, 9]]), [0.5, 0, 0]),  # only its band
        (torch.tensor([[5.0, 5, 6, 6]]), [0, 1, 0]),  # a pixel
        (torch.tensor([[6.0, 6, 6, 6]]), [0, 1, 0]),  # a point
        (torch.tensor([[6.25, 6, 6.25, 6]]), [0, 0.5, 0]),  # a band as wide as that of a pixel
        (torch.tensor([[5.0, 5, 7, 7], [11.0, 0, 13, 9], [-9.0, -9, 9, 9]]), [1, 1, 1]),
    ],
    ids=["none", "outside", "pixel", "point", "near a point", "several"],
)
def test_information_of_special_boxes(gt, expected):
    points = torch.tensor([[-5.0, 5], [6, 6], [12, 6]])
    torch.testing.assert_close(tid_information(points, gt), torch.tensor(expected).float())


@for_each("seed", range(20))
def test_information_equals_the_literal_form(seed):
    rng = np.random.default_rng(seed)
    points = torch.from_numpy(rng.uniform(-10, 80, ((1, 5, 60)[seed % 3], 2))).float()
    gt = draw_boxes(rng, (1, 3, 10, 30)[seed % 4])
    found = tid_information(points, gt)
    expected = literal.tid_information(*doubles(points, gt))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert found.min() >= 0 and found.max() <= 1
    shuffled = gt[rng.permutation(len(gt))]
    assert torch.equal(tid_information(points, shuffled), found)


def test_information_of_500_boxes():
    rng = np.random.default_rng(0)
    points = torch.from_numpy(rng.uniform(0, 900, (100, 2))).float()
    gt = draw_boxes(rng, 500, high=900.0)
    expected = literal.tid_information(*doubles(points, gt))
    np.testing.assert_allclose(tid_information(points, gt), expected, rtol=1e-5, atol=1e-5)


def test_mask_by_hand():
    value = torch.tensor([4.5, 1.0, 0.999, 0.01, 0.0099, 0.0])
    expected = torch.tensor([4.5, 1.0, 0.6993, 0.007, 0.000495, 0.0])
    torch.testing.assert_close(tid_mask(value), expected)
    assert tid_by_value(value, 3.0, 2.0, 0.5).tolist() == [3, 3, 2, 2, 0.5, 0.5]


@for_each("seed", range(20))
def test_mask_equals_the_literal_form(seed):
    value = 10 ** torch.empty(3, 5).uniform_(-4, 1, generator=generator(seed))
    flat = value.double().numpy().ravel()
    np.testing.assert_allclose(tid_mask(value).ravel(), literal.tid_mask(flat), rtol=1e-6)
    found = tid_by_value(value, 1.0, 0.0, 2.5)
    assert found.ravel().tolist() == literal.tid_by_value(flat, 1.0, 0.0, 2.5).tolist()


def test_loss_by_hand():
    # Gaps (2, 0) and (1, 3) in two channels: squares 4 + 1 and 0 + 9, weighed by 0.5 and 3.
    student = torch.tensor([[[[2.0, 0.0]], [[1.0, 3.0]]]])
    numerator, mass = tid(student, torch.zeros_like(student), torch.tensor([[[0.5, 3.0]]]))
    torch.testing.assert_close(numerator, torch.tensor((0.5 * 5 + 3 * 9) / 2))
    torch.testing.assert_close(mass, torch.tensor(3.5))
    # α weighs the sums of the areas, not the normalizer.
    alpha = torch.tensor([[[4.0, 0.0]]])
    numerator, mass = tid(student, torch.zeros_like(student), torch.tensor([[[0.5, 3.0]]]), alpha)
    torch.testing.assert_close(numerator, torch.tensor(4 * 0.5 * 5 / 2))
    torch.testing.assert_close(mass, torch.tensor(3.5))


@for_each("seed", range(24))
def test_loss_equals_the_literal_form(seed):
    rng = np.random.default_rng(seed)
    shape = (1 + seed % 3, 1 + seed % 4, *SIZES[seed % len(SIZES)])
    student, teacher = torch.from_numpy(rng.normal(0, 2, (2, *shape))).float()
    mask = torch.from_numpy(rng.uniform(0, 4, (shape[0], *shape[2:]))).float()
    alpha = torch.from_numpy(rng.choice([0.0, 0.5, 2.0], mask.shape)).float()
    for options in ((), (alpha,)):
        found = [x.item() for x in tid(student, teacher, mask, *options)]
        expected = literal.tid(*doubles(student, teacher, mask, *options))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_gradient():
    student, teacher = torch.randn((2, 2, 3, 2, 3), generator=generator(), dtype=torch.float64)
    mask = torch.rand((2, 2, 3), generator=generator(), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: tid(s, teacher, mask)[0], student.requires_grad_())


def test_a_uniform_mask_is_plain_feature_distillation():
    student, teacher = torch.randn((2, 2, 3, 4, 5), generator=generator())
    for weight in (1.0, 0.02):
        numerator, mass = tid(student, teacher, torch.full((2, 4, 5), weight))
        torch.testing.assert_close(numerator / mass, fitnet(student, teacher))


def test_zero_mass_is_a_connected_zero():
    student, teacher = torch.randn((2, 2, 3, 4, 5), generator=generator())
    student.requires_grad_()
    numerator, mass = tid(student, teacher, torch.zeros(2, 4, 5))
    numerator.backward()
    assert (numerator.item(), mass.item()) == (0, 0)
    assert student.grad is not None and (student.grad == 0).all()


def test_equal_maps_give_zero_and_keep_the_mass():
    x = torch.randn((2, 3, 4, 5), generator=generator())
    mask = torch.rand((2, 4, 5), generator=generator())
    numerator, mass = tid(x, x.clone(), mask)
    assert numerator == 0
    torch.testing.assert_close(mass, mask.sum())


def test_only_the_maps_carry_a_gradient():
    boxes, gt, prob = (x.requires_grad_() for x in image(0))
    iou, _, _ = matched_iou(boxes, gt)
    u = torch.rand(60, generator=generator(), requires_grad=True)
    score = tid_score(u, prob, 0.5, 0.4)
    raw = tid_score(u, prob, 0.5, 0.4, raw_iou=True)
    s, t = torch.rand((2, 60), generator=generator(1), requires_grad=True)
    value = tid_value(t, s, prob, boxes[:, 0])
    information = tid_information(boxes[:, 0, :2], gt)
    mask = tid_mask(u)
    for x in (iou, score, raw, value, information, mask):
        assert not x.requires_grad

    student, teacher = torch.randn((2, 1, 2, 6, 10), generator=generator())
    numerator, mass = tid(student.requires_grad_(), teacher, u.view(1, 6, 10))
    assert not mass.requires_grad
    on_student, on_mask = torch.autograd.grad(numerator, (student, u), allow_unused=True)
    assert on_mask is None and on_student.any()


def focus(library, iou_t, iou_s, prob_t, prob_s, boxes, points, gt):
    """Return M of one image with the package's functions or with the literal ones."""
    score_t = library.tid_score(iou_t, prob_t, 0.5, 0.4)
    score_s = library.tid_score(iou_s, prob_s, 0.5, 0.4)
    value = library.tid_value(score_t, score_s, iou_t * prob_t, boxes, gamma=0.2)
    return library.tid_mask(value * library.tid_information(points, gt))


def scene(seed, skill):
    """Return IOU_max, probabilities, decoded boxes, centres and ground truth of a pyramid.

    Args:
        skill: in (0, 1]; how near the decoded boxes come to the objects.
    """
    rng = np.random.default_rng(seed)
    size = rng.uniform(20, 120, (rng.integers(1, 5), 2))
    corner = rng.uniform(0, 256 - size)
    gt = torch.from_numpy(np.concatenate([corner, corner + size], 1)).float()
    points = []
    for stride in (8, 16, 32):
        cells = torch.meshgrid(*[torch.arange(256 // stride)] * 2, indexing="xy")
        points.append((torch.stack(cells, -1).view(-1, 2) + 0.5) * stride)
    points = torch.cat(points)
    inside = tid_information(points, gt) == 1
    nearest = (points[:, None] - (gt[:, :2] + gt[:, 2:])[None] / 2).norm(dim=2).argmin(1)
    sides = (gt[:, 2:] - gt[:, :2])[nearest].repeat(1, 2)
    noise = torch.from_numpy(rng.normal(0, 0.5 / skill, (len(points), 4))).float()
    boxes = gt[nearest] + noise * sides * torch.where(inside, 0.3, 1.0)[:, None]
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2])
    iou = matched_iou(boxes[:, None], gt)[0]
    prob = (iou * torch.from_numpy(rng.uniform(0.5, 1, len(points))).float()) * (iou > 0)
    return iou, prob, boxes, points, gt


@for_each("seed", range(20))
def test_every_point_of_an_object_is_compared(seed):
    """The high and medium areas hold at least a twentieth each of the points at objects."""
    iou_t, prob_t, boxes, points, gt = scene(seed, 1.0)
    iou_s, prob_s, *_ = scene(seed, 0.5)
    score_t, score_s = tid_score(iou_t, prob_t, 0.5, 0.4), tid_score(iou_s, prob_s, 0.5, 0.4)
    information = tid_information(points, gt)

    def compared(outside_key):
        value = tid_value(score_t, score_s, iou_t * prob_t, boxes, outside_key=outside_key)
        return value * information

    value = compared("keep")
    assert (tid_mask(value)[information == 1] > 0).all()
    near = value[information > 0]
    assert (near >= 1).float().mean() > 0.05
    assert ((near >= 0.01) & (near < 1)).float().mean() > 0.05
    assert (tid_mask(compared("zero"))[information == 1] == 0).float().mean() > 0.3


@pytest.mark.parametrize("objects", [0, 1, 4])
@for_each("seed", range(7))
def test_one_image_from_boxes_to_loss(seed, objects):
    height, width = 6, 10
    decoded_t, gt, prob_t = image(seed, height * width, objects=objects)
    decoded_s = decoded_t + torch.randn(decoded_t.shape, generator=generator(seed)).cumsum(-1)
    cells = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    points = torch.stack(cells, -1).view(-1, 2) * 8.0 + 4
    maps = torch.randn((2, 1, 3, height, width), generator=generator(seed))

    (iou_t, _, anchor), (iou_s, _, _) = (matched_iou(x, gt) for x in (decoded_t, decoded_s))
    prob_s = prob_t.flip(0) * (iou_s > 0)
    boxes = decoded_t[torch.arange(len(anchor)), anchor]
    mask = focus(losses, iou_t, iou_s, prob_t, prob_s, boxes, points, gt)
    found = [x.item() for x in tid(*maps, mask.view(1, height, width))]

    ious = [literal.matched_iou(*doubles(x, gt)) for x in (decoded_t, decoded_s)]
    expected = focus(literal, *ious, *doubles(prob_t, prob_s, boxes, points, gt))
    np.testing.assert_allclose(mask, expected, rtol=1e-5, atol=1e-6)
    assert expected.any() == (objects > 0)
    expected = literal.tid(*doubles(*maps), expected.reshape(1, height, width))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

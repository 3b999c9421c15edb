"""Test multi-scale self-distillation: the squared error and the soft masks of boxes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import gaussian_mask, mssd
from tests.reference import literal
from tests.support.cases import for_each

SIZES = [(1, 1), (1, 7), (6, 1), (4, 4), (7, 9), (8, 5)]
STRIDES = (4, 8, 16, 32)
few_examples = settings(max_examples=40, deadline=None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_boxes(rng, count, height, width, stride):
    """Draw (K, 4) float32 boxes: ordinary, below a cell, below a pixel, outside, aligned."""
    padded_size = np.array([width, height]) * stride
    centre = rng.uniform(-0.2, 1.2, (count, 2)) * padded_size
    size = rng.choice([0.0, 0.4, 1.0, 0.5 * stride, 2 * stride, padded_size.max()], (count, 2))
    size = size * rng.uniform(0.8, 1.2, (count, 2))
    boxes = np.concatenate([centre - size / 2, centre + size / 2], 1)
    aligned = rng.random(count) < 0.3  # edges on centres and borders of cells
    boxes[aligned] = np.round(boxes[aligned] / (stride / 2)) * (stride / 2)
    return torch.from_numpy(boxes).float()


def test_value_by_hand():
    student = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    teacher = torch.tensor([[[[0.0, 2.0]], [[5.0, 1.0]]]])
    assert mssd(student, teacher) == (1 + 0 + 4 + 9) / 4


@for_each("seed", range(24))
def test_equals_the_literal_form(seed):
    rng = np.random.default_rng(seed)
    shape = (1 + seed % 3, 1 + seed % 4, *SIZES[seed % len(SIZES)])
    student, teacher = rng.normal(1, 2, (2, *shape)).astype(np.float32)
    found = mssd(torch.from_numpy(student), torch.from_numpy(teacher))
    expected = literal.mssd(student.astype(float), teacher.astype(float))
    np.testing.assert_allclose(found.item(), expected, rtol=1e-5)


def test_gradient():
    student, teacher = torch.randn((2, 2, 3, 2, 3), generator=generator(), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: mssd(s, teacher), student.requires_grad_())


def test_the_teacher_is_the_same_network_and_gets_no_gradient():
    deep, shallow = (
        x.requires_grad_() for x in torch.randn((2, 2, 3, 4, 5), generator=generator())
    )
    on_deep, on_shallow = torch.autograd.grad(
        mssd(deep, shallow), (deep, shallow), allow_unused=True
    )
    assert on_shallow is None or not on_shallow.any()
    torch.testing.assert_close(on_deep, 2 * (deep - shallow).detach() / deep.numel())


def test_mask_by_hand():
    # The cell centres are 4, 12, 20, 28. The box reaches from the first to the third: exp(-1/σ²).
    edge, off = math.exp(-0.5), 0.0
    profile = torch.tensor([edge, 1, edge, off])
    square, flat = torch.tensor([[4.0, 4, 20, 20]]), torch.tensor([[4.0, 8, 20, 16]])
    found = gaussian_mask([square, flat], 4, 4, 8)
    torch.testing.assert_close(found[0], profile[:, None] * profile)
    torch.testing.assert_close(found[1], torch.tensor([off, 1, off, off])[:, None] * profile)


@pytest.mark.parametrize(
    "options, edge",
    [
        ({"sigma2": 0.5}, math.exp(-2)),
        ({"sigma2": 4.0}, math.exp(-0.25)),
        ({"binary": True}, 1.0),
        ({"binary": True, "sigma2": 0.5}, 1.0),
    ],
)
def test_width_of_the_bell_by_hand(options, edge):
    (found,) = gaussian_mask([torch.tensor([[4.0, 4, 20, 20]])], 4, 4, 8, **options)
    profile = torch.tensor([edge, 1, edge, 0])
    torch.testing.assert_close(found, profile[:, None] * profile)


@for_each("seed", range(36))
@for_each("binary", [False, True])
def test_mask_equals_the_literal_form(seed, binary):
    rng = np.random.default_rng(seed)
    (height, width), stride = SIZES[seed % len(SIZES)], STRIDES[seed % 4]
    boxes = [draw_boxes(rng, count, height, width, stride) for count in (seed % 7, 0, 3)]
    sigma2 = (2.0, 0.3, 7.0)[seed % 3]
    found = gaussian_mask(boxes, height, width, stride, sigma2, binary)
    expected = literal.gaussian_mask(
        [x.double().numpy() for x in boxes], height, width, stride, sigma2, binary
    )
    assert found.shape == (3, height, width)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sigma2", [0.0, -1.0])
def test_sigma2_out_of_range(sigma2):
    with pytest.raises(ValueError, match=f"sigma2 must be above 0, got {sigma2}"):
        gaussian_mask([torch.zeros(0, 4)], 4, 4, 8, sigma2)


def test_500_boxes_in_one_image():
    boxes = draw_boxes(np.random.default_rng(0), 500, 9, 12, 16)
    (found,) = gaussian_mask([boxes], 9, 12, 16)
    (expected,) = literal.gaussian_mask([boxes.double().numpy()], 9, 12, 16)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@for_each("side", range(4))
@for_each("seed", range(10))
def test_all_four_edges_belong_to_the_box(side, seed):
    # One edge is on a cell centre, the others are anywhere. Rounding must not move the edge.
    corner = torch.rand(4, generator=generator(seed))
    box = torch.tensor([20.0, 20, 80, 80]) + 9 * corner
    box[side] = (20.0, 20.0, 84.0, 84.0)[side]
    (found,) = gaussian_mask([box[None]], 12, 12, 8)
    (expected,) = literal.gaussian_mask([box[None].double().numpy()], 12, 12, 8)
    np.testing.assert_array_equal(found.numpy() > 0, expected > 0)


@pytest.mark.parametrize(
    "box, cell",
    [
        ((21.0, 5.0, 22.0, 6.0), (0, 2)),  # a pixel
        ((21.5, 5.5, 21.5, 5.5), (0, 2)),  # a point
        ((12.0, 20.0, 12.0, 20.0), (2, 1)),  # a point on a cell centre
        ((9.0, 17.0, 11.5, 19.5), (2, 1)),  # larger than a pixel, between cell centres
        ((13.0, 1.0, 15.0, 31.0), (2, 1)),  # long and thin, between two columns of centres
        ((15.9, 15.9, 16.1, 16.1), (2, 2)),  # centre on the border of four cells
        ((0.0, 0.0, 0.0, 0.0), (0, 0)),  # the top left corner belongs to the image
        ((31.0, 31.0, 32.0, 32.0), (3, 3)),
    ],
)
@for_each("binary", [False, True])
def test_a_box_that_covers_no_cell_centre_lights_one_cell(box, cell, binary):
    (found,) = gaussian_mask([torch.tensor([box])], 4, 4, 8, binary=binary)
    expected = torch.zeros(4, 4)
    expected[cell] = 1
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "box",
    [
        (-20.0, 4.0, 10.0, 20.0),  # reaches in from the left, centre outside
        (4.0, -20.0, 20.0, 19.0),
        (24.0, 4.0, 40.0, 20.0),  # centre on the right border, which is outside
        (4.0, 44.0, 20.0, 52.0),  # centre on the lower border, 6 rows of 8
        (100.0, 100.0, 300.0, 300.0),
        (-9.0, -9.0, -9.0, -9.0),
    ],
)
def test_boxes_with_their_centre_off_the_canvas_are_skipped(box):
    inside = torch.tensor([[4.0, 4, 20, 20]])
    boxes = torch.cat([torch.tensor([box]), inside])
    found = gaussian_mask([boxes[:1], boxes], 6, 4, 8)
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[1:], gaussian_mask([inside], 6, 4, 8))


def test_images_without_boxes_have_an_empty_mask():
    none = torch.zeros(0, 4)
    found = gaussian_mask([none, torch.tensor([[4.0, 4, 20, 20]]), none], 4, 5, 8)
    assert found.amax((1, 2)).tolist() == [0, 1, 0]
    assert (gaussian_mask([none, none], 4, 5, 8) == torch.zeros(2, 4, 5)).all()


def test_where_boxes_overlap_the_larger_value_counts():
    boxes = draw_boxes(np.random.default_rng(1), 12, 8, 8, 8)
    single = torch.stack([gaussian_mask([box[None]], 8, 8, 8)[0] for box in boxes])
    assert ((single > 0).sum(0) > 1).any()
    torch.testing.assert_close(gaussian_mask([boxes], 8, 8, 8)[0], single.amax(0))


def test_a_wide_bell_is_the_binary_mask():
    boxes = [draw_boxes(np.random.default_rng(2), 6, 8, 8, 8)]
    torch.testing.assert_close(
        gaussian_mask(boxes, 8, 8, 8, sigma2=1e9), gaussian_mask(boxes, 8, 8, 8, binary=True)
    )


def test_boxes_get_no_gradient():
    boxes = torch.tensor([[4.0, 4, 20, 20], [5.0, 5, 6, 6]], requires_grad=True)
    assert not gaussian_mask([boxes], 4, 4, 8).requires_grad


@few_examples
@given(st.randoms(use_true_random=False), st.integers(0, 12), st.sampled_from(STRIDES))
def test_the_order_of_boxes_and_the_unit_of_length_do_not_matter(random, count, stride):
    rng = np.random.default_rng(random.randrange(2**32))
    boxes = draw_boxes(rng, count, 5, 7, stride)
    expected = gaussian_mask([boxes], 5, 7, stride)
    shuffled = boxes[rng.permutation(count)]
    assert torch.equal(gaussian_mask([shuffled], 5, 7, stride), expected)
    large = boxes[(boxes[:, 2:] - boxes[:, :2]).amin(1) >= 1]  # sides above the minimum
    assert torch.equal(
        gaussian_mask([2 * large], 5, 7, 2 * stride), gaussian_mask([large], 5, 7, stride)
    )


@few_examples
@given(st.randoms(use_true_random=False), st.integers(0, 3), st.integers(0, 3))
def test_moving_boxes_by_whole_cells_moves_the_mask(random, right, down):
    rng = np.random.default_rng(random.randrange(2**32))
    low = rng.integers(0, 120, (5, 2)) / 4  # quarters of a pixel: exact in float32
    boxes = np.concatenate([low, low + rng.integers(0, 60, (5, 2)) / 4], 1)
    boxes = torch.from_numpy(boxes).float()
    moved = boxes + 8 * torch.tensor([right, down, right, down])
    expected = torch.zeros(1, 8, 8)
    expected[:, down:, right:] = gaussian_mask([boxes], 8, 8, 8)[:, : 8 - down, : 8 - right]
    assert torch.equal(gaussian_mask([moved], 8, 8, 8), expected)

"""Test divergences of predictions against SciPy, and their mathematical properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, rel_entr, softmax

from distill.losses import binary_kl, categorical_kl, kd, pixel_kd
from tests.support.cases import for_each

SHAPES = [(1, 1), (1, 2), (3, 4), (7, 5), (2, 81)]
TEMPERATURES = (0.5, 1.0, 2.0, 10.0)

number = st.floats(-20, 20, width=32)
temperature = st.floats(0.5, 10, width=32)


@st.composite
def two_rows(draw):
    """Return (student, teacher) logits, (1, K) each in float64."""
    classes = draw(st.integers(2, 6))
    rows = [
        draw(st.lists(number, min_size=classes, max_size=classes)) for _ in ("student", "teacher")
    ]
    return torch.tensor(rows, dtype=torch.float64)[:, None]


few_examples = settings(max_examples=50, deadline=None)


def test_categorical_value_by_hand():
    # p = (3/4, 1/4) against q = (1/2, 1/2)
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    expected = torch.tensor([0.75 * math.log(1.5) + 0.25 * math.log(0.5)])
    torch.testing.assert_close(categorical_kl(student, teacher), expected)
    torch.testing.assert_close(categorical_kl(student, 2 * teacher, 2.0), 4 * expected)


def test_kd_is_the_mean_over_rows():
    student = torch.zeros(3, 2)
    teacher = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(3)]])
    row = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    torch.testing.assert_close(kd(student, teacher), torch.tensor(2 * row / 3))


def test_pixel_kd_is_the_mean_over_the_pixels_of_all_images():
    # Two images of 1 x 3 pixels differ at one pixel: (3/4, 1/4) against (1/2, 1/2).
    student, teacher = torch.zeros(2, 2, 2, 1, 3)
    teacher[1, 0, 0, 2] = math.log(3)
    row = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    torch.testing.assert_close(pixel_kd(student, teacher), torch.tensor(row / 6))
    torch.testing.assert_close(pixel_kd(student, 4 * teacher, 4.0), torch.tensor(16 * row / 6))


@for_each("t", TEMPERATURES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 19, 3, 5), (3, 4, 5, 2)])
def test_pixel_kd_against_scipy(shape, t):
    student, teacher = np.random.default_rng(0).normal(0, 5, (2, *shape))
    expected = np.mean(
        [
            t**2 * rel_entr(softmax(q[:, i, j] / t), softmax(p[:, i, j] / t)).sum()
            for p, q in zip(student, teacher)
            for i, j in np.ndindex(*shape[2:])
        ]
    )
    found = pixel_kd(torch.from_numpy(student), torch.from_numpy(teacher), t)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_gradient_of_pixel_kd():
    student, teacher = torch.randn(2, 2, 3, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: pixel_kd(s, teacher, 2.0), student.requires_grad_())


def test_binary_value_by_hand():
    # σ(ln 3) = 3/4 against 1/2; the logits 0 agree.
    student, teacher = torch.zeros(2), torch.tensor([math.log(3), 0.0])
    expected = torch.tensor([0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.0])
    torch.testing.assert_close(binary_kl(student, teacher), expected)
    torch.testing.assert_close(binary_kl(student, 3 * teacher, 3.0), 9 * expected)


@for_each("seed", range(20))
@for_each("t", TEMPERATURES)
def test_against_scipy(seed, t):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(0, 5, (2, *SHAPES[seed % len(SHAPES)]))
    s, r = torch.from_numpy(student), torch.from_numpy(teacher)
    p, q = softmax(teacher / t, axis=1), softmax(student / t, axis=1)
    expected = t**2 * rel_entr(p, q).sum(1)
    np.testing.assert_allclose(categorical_kl(s, r, t), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(kd(s, r, t), expected.mean(), rtol=1e-9, atol=1e-12)
    present = rel_entr(expit(teacher / t), expit(student / t))
    absent = rel_entr(expit(-teacher / t), expit(-student / t))
    np.testing.assert_allclose(binary_kl(s, r, t), t**2 * (present + absent), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", [categorical_kl, kd, binary_kl])
@for_each("t", [1.0, 3.0])
def test_gradient(loss, t):
    student, teacher = torch.randn(2, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, t), student.requires_grad_())


@pytest.mark.parametrize("loss", [categorical_kl, binary_kl])
def test_opposite_large_logits_stay_finite(loss):
    student = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]], requires_grad=True)
    value = loss(student, -student.detach())
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all() and value[:2].min() >= 1e4
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", [categorical_kl, binary_kl])
def test_equal_logits_give_exactly_zero(loss):
    x = torch.randn(5, 7) * 10
    assert (loss(x, x.clone(), 2.0) == 0).all()


@few_examples
@given(two_rows(), temperature)
def test_divergences_are_not_negative(rows, t):
    student, teacher = rows
    for loss in (categorical_kl, binary_kl):
        assert loss(student, teacher, t).min() >= -1e-12 * t**2


@few_examples
@given(two_rows(), number, number)
def test_categorical_ignores_a_shift_of_either_row(rows, a, b):
    student, teacher = rows
    shifted = categorical_kl(student + a, teacher + b)
    torch.testing.assert_close(shifted, categorical_kl(student, teacher), rtol=1e-9, atol=1e-9)


@few_examples
@given(two_rows(), temperature)
def test_temperature_scales_logits_and_value(rows, t):
    student, teacher = rows
    for loss in (categorical_kl, binary_kl):
        expected = t**2 * loss(student / t, teacher / t)
        torch.testing.assert_close(loss(student, teacher, t), expected)


@few_examples
@given(two_rows())
def test_high_temperature_is_the_squared_gap_of_logits(rows):
    student, teacher = rows
    gap = teacher - student
    # T² cancels the temperature. To second order the divergences are variances of the gap.
    centred = (gap - gap.mean(1, keepdim=True)).square().mean(1) / 2
    t = 1e4
    torch.testing.assert_close(categorical_kl(student, teacher, t), centred, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(
        binary_kl(student, teacher, t), gap.square() / 8, rtol=0.01, atol=1e-3
    )


@few_examples
@given(number, number)
def test_binary_is_categorical_over_a_logit_and_its_absence(s, t):
    student, teacher = (torch.tensor([[x, 0.0]], dtype=torch.float64) for x in (s, t))
    torch.testing.assert_close(
        binary_kl(student, teacher)[:, 0], categorical_kl(student, teacher), rtol=1e-9, atol=1e-12
    )

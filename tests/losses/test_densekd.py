"""Test the class distillation of dense detectors: numerator and normalizer."""

import math

import numpy as np
import torch
from scipy.special import expit, rel_entr

from distill.losses import dense_kd
from tests.support.cases import for_each

SHAPES = [(1, 1), (5, 1), (2, 3, 4), (1, 7, 80)]


def test_value_by_hand():
    # First anchor: teacher (3/4, 1/2) against (1/2, 1/2), weight 3/4. Second: agreement at 1/4.
    student = torch.tensor([[0.0, 0.0], [-math.log(3), -math.log(3)]])
    teacher = torch.tensor([[math.log(3), 0.0], [-math.log(3), -math.log(3)]])
    numerator, mass = dense_kd(student, teacher)
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    torch.testing.assert_close(numerator, torch.tensor(0.75 * divergence))
    torch.testing.assert_close(mass, torch.tensor(0.75 + 0.25))


@for_each("seed", range(20))
@for_each("temperature", [1.0, 4.0])
def test_against_a_loop_over_anchors(seed, temperature):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(-3, 3, (2, *SHAPES[seed % len(SHAPES)]))
    numerator = mass = 0.0
    for s, t in zip(student.reshape(-1, student.shape[-1]), teacher.reshape(-1, student.shape[-1])):
        p, q = expit(t / temperature), expit(s / temperature)
        divergence = sum(rel_entr(p, q) + rel_entr(1 - p, 1 - q)) * temperature**2
        numerator += max(expit(t)) * divergence
        mass += max(expit(t))
    found = dense_kd(torch.from_numpy(student), torch.from_numpy(teacher), temperature)
    np.testing.assert_allclose([x.item() for x in found], [numerator, mass], rtol=1e-8)


def test_gradient():
    student, teacher = torch.randn(2, 5, 3, dtype=torch.float64)
    for temperature in (1.0, 2.0):
        assert torch.autograd.gradcheck(
            lambda s, t=temperature: dense_kd(s, teacher, t)[0], student.requires_grad_()
        )


def test_the_weight_is_the_teachers_at_temperature_one():
    student, teacher = torch.randn(2, 6, 3)
    mass = dense_kd(student, teacher)[1]
    torch.testing.assert_close(dense_kd(student, teacher, 5.0)[1], mass)
    torch.testing.assert_close(dense_kd(teacher, teacher)[1], mass)


def test_confident_background_hardly_counts():
    student, teacher = torch.zeros(2, 1), torch.tensor([[4.0], [-4.0]])  # equal divergences
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(dense_kd(student, teacher)[0], student)
    object_, background = gradient[:, 0].abs()
    torch.testing.assert_close(background / object_, torch.tensor(math.exp(-4)))


def test_equal_logits_give_zero_and_keep_the_mass():
    x = torch.randn(4, 3)
    numerator, mass = dense_kd(x, x.clone())
    assert numerator == 0
    assert mass > 0

"""Test SKD's pair-wise loss: similarities between the patches of a map."""

import math

import numpy as np
import pytest
import torch

from distill.losses import pairwise_affinity

SHAPES = [(1, 1, 1, 1), (2, 3, 4, 4), (1, 2, 5, 7), (3, 4, 9, 2), (2, 5, 1, 8)]


def maps(shape, channels=None, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator, dtype=dtype)
    shape = (shape[0], channels or shape[1], *shape[2:])
    return student, torch.randn(shape, generator=generator, dtype=dtype)


def doubles(*tensors):
    return [x.detach().double().numpy() for x in tensors]


def patches(height, width, scale):
    """Return slices of the patches in the order of the nodes."""
    kh, kw = max(int(scale * height), 1), max(int(scale * width), 1)
    return [
        (slice(y, y + kh), slice(x, x + kw))
        for y in range(0, height, kh)
        for x in range(0, width, kw)
    ]


def literal_nodes(x, scale):
    """Return (M, C) maxima of one image."""
    cut = patches(*x.shape[1:], scale)
    return np.array([[channel[part].max() for channel in x] for part in cut])


def cosines(nodes, norms=None):
    norms = np.linalg.norm(nodes, axis=1) if norms is None else norms
    return nodes @ nodes.T / np.outer(norms, norms)


def literal_affinity(student, teacher, scale):
    total = 0.0
    for s, t in zip(student, teacher):
        a_s, a_t = cosines(literal_nodes(s, scale)), cosines(literal_nodes(t, scale))
        for i, j in np.ndindex(a_s.shape):
            total += (a_t[i, j] - a_s[i, j]) ** 2 / a_s.size
    return total / len(student)


def test_value_by_hand():
    # Nodes (3, 4) and (5, 0) have a cosine of 3/5, the others are parallel. Two of four entries
    # differ.
    student = torch.tensor([[[[3.0, 5.0]], [[4.0, 0.0]]]])
    teacher = torch.tensor([[[[2.0, 7.0]]]])
    expected = torch.tensor(2 * (1 - 0.6) ** 2 / 4)
    torch.testing.assert_close(pairwise_affinity(student, teacher), expected)


def test_nodes_by_hand():
    # Five columns at scale 1/2 give patches of 2, 2 and 1 cells with the maxima 4, 1 and -3.
    student = torch.tensor([[[[4.0, 0.0, 1.0, -2.0, -3.0]]]])
    found = pairwise_affinity(student, torch.ones_like(student))
    torch.testing.assert_close(found, torch.tensor(4 * 2.0**2 / 9))  # four cosines are -1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.01, 0.3, 0.5, 1.0])
def test_it_equals_the_literal_form(shape, scale):
    student, teacher = maps(shape, channels=6)
    found = pairwise_affinity(student, teacher, scale)
    expected = literal_affinity(*doubles(student, teacher), scale)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_the_norms_are_constants_of_the_gradient(scale):
    student, teacher = maps((2, 3, 5, 4), seed=1, dtype=torch.float64)
    (found,) = torch.autograd.grad(
        pairwise_affinity(student.requires_grad_(), teacher, scale), student
    )

    def with_fixed_norms(x):
        value = 0.0
        for n in range(len(x)):
            norms = np.linalg.norm(literal_nodes(doubles(student[n])[0], scale), axis=1)
            a_s = cosines(literal_nodes(x[n], scale), norms)
            a_t = cosines(literal_nodes(doubles(teacher[n])[0], scale))
            value += np.square(a_t - a_s).mean() / len(x)
        return value

    (origin,), step = doubles(student), 1e-6
    for index in np.ndindex(origin.shape):
        up, down = origin.copy(), origin.copy()
        up[index] += step
        down[index] -= step
        slope = (with_fixed_norms(up) - with_fixed_norms(down)) / (2 * step)
        assert math.isclose(found[index], slope, rel_tol=1e-5, abs_tol=1e-8)


def test_only_directions_are_compared():
    student, teacher = maps((2, 4, 6, 6), seed=2)
    expected = pairwise_affinity(student, teacher)
    torch.testing.assert_close(pairwise_affinity(3 * student, teacher / 7), expected)
    assert pairwise_affinity(student, student.clone()) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_maps_of_zeros(dtype):
    student, teacher = (x.to(dtype) for x in maps((2, 4, 5, 5), channels=7))
    found = pairwise_affinity(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, pairwise_affinity(student.float(), teacher.float()))
    zeros = torch.zeros_like(student, requires_grad=True)
    found = pairwise_affinity(zeros, teacher)
    (grad,) = torch.autograd.grad(found, zeros)
    assert found.isfinite() and (grad == 0).all()


def test_no_gradient_reaches_the_teacher():
    student, teacher = maps((1, 2, 4, 4))
    student.requires_grad_(), teacher.requires_grad_()
    found = pairwise_affinity(student, teacher)
    grads = torch.autograd.grad(found, (student, teacher), allow_unused=True)
    assert grads[0].abs().max() > 0 and grads[1] is None


def test_an_empty_batch():
    student = torch.zeros(0, 3, 4, 4, requires_grad=True)
    value = pairwise_affinity(student, torch.zeros(0, 5, 4, 4))
    value.backward()
    assert value == 0 and student.grad.shape == student.shape


@pytest.mark.parametrize("shape", [(3, 3, 4, 5), (2, 3, 5, 4)])
def test_other_sizes_are_refused(shape):
    with pytest.raises(ValueError) as e:
        pairwise_affinity(torch.zeros(2, 3, 4, 5), torch.zeros(shape))
    assert str(e.value) == (f"student (2, 3, 4, 5) and teacher {shape} differ in batch or size")


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.5])
def test_scale_out_of_range(scale):
    with pytest.raises(ValueError, match=rf"scale must be in \(0, 1\], got {scale}"):
        pairwise_affinity(*maps((1, 1, 2, 2)), scale)

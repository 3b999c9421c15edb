"""Test IFVD: cosines between pixels and the prototypes of their classes."""

import math

import numpy as np
import pytest
import torch

from distill.losses import ifvd
from tests.support.cases import for_each

SHAPES = [(1, 1, 1, 1), (2, 3, 4, 4), (1, 2, 5, 7), (3, 4, 3, 2)]
CLASSES = 4


def maps(shape, channels=None, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator, dtype=dtype)
    shape = (shape[0], channels or shape[1], *shape[2:])
    return student, torch.randn(shape, generator=generator, dtype=dtype)


def draw_labels(shape, seed=0):
    """Draw labels: some classes, 255, and other values that are no class."""
    values = torch.tensor([0, 1, 3, 255, -1, CLASSES])
    generator = torch.Generator().manual_seed(seed)
    return values[torch.randint(len(values), (shape[0], *shape[2:]), generator=generator)]


def literal_variation(x, labels):
    """Return (N, H, W) cosines; an ignored pixel keeps itself as its prototype."""
    centre = x.copy()
    for n in range(len(x)):
        for k in range(CLASSES):
            pixels = labels[n] == k
            if pixels.any():
                centre[n][:, pixels] = x[n][:, pixels].mean(1, keepdims=True)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(centre, axis=1)
    return (x * centre).sum(1) / norms


def literal_ifvd(student, teacher, labels):
    student, teacher = (x.detach().double().numpy() for x in (student, teacher))
    labels = labels.numpy()
    gap = literal_variation(student, labels) - literal_variation(teacher, labels)
    return np.mean(np.square(gap))


def test_value_by_hand():
    # The student's (1, 0) and (0, 1) are at 45° to their mean. The teacher's are parallel. The
    # third pixel is ignored.
    student = torch.tensor([[[[1.0, 0.0, 9.0]], [[0.0, 1.0, 2.0]]]])
    teacher = torch.tensor([[[[2.0, 5.0, -1.0]]]])
    labels = torch.tensor([[[1, 1, 255]]])
    expected = torch.tensor(2 * (1 - math.sqrt(0.5)) ** 2 / 3)
    torch.testing.assert_close(ifvd(student, teacher, labels, 2), expected)
    # A label outside the task's classes is ignored, too.
    assert ifvd(student, teacher, labels, 1) == 0


@for_each("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_literal_form(shape, seed):
    student, teacher = maps(shape, channels=5, seed=seed)
    labels = draw_labels(shape, seed)
    found = ifvd(student, teacher, labels, CLASSES)
    np.testing.assert_allclose(found, literal_ifvd(student, teacher, labels), rtol=1e-5, atol=1e-12)


def test_prototypes_are_those_of_an_image():
    student, teacher = maps((2, 3, 4, 5), seed=1)
    labels = draw_labels(student.shape, 1)
    found = ifvd(student, teacher, labels, CLASSES)
    halves = [ifvd(student[n, None], teacher[n, None], labels[n, None], CLASSES) for n in (0, 1)]
    torch.testing.assert_close(found, (halves[0] + halves[1]) / 2)


@for_each("seed", range(2))
def test_gradient_also_of_the_prototypes(seed):
    student, teacher = maps((2, 2, 3, 2), channels=3, seed=seed, dtype=torch.float64)
    labels = draw_labels(student.shape, seed)
    assert torch.autograd.gradcheck(
        lambda s: ifvd(s, teacher, labels, CLASSES), student.requires_grad_()
    )


@pytest.mark.parametrize("label", [255, -1, CLASSES])
def test_without_labelled_pixels_it_is_exactly_zero(label):
    student, teacher = maps((2, 3, 4, 5))
    student.requires_grad_()
    value = ifvd(student, teacher, torch.full((2, 4, 5), label), CLASSES)
    value.backward()
    assert value == 0 and (student.grad == 0).all()


def test_one_class_and_one_pixel_of_a_class():
    student, teacher = maps((1, 3, 5, 5))
    labels = torch.full((1, 5, 5), 2)
    np.testing.assert_allclose(
        ifvd(student, teacher, labels, CLASSES), literal_ifvd(student, teacher, labels), rtol=1e-5
    )
    labels[:] = 255
    labels[0, 2, 2] = 0  # it is its own prototype in both networks
    torch.testing.assert_close(ifvd(student, teacher, labels, CLASSES), torch.tensor(0.0))


def test_equal_maps_and_multiples_give_zero():
    student, _ = maps((2, 3, 4, 5))
    labels = draw_labels(student.shape)
    assert ifvd(student, student.clone(), labels, CLASSES) == 0
    assert ifvd(student, 5 * student, labels, CLASSES) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_maps_of_zeros(dtype):
    student, teacher = (x.to(dtype) for x in maps((2, 4, 5, 5), channels=7))
    labels = draw_labels(student.shape)
    found = ifvd(student, teacher, labels, CLASSES)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ifvd(student.float(), teacher.float(), labels, CLASSES))
    zeros = torch.zeros_like(student, requires_grad=True)
    found = ifvd(zeros, teacher, labels, CLASSES)
    (grad,) = torch.autograd.grad(found, zeros)
    assert found.isfinite() and (grad == 0).all()


def test_no_gradient_reaches_the_teacher():
    student, teacher = maps((1, 2, 4, 4))
    student.requires_grad_(), teacher.requires_grad_()
    found = ifvd(student, teacher, torch.zeros(1, 4, 4, dtype=torch.long), CLASSES)
    grads = torch.autograd.grad(found, (student, teacher), allow_unused=True)
    assert grads[0].abs().max() > 0 and grads[1] is None


def test_wrong_shapes_are_refused():
    student, teacher = maps((2, 3, 4, 5))
    with pytest.raises(ValueError) as e:
        ifvd(student, teacher, torch.zeros(2, 8, 10), CLASSES)
    assert str(e.value) == (
        "labels (2, 8, 10) do not fit maps (2, 3, 4, 5): they must be (N, H, W)"
    )
    with pytest.raises(ValueError, match="differ in batch or size"):
        ifvd(student, teacher[:1], torch.zeros(2, 4, 5), CLASSES)

"""Test channel-wise distillation: each channel is a distribution over the cells."""

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from distill.losses import channel_alignment, cwd
from tests.reference import literal


def maps(seed=0, shape=(2, 3, 5, 7), dtype=torch.float32):
    return torch.randn((2, *shape), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def literal_cwd(student, teacher, tau):
    batch, channels = student.shape[:2]
    total = 0.0
    for n, c in np.ndindex(batch, channels):
        p, q = (softmax(x[n, c].ravel() / tau) for x in (teacher, student))
        total += tau**2 * rel_entr(p, q).sum() / (batch * channels)
    return total


def test_value_by_hand():
    # The first channel has (3/4, 1/4) against (1/2, 1/2); the second one agrees.
    student = torch.zeros(1, 2, 1, 2)
    teacher = torch.tensor([[[[math.log(3), 0.0]], [[5.0, 5.0]]]])
    expected = torch.tensor(0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    torch.testing.assert_close(cwd(student, teacher), expected)
    torch.testing.assert_close(cwd(student, 4 * teacher, 4.0), 16 * expected)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 19, 3, 5), (3, 2, 7, 4)])
def test_against_scipy(shape, tau):
    student, teacher = maps(1, shape)
    expected = literal_cwd(student.double().numpy(), teacher.double().numpy(), tau)
    np.testing.assert_allclose(cwd(student, teacher, tau), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_gradient(tau):
    student, teacher = maps(2, (2, 2, 3, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda s: cwd(s, teacher, tau), student.requires_grad_())


def test_it_is_channel_alignment_without_attention():
    student, teacher = maps(3)
    assert cwd(student, teacher, 2.0) == channel_alignment(student, teacher, 2.0, attention=False)
    assert cwd(student, student.clone()) == 0


def test_a_constant_of_a_channel_does_not_matter():
    student, teacher = maps(4, dtype=torch.float64)
    shift = torch.arange(3.0)[:, None, None]
    torch.testing.assert_close(cwd(student + shift, teacher - shift), cwd(student, teacher))


def test_no_gradient_reaches_the_teacher():
    student, teacher = maps(5).requires_grad_().unbind()
    grads = torch.autograd.grad(cwd(student, teacher), (student, teacher), allow_unused=True)
    assert grads[0].abs().max() > 0 and grads[1] is None


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_out_of_range(temperature):
    with pytest.raises(ValueError, match=f"temperature must be above 0, got {temperature}"):
        cwd(*maps(), temperature)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_normalized_against_numpy(tau):
    student, teacher = maps(5, (2, 3, 5, 4))
    pair = [literal.channel_normalized(x.double().numpy()) for x in (student, 100 * teacher)]
    found = cwd(student, 100 * teacher, tau, normalize="channel")
    np.testing.assert_allclose(found, literal_cwd(*pair, tau), rtol=1e-4)


def test_the_scale_of_a_normalized_channel_does_not_matter():
    student, teacher = maps(6, dtype=torch.float64)
    scale = torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    expected = cwd(student, teacher, normalize="channel")
    found = cwd(student * scale + scale, teacher * scale.flip(0), normalize="channel")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    assert torch.autograd.gradcheck(
        lambda s: cwd(s, teacher[:, :, :2, :2], normalize="channel"),
        student[:, :, :2, :2].clone().requires_grad_(),
    )


def test_maps_of_too_few_values_are_not_normalized():
    student, teacher = maps(7, (1, 3, 1, 7))
    assert cwd(student.requires_grad_(), teacher, normalize="channel") == 0
    with pytest.raises(ValueError, match="normalize must be none or channel, got 'cells'"):
        cwd(student, teacher, normalize="cells")

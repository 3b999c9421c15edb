"""Attention transfer: where the features of an image are large, whatever their channels."""

import numpy as np
import pytest
import torch

from distill.losses import at
from tests.support.networks import distilled, image_dict, kd_losses, outspoken_model


def maps(shape, seed=0, dtype=torch.float32):
    return torch.randn((2, *shape), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def literal_at(student, teacher):
    total = 0.0
    for s, t in zip(student, teacher):
        directions = []
        for x in (s, t):
            q = np.square(x).sum(0).ravel()
            directions.append(q / np.linalg.norm(q))
        total += np.square(directions[0] - directions[1]).sum()
    return total / len(student)


def test_value_by_hand():
    # q is (9, 16) and (25, 0): directions (9, 16)/√337 and (1, 0).
    student = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]])
    teacher = torch.tensor([[[[5.0, 0.0]]]])  # with another number of channels
    expected = 2 - 2 * 9 / 337**0.5
    torch.testing.assert_close(at(student, teacher), torch.tensor(expected))
    torch.testing.assert_close(at(-7 * student, 0.1 * teacher), torch.tensor(expected))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (3, 4, 1, 6)])
def test_against_the_literal_form(shape):
    student, teacher = maps(shape)
    expected = literal_at(student.double().numpy(), teacher.double().numpy())
    np.testing.assert_allclose(at(student, teacher), expected, rtol=1e-5, atol=1e-7)
    assert at(student, student.clone()) == 0


def test_gradient():
    student, teacher = maps((2, 2, 3, 2), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: at(s, teacher), student.requires_grad_())


def test_a_map_of_zeros_has_no_gradient():
    student, teacher = torch.zeros(1, 2, 3, 3, requires_grad=True), torch.ones(1, 2, 3, 3)
    at(student, teacher).backward()
    assert student.grad is not None and student.grad.abs().sum() == 0


def test_networks_of_other_channels_need_no_adapter():
    model = distilled("faster", ["AT"], teacher=outspoken_model("faster", seed=1, fpn=24))
    found = kd_losses(model, [image_dict(0)])
    assert set(found) == {f"loss_at/p{k}" for k in range(2, 7)}
    assert not list(model.heads.parameters())
    sum(found.values()).backward()
    assert all(0 < x <= 2 / 5 for name, x in found.items() if name != "loss_at/p6")  # one cell

"""Test the weighted squares of a distance against the literal form."""

import pytest
import torch

from distill.losses.squares import weighted_squares


def literal(student, teacher, weights, channels):
    squares = (student - teacher).square() * channels[:, :, None, None]
    return (weights * squares.sum(1)).sum((1, 2, 3))


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients(batch, weighted):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, batch, 3, 4, 5, generator=generator, dtype=torch.float64)
    weights = torch.rand(2, batch, 4, 5, generator=generator, dtype=torch.float64)
    channels = torch.rand(batch, 3, generator=generator, dtype=torch.float64)
    channels = channels if weighted else torch.ones_like(channels)
    student.requires_grad_(), teacher.requires_grad_()
    found = weighted_squares(student, teacher, weights, channels if weighted else None)
    expected = literal(student, teacher.detach(), weights, channels)
    torch.testing.assert_close(found, expected)
    for own, wanted in zip(found, expected):
        gradients = (torch.autograd.grad(x, student, retain_graph=True) for x in (own, wanted))
        torch.testing.assert_close(*gradients)

"""Test the mean squared error of feature maps."""

import numpy as np
import torch

from distill.losses import fitnet
from tests.support.cases import for_each

SIZES = [(1, 1), (1, 2), (3, 1), (4, 4), (5, 7), (8, 5)]


def test_value_by_hand():
    student = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    teacher = torch.tensor([[[[0.0, 2.0], [5.0, 1.0]]]])
    assert fitnet(student, teacher) == (1 + 0 + 4 + 9) / 4


@for_each("seed", range(24))
def test_against_numpy(seed):
    rng = np.random.default_rng(seed)
    shape = (1 + seed % 3, 1 + seed % 4, *SIZES[seed % len(SIZES)])
    student, teacher = rng.normal(3, 2, (2, *shape))
    expected = np.mean((student - teacher) ** 2)
    found = fitnet(torch.from_numpy(student), torch.from_numpy(teacher))
    np.testing.assert_allclose(found.item(), expected, rtol=1e-12)


def test_gradient():
    student, teacher = torch.randn(2, 2, 3, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(fitnet, (student.requires_grad_(), teacher))


def test_equal_maps_give_exactly_zero():
    x = torch.randn(2, 3, 4, 5)
    assert fitnet(x, x.clone()) == 0


def test_value_does_not_depend_on_the_size_of_the_image():
    student, teacher = torch.randn(2, 1, 3, 4, 4)
    tiled = fitnet(student.repeat(1, 1, 2, 3), teacher.repeat(1, 1, 2, 3))
    torch.testing.assert_close(tiled, fitnet(student, teacher))

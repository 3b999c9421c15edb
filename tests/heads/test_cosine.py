"""Cosine: the directions of cells, whatever their lengths."""

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.losses import cosine


def maps(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((2, *shape), generator=torch.Generator().manual_seed(0), dtype=dtype)


def literal(student: np.ndarray, teacher: np.ndarray) -> float:
    cells = []
    for s, t in zip(student, teacher):
        for y in range(s.shape[1]):
            for x in range(s.shape[2]):
                a, b = s[:, y, x], t[:, y, x]
                cells.append(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return float(np.mean(cells))


def test_value_by_hand() -> None:
    student = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    teacher = torch.tensor([5.0, 0.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(cosine(student, teacher), torch.tensor(0.4))
    torch.testing.assert_close(cosine(7 * student, 1e-12 * teacher), torch.tensor(0.4))
    torch.testing.assert_close(cosine(-student, student), torch.tensor(2.0))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7)])
def test_against_the_literal_form(shape: tuple[int, ...]) -> None:
    student, teacher = maps(shape)
    expected = literal(student.double().numpy(), teacher.double().numpy())
    np.testing.assert_allclose(cosine(student, teacher), expected, rtol=1e-5, atol=1e-7)


def test_gradient() -> None:
    student, teacher = maps((2, 3, 3, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda s: cosine(s, teacher), student.requires_grad_())


def test_cells_of_zeros_and_empty_batches() -> None:
    student = torch.zeros(1, 2, 3, 3, requires_grad=True)
    loss = cosine(student, torch.ones(1, 2, 3, 3))
    loss.backward()
    assert loss == 1 and student.grad is not None and student.grad.abs().sum() == 0
    empty = torch.zeros(0, 2, 3, 3, requires_grad=True)
    assert cosine(empty, empty.detach()) == 0 and cosine(empty, empty.detach()).requires_grad
    with pytest.raises(ValueError, match="differ in shape"):
        cosine(student, torch.ones(1, 3, 3, 3))

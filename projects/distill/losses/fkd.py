"""FKD (Zhang and Ma, "Improve object detection with feature-based knowledge distillation")."""

import torch
from torch import Tensor

from .fgd import fgd_attention
from .fgfi import on_cells
from .reduce import same_cells, same_shape


def fkd(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """FKD's feature loss: √(Σ M (S − T)²) over the whole batch, channels and cells (Eq. 4).

    Args:
        student, teacher: (N, C, H, W), the student adapted to the teacher's channels. No gradient
            reaches the teacher.
        mask: (N, H, W) M >= 0 from :func:`fkd_mask`.

    Returns:
        A scalar >= 0; its gradient is 0 if the maps are equal.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    root = on_cells(mask, student).sqrt()[:, None]
    return length_of_gap(root * student, root * teacher)


@torch.no_grad()
def fkd_mask(student: Tensor, teacher: Tensor, temperature: float = 0.5) -> Tensor:
    """Return FKD's mask: the mean attention of both networks over the cells (Eq. 4).

    M = (A(S) + A(T)) / 2 with A the first output of :func:`distill.losses.fgd_attention`. The
    released code also computes the attention over channels, but does not use it.

    Args:
        student, teacher: (N, C, H, W) and (N, C', H, W).
        temperature: 𝒯 > 0.

    Returns:
        (N, H, W) >= 0, with sum H·W in each image, without gradient.

    Raises:
        ValueError: if N, H or W differ, or the temperature is not above 0.
    """
    both = (fgd_attention(x, temperature)[0] for x in same_cells(student, teacher))
    return torch.stack([*both]).mean(0)


def length_of_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """FKD's other losses: the Euclidean norm |S − T|₂ of two adapted tensors of any shape.

    Args:
        student, teacher: outputs of FKD's adapters. A gradient reaches both.

    Returns:
        A scalar >= 0; its gradient is 0 if the tensors are equal.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher)
    return torch.linalg.vector_norm(student - teacher)

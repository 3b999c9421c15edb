"""FKD (Zhang and Ma, "Improve object detection with feature-based knowledge distillation")."""

import torch
from torch import Tensor

from .fgd import fgd_attention
from .fgfi import on_cells
from .reduce import same_cells, same_shape


def fkd(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """√(Σ M (S − T)²), over the whole batch, channels and cells (Eq. 4).

    Args:
        student, teacher: (N, C, H, W), the student adapted to the teacher's channels. No gradient
            reaches the teacher.
        mask: (N, H, W) of :func:`fkd_mask`.

    Returns:
        A scalar >= 0; its gradient at equality is 0.

    Raises:
        ValueError: shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    root = on_cells(mask, student).sqrt()[:, None]
    return length_of_gap(root * student, root * teacher)


@torch.no_grad()
def fkd_mask(student: Tensor, teacher: Tensor, temperature: float = 0.5) -> Tensor:
    """(A(S) + A(T)) / 2, A the attention on the cells of :func:`distill.losses.fgd_attention`.

    The attention on the channels is computed in the released code, and not used.

    Args:
        student, teacher: (N, C, H, W), of any channels each.
        temperature: 𝒯 > 0.

    Returns:
        (N, H, W).

    Raises:
        ValueError: N, H or W differ, or the temperature is not above 0.
    """
    both = (fgd_attention(x, temperature)[0] for x in same_cells(student, teacher))
    return torch.stack([*both]).mean(0)


def length_of_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """|S − T|₂ of whole tensors; the other terms of FKD, on what its adapters give.

    Raises:
        ValueError: shapes differ.
    """
    student, teacher = same_shape(student, teacher)
    return torch.linalg.vector_norm(student - teacher)

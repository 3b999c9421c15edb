"""Directions of cells: the loss with which features of foundation models are distilled."""

from torch import Tensor

from .reduce import connected_zero, same_shape, unit


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the direction of each cell's channels.

    L = mean over the cells of 1 − cos(S, T) = ½ |S/|S| − T/|T||²

    It is the larger part of AM-RADIO's loss of spatial features (Ranzinger et al., "AM-RADIO:
    Agglomerative vision foundation model", CVPR 2024). The other part is a smooth L1 loss.

    Args:
        student, teacher: (N, C, H, W). No gradient reaches the teacher.

    Returns:
        A scalar in [0, 2] in float32; a connected zero for an empty batch. A cell of zeros has no
        direction: it counts 1 and has no gradient.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    if student.numel() == 0:
        return connected_zero(student)
    # The largest value becomes 1, so that tiny features have a direction, too.
    largest = teacher.abs().amax((1, 2, 3), True)
    teacher = teacher / largest.where(largest > 0, 1)
    cosines = (unit(student, 1) * unit(teacher, 1)).sum(1)
    return (1 - cosines).mean()

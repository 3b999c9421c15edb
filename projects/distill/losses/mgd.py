"""MGD (Yang et al., "Masked generative distillation")."""

from collections.abc import Callable

from torch import Tensor

from .reduce import full_precision, same_shape


def mgd(
    student: Tensor, teacher: Tensor, generator: Callable[[Tensor], Tensor], keep: Tensor
) -> Tensor:
    """Squared error of what a generator makes of the student's map where cells are masked out.

    Σ (G(M · S) − T)² / N over all cells, masked or not (Eq. 3): a sum over channels and cells, so
    that the weight belongs to a number of channels and a size of pictures.

    Args:
        student, teacher: (N, C, H, W), the student adapted to the teacher's channels. No gradient
            reaches the teacher.
        generator: G; keeps the shape.
        keep: (N, 1, H, W) M in {0, 1}; the paper keeps a share of 1 − λ.

    Returns:
        A scalar >= 0; a connected zero for an empty batch.

    Raises:
        ValueError: shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    if keep.shape != (len(student), 1, *student.shape[2:]):
        raise ValueError(
            f"keep {tuple(keep.shape)} does not fit maps {tuple(student.shape)}: it must be "
            "(N, 1, H, W)"
        )
    made = full_precision(generator(student * keep))
    return (made - teacher).square().sum() / max(len(student), 1)

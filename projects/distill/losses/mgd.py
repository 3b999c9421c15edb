"""MGD (Yang et al., "Masked generative distillation")."""

from collections.abc import Callable

from torch import Tensor

from .reduce import full_precision, same_shape


def mgd(
    student: Tensor, teacher: Tensor, generator: Callable[[Tensor], Tensor], keep: Tensor
) -> Tensor:
    """Masked generative distillation: the teacher's map is generated from a masked student (Eq. 3).

    L = Σ (G(M · S) − T)² / N

    The sum runs over channels and all cells, masked or not. A suitable weight therefore depends on
    the number of channels and the image size.

    Args:
        student, teacher: (N, C, H, W), the student adapted to the teacher's channels. No gradient
            reaches the teacher.
        generator: G, which keeps the shape.
        keep: (N, 1, H, W) M in {0, 1}. The paper keeps a share of 1 − λ of the cells.

    Returns:
        A scalar >= 0; a connected zero for an empty batch.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    if keep.shape != (len(student), 1, *student.shape[2:]):
        raise ValueError(
            f"keep {tuple(keep.shape)} does not fit maps {tuple(student.shape)}: it must be "
            "(N, 1, H, W)"
        )
    made = full_precision(generator(student * keep))
    return (made - teacher).square().sum() / max(len(student), 1)

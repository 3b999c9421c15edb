"""FitNets feature mimicking (Romero et al., "FitNets: Hints for thin deep nets", Eq. 3)."""

from torch import Tensor

from .reduce import mean_square, same_shape


def fitnet(student: Tensor, teacher: Tensor) -> Tensor:
    """FitNets' hint loss: mean squared error of two feature maps.

    L = 1/(N·C·H·W) Σ (S − T)²

    The paper takes a sum and has no version for detection. The mean over cells and channels makes
    the weight independent of the image size.

    Args:
        student: (N, C, H, W), already adapted to the teacher's channels.
        teacher: (N, C, H, W). Detach it: a gradient reaches both maps.

    Returns:
        A scalar >= 0 in float32; a connected zero for an empty batch.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher)
    return mean_square(student - teacher)

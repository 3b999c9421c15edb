"""FitNets feature mimicking (Romero et al., "FitNets: Hints for thin deep nets", Eq. 3)."""

from torch import Tensor

from .reduce import mean_square, same_shape


def fitnet(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two feature maps.

    L = 1/(N·C·H·W) Σ (S − T)². The paper sums and has no detection version; the mean over cells
    and channels makes the weight independent of the picture's size.

    Args:
        student: (N, C, H, W), already adapted to the teacher's channels.
        teacher: (N, C, H, W); a gradient reaches it, too, unless it is detached.

    Returns:
        A scalar >= 0 in float32; a connected zero for an empty batch.
    """
    student, teacher = same_shape(student, teacher)
    return mean_square(student - teacher)

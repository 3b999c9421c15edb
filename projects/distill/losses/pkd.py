"""PKD (Cao et al., "PKD: General distillation framework for object detectors via Pearson
correlation coefficient")."""

from torch import Tensor

from .fitnet import fitnet
from .reduce import same_shape

PKD_EPS = 1e-6  # added to a channel's standard deviation


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the mean squared error of channels at mean 0 and standard deviation 1.

    Statistics are of a channel over N, H and W together, unbiased, as released; so with n = N·H·W
    cells this is (n − 1)/n · mean_c (1 − r_c), r the correlation of both networks' channels.

    Args:
        student, teacher: (N, C, H, W). No gradient reaches the teacher.

    Returns:
        A scalar in [0, 2]; a connected zero for an empty batch.

    Raises:
        ValueError: shapes differ.
    """
    student, teacher = same_shape(student, teacher)
    if student.numel() == 0:
        return student.sum()
    return fitnet(standardized(student), standardized(teacher.detach())) / 2


def standardized(x: Tensor) -> Tensor:
    """(N, C, H, W) with mean 0 and unbiased standard deviation 1 in each channel."""
    mean, deviation = statistics(x)
    return (x - mean) / (deviation + PKD_EPS)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """(1, C, 1, 1) mean and unbiased standard deviation of each channel; 0 of a single cell."""
    cells = x.shape[0] * x.shape[2] * x.shape[3]
    deviation = x.std((0, 2, 3), correction=min(cells - 1, 1), keepdim=True)
    return x.mean((0, 2, 3), keepdim=True), deviation

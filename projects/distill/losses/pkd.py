"""PKD (Cao et al., "PKD: General distillation framework for object detectors via Pearson
correlation coefficient")."""

from torch import Tensor

from .fitnet import fitnet
from .reduce import same_shape

PKD_EPS = 1e-6  # added to the standard deviation of a channel


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    """PKD: half the mean squared error of maps standardized in each channel.

    L = 1/2 mean (ŝ − t̂)², x̂ the map with mean 0 and standard deviation 1 in each channel

    The statistics of a channel run over N, H and W together, unbiased, as in the released code.
    With n = N·H·W this is (n − 1)/n · mean_c (1 − r_c), r_c the Pearson correlation of channel c.

    Args:
        student, teacher: (N, C, H, W). No gradient reaches the teacher.

    Returns:
        A scalar in [0, 2]; a connected zero for an empty batch.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher)
    if student.numel() == 0:
        return student.sum()
    return fitnet(standardized(student), standardized(teacher.detach())) / 2


def standardized(x: Tensor) -> Tensor:
    """Return (N, C, H, W) maps with mean 0 and unbiased standard deviation 1 in each channel."""
    mean, deviation = statistics(x)
    return (x - mean) / (deviation + PKD_EPS)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the unbiased standard deviation of each channel, (1, C, 1, 1) each.

    The deviation of a single cell is 0.
    """
    cells = x.shape[0] * x.shape[2] * x.shape[3]
    deviation = x.std((0, 2, 3), correction=min(cells - 1, 1), keepdim=True)
    return x.mean((0, 2, 3), keepdim=True), deviation

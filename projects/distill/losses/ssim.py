"""Structural distillation of features (de Rijk et al., "Structural knowledge distillation for
object detection").
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reduce import connected_zero, same_shape

WINDOW, SIGMA = 11, 1.5  # side and deviation of the Gaussian window in cells
K1, K2 = 0.01, 0.03  # constants over the range, of the means and of the deviations
LEAST_RANGE = 1e-6  # for a teacher's map of one value


def ssim(student: Tensor, teacher: Tensor) -> Tensor:
    """Structural distillation: one minus the structural similarity of the maps, per channel.

    L = 1 − mean (2 μ_S μ_T + c₁)(2 σ_ST + c₂) / ((μ_S² + μ_T² + c₁)(σ_S² + σ_T² + c₂))

    Means, variances and covariance are those of a Gaussian window around each cell. Cells outside
    the map have no weight, so that maps of any size have a similarity. c₁ = (0.01 R)² and
    c₂ = (0.03 R)²; R is the range of the teacher's map, all channels of an image together. The
    paper leaves open the range and the border.

    Args:
        student, teacher: (N, C, H, W). No gradient reaches the teacher.

    Returns:
        A scalar in [0, 2] in float32; a connected zero for an empty batch.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    if student.numel() == 0:
        return connected_zero(student)
    span = (teacher.amax((1, 2, 3), True) - teacher.amin((1, 2, 3), True)).clamp(min=LEAST_RANGE)
    # Values in ranges, so that squares of large features do not overflow; the constants are then
    # K1² and K2².
    student, teacher = student / span, teacher / span
    middle = teacher.mean((2, 3), True)  # a smaller mean leaves more digits to the deviations
    s, t = student - middle, teacher - middle
    maps = (s, t, s * s, t * t, s * t)
    mean_s, mean_t, square_s, square_t, product = map(_blurred, maps)
    variances = square_s - mean_s.square() + square_t - mean_t.square()
    covariance = product - mean_s * mean_t
    mean_s, mean_t = mean_s + middle, mean_t + middle
    luminance = (2 * mean_s * mean_t + K1**2) / (mean_s.square() + mean_t.square() + K1**2)
    return 1 - (luminance * (2 * covariance + K2**2) / (variances + K2**2)).mean()


def _blurred(x: Tensor) -> Tensor:
    """Return the weighted mean of (N, C, H, W) maps in the window around each cell."""
    channels, ones = x.shape[1], x.new_ones(1, 1, *x.shape[2:])
    at = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    window = (-at.square() / (2 * SIGMA**2)).exp()
    with torch.autocast(x.device.type, enabled=False):  # keeps the sums in float32
        for kernel in (window.view(1, 1, -1, 1), window.view(1, 1, 1, -1)):
            padding = (kernel.shape[2] // 2, kernel.shape[3] // 2)
            # On a CPU, one map per channel is 20 times as fast as one map per image and channel.
            each = kernel.expand(channels, -1, -1, -1)
            x = F.conv2d(x, each, padding=padding, groups=channels)
            ones = F.conv2d(ones, kernel, padding=padding)
    return x / ones

"""PKD (Cao et al., "PKD: General distillation framework for object detectors via Pearson
correlation coefficient")."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    loss: Tensor = _Correlation.apply(student, teacher.detach())
    return loss


class _Correlation(torch.autograd.Function):
    """1/2 mean (ŝ − t̂)² of maps standardized in each channel.

    With d = σ + ε and n values per channel, the gradient is

    (ŝ − t̂)/d − ŝ Σ(ŝ − t̂)ŝ / ((n − 1) σ), over the number of all values

    2 Σ(ŝ − t̂)ŝ = Σ(ŝ − t̂)² + Σŝ² − Σt̂², and Σx̂² = (n − 1) σ²/d². The literal form, which passes
    over the memory several times as often::

        loss = (standardized(student) - standardized(teacher)).square().mean() / 2
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        (hat_s, std_s), (hat_t, std_t) = _standardized(student), _standardized(teacher)
        gap = torch.sub(hat_s, hat_t, out=hat_t)
        squares = _norm(gap).square()
        ctx.save_for_backward(hat_s, gap, std_s, std_t, squares)
        return squares.sum() / (2 * gap.numel())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        hat_s, gap, std_s, std_t, squares = ctx.saved_tensors
        rest = max(gap.numel() // gap.shape[1] - 1, 1)
        # Σŝ² − Σt̂² is a small difference.
        shares = ((x.double() / (x.double() + PKD_EPS)).square() for x in (std_s, std_t))
        products = (squares + (rest * (next(shares) - next(shares))).to(squares.dtype)) / 2
        share = (products / (rest * std_s)).where(std_s > 0, 0)
        scale = gradient / gap.numel() / (std_s + PKD_EPS)
        return (gap * scale).addcmul_(hat_s, -share * gradient / gap.numel()), None


def _standardized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return :func:`standardized` without gradient, and the deviations."""
    cells = x.numel() // x.shape[1]
    centred = x - x.mean((2, 3)).mean(0)[:, None, None]
    deviation = _norm(centred) / max(cells - 1, 1) ** 0.5
    return centred.div_(deviation + PKD_EPS), deviation


def _norm(x: Tensor) -> Tensor:
    """Return the norm of each channel, (1, C, 1, 1)."""
    rows = torch.linalg.vector_norm(x, dim=(2, 3))
    return torch.linalg.vector_norm(rows, dim=0)[None, :, None, None]


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

"""Squared distances of maps, weighted by cell: what most losses on feature maps are."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def weighted_squares(
    student: Tensor, teacher: Tensor, weights: Tensor, channels: Tensor | None = None
) -> Tensor:
    """Return Σ W_k · a · (S − T)² of each weight k, (K,).

    The sum runs over images, channels and cells. The gradient takes one pass, whatever K is.

    Args:
        student, teacher: (N, C, H, W) in full precision. No gradient reaches the teacher.
        weights: (K, N, H, W) factors of the cells, without gradient.
        channels: (N, C) factors a of the channels, without gradient. None means 1.
    """
    sums: Tensor = _WeightedSquares.apply(
        student, teacher.detach(), weights.detach(), None if channels is None else channels.detach()
    )
    return sums


class _WeightedSquares(torch.autograd.Function):
    """The literal form, which keeps three maps and passes over the memory twice as often::

    squares = (student - teacher).square() * channels[:, :, None, None]
    sums = (weights * squares.sum(1)).sum((1, 2, 3))
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, channels: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, weights, channels)
        squares = (student - teacher).square_()
        if channels is None:
            cells = squares.sum(1)
        else:
            with torch.autocast(squares.device.type, enabled=False):  # keeps float32
                cells = (channels[:, None] @ squares.flatten(2)).view_as(weights[0])
        return (weights * cells).sum((1, 2, 3))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, weights, channels = ctx.saved_tensors
        factor = 2 * (gradient[:, None, None, None] * weights).sum(0)
        result = (student - teacher).mul_(factor[:, None])
        if channels is not None:
            result.mul_(channels[:, :, None, None])
        return result, None, None, None

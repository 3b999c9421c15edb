"""What every loss shares: precision on entry, shape checks, the connected zero."""

from collections.abc import Iterable

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """``x`` in float32, whatever the autocast state; float64 is kept for gradient checks."""
    return x if x.dtype == torch.float64 else x.float()


def same_shape(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in full precision.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape"
        )
    return full_precision(student), full_precision(teacher)


def mean_square(gap: Tensor) -> Tensor:
    """Mean of the squares; a connected zero for an empty tensor."""
    return gap.square().sum() / max(gap.numel(), 1)


def connected_zero(*tensors: Tensor, parameters: Iterable[Tensor] = ()) -> Tensor:
    """0 with a gradient path to every given tensor.

    DistributedDataParallel fails at the next iteration when a parameter got no gradient.
    ``(x * 0).sum()``, because ``x.sum() * 0`` overflows to NaN in half precision.
    """
    return sum((x * 0).sum() for x in (*tensors, *parameters))  # type: ignore[return-value]

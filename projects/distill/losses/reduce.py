"""Helpers of all losses: precision, shape checks, unit vectors, classes, the connected zero."""

from collections.abc import Iterable

import torch
from torch import Tensor

ZERO = 1e-6  # norm up to which a vector counts as zero


def full_precision(x: Tensor) -> Tensor:
    """Convert ``x`` to float32, whatever the autocast state.

    float64 is kept for gradient checks.
    """
    return x if x.dtype == torch.float64 else x.float()


def same_shape(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Check that the shapes agree and return both tensors in full precision.

    Raises:
        ValueError: if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape"
        )
    return full_precision(student), full_precision(teacher)


def same_cells(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Check that N, H and W agree and return both maps in full precision. C may differ.

    Raises:
        ValueError: if N, H or W differ.
    """
    if student.shape[:1] + student.shape[2:] != teacher.shape[:1] + teacher.shape[2:]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in batch "
            "or size"
        )
    return full_precision(student), full_precision(teacher)


def class_members(labels: Tensor, maps: Tensor, num_classes: int) -> Tensor:
    """Return which cells belong to each class, (N, K, H·W) bool.

    A label outside [0, num_classes) belongs to no class.

    Args:
        labels: (N, H, W) integers.
        maps: (N, C, H, W), read only for its shape.
        num_classes: K.

    Raises:
        ValueError: if the labels have another size than the maps.
    """
    if labels.shape != (len(maps), *maps.shape[2:]):
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit maps {tuple(maps.shape)}: "
            "they must be (N, H, W)"
        )
    classes = torch.arange(num_classes, device=labels.device)[:, None]
    return labels.flatten(1)[:, None] == classes


def length(x: Tensor, dim: int) -> Tensor:
    """Return the norm |x| along ``dim``, which is kept; ∞ for zero vectors.

    Divided by it, a cell of zeros (after a ReLU) has direction 0 and no gradient. With a small
    constant in place of ∞, its gradient would exceed all others, and overflow in half precision.
    """
    norm = x.norm(dim=dim, keepdim=True)
    return norm.where(norm > ZERO, torch.inf)


def unit(x: Tensor, dim: int) -> Tensor:
    """Scale ``x`` to length 1 along ``dim``; zero vectors stay zero."""
    return x / length(x, dim)


def mean_square(gap: Tensor) -> Tensor:
    """Return the mean of the squares; a connected zero for an empty tensor."""
    return gap.square().sum() / max(gap.numel(), 1)


def connected_zero(*tensors: Tensor, parameters: Iterable[Tensor] = ()) -> Tensor:
    """Return 0 with a gradient path to every given tensor.

    DistributedDataParallel fails in the next iteration if a parameter got no gradient. The form is
    ``(x * 0).sum()``, because ``x.sum() * 0`` overflows to NaN in half precision.
    """
    return sum((x * 0).sum() for x in (*tensors, *parameters))  # type: ignore[return-value]

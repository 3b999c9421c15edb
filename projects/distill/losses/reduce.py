"""What losses share: precision on entry, shape checks, directions, classes, the connected zero."""

from collections.abc import Iterable

import torch
from torch import Tensor

ZERO = 1e-6  # the norm up to which a vector counts as zero


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


def same_cells(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps in full precision; of the shapes all but the channels must agree.

    Raises:
        ValueError: N, H or W differ.
    """
    if student.shape[:1] + student.shape[2:] != teacher.shape[:1] + teacher.shape[2:]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in batch "
            "or size"
        )
    return full_precision(student), full_precision(teacher)


def class_members(labels: Tensor, maps: Tensor, num_classes: int) -> Tensor:
    """(N, K, H·W) bool: the cells of each class; none has those outside [0, num_classes).

    Raises:
        ValueError: the labels have another size than the maps.
    """
    if labels.shape != (len(maps), *maps.shape[2:]):
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit maps {tuple(maps.shape)}: "
            "they must be (N, H, W)"
        )
    classes = torch.arange(num_classes, device=labels.device)[:, None]
    return labels.flatten(1)[:, None] == classes


def length(x: Tensor, dim: int) -> Tensor:
    """|x| along ``dim``, which is kept; ∞ for zeros.

    Over it, a cell of zeros (after a ReLU) has the direction 0 and no gradient. Over a small
    constant its gradient would drown all others, and overflow in half precision.
    """
    norm = x.norm(dim=dim, keepdim=True)
    return norm.where(norm > ZERO, torch.inf)


def unit(x: Tensor, dim: int) -> Tensor:
    """``x`` at length 1 along ``dim``; zeros stay zeros."""
    return x / length(x, dim)


def mean_square(gap: Tensor) -> Tensor:
    """Mean of the squares; a connected zero for an empty tensor."""
    return gap.square().sum() / max(gap.numel(), 1)


def connected_zero(*tensors: Tensor, parameters: Iterable[Tensor] = ()) -> Tensor:
    """0 with a gradient path to every given tensor.

    DistributedDataParallel fails at the next iteration when a parameter got no gradient.
    ``(x * 0).sum()``, because ``x.sum() * 0`` overflows to NaN in half precision.
    """
    return sum((x * 0).sum() for x in (*tensors, *parameters))  # type: ignore[return-value]

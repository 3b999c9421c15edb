"""Intra-class feature variation distillation (IFVD; Wang et al., "Intra-class feature variation
distillation for semantic segmentation").
"""

import torch
from torch import Tensor

from .reduce import class_members, mean_square, same_cells, unit


def ifvd(student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """IFVD: squared difference of the similarities of each pixel with its class prototype.

    L = 1/(N·H·W) Σ_p (cos(s_p, s̄_p) − cos(t_p, t̄_p))²

    The prototype x̄_p is the mean feature of the pixels of p's class in p's image. The gradient
    also flows through the student's prototypes. As in the released code, an ignored pixel is its
    own prototype: it adds nothing, but counts in the mean.

    Args:
        student: (N, C, H, W).
        teacher: (N, C', H, W); no gradient reaches it.
        labels: (N, H, W) integers. Pixels outside [0, num_classes) are ignored.
        num_classes: K.

    Returns:
        A scalar >= 0 in float32; a connected zero for an empty batch.

    Raises:
        ValueError: if batches or sizes differ.
    """
    student, teacher = same_cells(student, teacher)
    member = class_members(labels, student, num_classes)
    return mean_square(_variation(student, member) - _variation(teacher.detach(), member))


def class_sums(cells: Tensor, member: Tensor) -> Tensor:
    """Return the (N, K, C) sums of (N, C, H·W) ``cells`` over each class."""
    with torch.autocast(cells.device.type, enabled=False):  # keeps the products in float32
        return torch.einsum("nkx,ncx->nkc", member.to(cells.dtype), cells)


def _variation(features: Tensor, member: Tensor) -> Tensor:
    """Return the (N, H·W) cosine of each pixel with its prototype, 0 for ignored pixels."""
    cells = features.flatten(2)
    prototypes = unit(class_sums(cells, member), 2)  # sum and mean have one direction
    with torch.autocast(cells.device.type, enabled=False):
        cosine = torch.einsum("nkc,ncx->nkx", prototypes, unit(cells, 1))
    return (cosine * member).sum(1)

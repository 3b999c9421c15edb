"""Structured knowledge distillation (SKD; Liu et al., "Structured knowledge distillation for
semantic segmentation").

This file has the pair-wise loss. The pixel-wise loss is ``pixel_kd``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reduce import length, mean_square, same_cells


def pairwise_affinity(student: Tensor, teacher: Tensor, scale: float = 0.5) -> Tensor:
    """SKD's pair-wise loss: squared difference of the similarities of all pairs of nodes.

    L = 1/(N·M²) Σ_ij (a_ij^T − a_ij^S)², a_ij = x_i·x_j / (|x_i| |x_j|)

    The M nodes are the maxima over patches of ⌊scale·H⌋ × ⌊scale·W⌋ cells, at least one cell. The
    rest at the border forms smaller patches. As in the released code, no gradient flows through the
    norms.

    Args:
        student: (N, C, H, W).
        teacher: (N, C', H, W); no gradient reaches it.
        scale: side of a patch relative to that of the map, in (0, 1].

    Returns:
        A scalar >= 0 in float32; a connected zero for an empty batch.

    Raises:
        ValueError: if batches or sizes differ, or ``scale`` is outside (0, 1].
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale must be in (0, 1], got {scale}")
    student, teacher = same_cells(student, teacher)
    patch = [max(int(scale * side), 1) for side in student.shape[2:]]
    gap = _affinity(teacher.detach(), patch) - _affinity(student, patch)
    return mean_square(gap)


def _affinity(features: Tensor, patch: list[int]) -> Tensor:
    """Return the (N, M, M) cosines of the nodes."""
    nodes = F.max_pool2d(features, patch, ceil_mode=True).flatten(2)
    nodes = nodes / length(nodes.detach(), 1)
    with torch.autocast(nodes.device.type, enabled=False):  # keeps the products in float32
        return nodes.transpose(1, 2) @ nodes

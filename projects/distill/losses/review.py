"""ReviewKD (Chen et al., "Distilling knowledge via knowledge review")."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .fitnet import fitnet
from .reduce import same_shape

HCL_SIDES = (4, 2, 1)  # sides of the pooled maps, in cells


def hcl(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """ReviewKD's hierarchical context loss (HCL): mean squared errors of maps at several scales.

    L = Σ_levels (e₀ + Σ_k 2^−k e_k) / (1 + Σ_k 2^−k)

    e₀ is the mean squared error of the maps. e₁, e₂ and e₃ are those of the maps pooled to 4 x 4,
    2 x 2 and 1 x 1 cells (Fig. 3). A size that is not below the number of rows of the map is left
    out; k counts the others.

    Args:
        students, teachers: one (N, C, H, W) map per level. The students' are fused and adapted. No
            gradient reaches the teachers.

    Returns:
        A scalar >= 0, the sum over the levels; a connected zero for an empty batch.

    Raises:
        ValueError: if shapes or numbers of levels differ.
    """
    total = students[0].new_zeros(())
    for student, teacher in zip(students, teachers, strict=True):
        total = total + _level(*same_shape(student, teacher.detach()))
    return total


def _level(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss of one level."""
    loss, weight, weights = fitnet(student, teacher), 1.0, 1.0
    for side in HCL_SIDES:
        if side < student.shape[2]:
            weight /= 2
            pooled = (F.adaptive_avg_pool2d(x, side) for x in (student, teacher))
            loss = loss + weight * fitnet(*pooled)
            weights += weight
    return loss / weights

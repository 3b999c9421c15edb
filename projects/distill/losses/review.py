"""ReviewKD (Chen et al., "Distilling knowledge via knowledge review")."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .fitnet import fitnet
from .reduce import same_shape

HCL_SIDES = (4, 2, 1)  # of the pooled maps


def hcl(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Hierarchical context loss: mean squared errors of maps and of what they are pooled to.

    Of a level (e₀ + Σ_k 2^−k e_k) / (1 + Σ_k 2^−k), with e₀ of the map and e₁, e₂, … of it
    pooled to 4 x 4, 2 x 2 and 1 x 1 cells, as far as these are fewer than the map's rows (Fig. 3).

    Args:
        students, teachers: (N, C, H, W) a level; the students' are fused and adapted. No gradient
            reaches the teachers.

    Returns:
        A scalar >= 0, the sum over the levels.

    Raises:
        ValueError: shapes or numbers of levels differ.
    """
    total = students[0].new_zeros(())
    for student, teacher in zip(students, teachers, strict=True):
        total = total + _level(*same_shape(student, teacher.detach()))
    return total


def _level(student: Tensor, teacher: Tensor) -> Tensor:
    loss, weight, weights = fitnet(student, teacher), 1.0, 1.0
    for side in HCL_SIDES:
        if side < student.shape[2]:
            weight /= 2
            pooled = (F.adaptive_avg_pool2d(x, side) for x in (student, teacher))
            loss = loss + weight * fitnet(*pooled)
            weights += weight
    return loss / weights

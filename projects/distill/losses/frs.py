"""FRS (Du et al., "Distilling object detectors with feature richness")."""

import torch.nn.functional as F
from torch import Tensor

from .fgfi import on_cells
from .reduce import full_precision, same_shape
from .squares import weighted_squares


def frs(student: Tensor, teacher: Tensor, score: Tensor) -> Tensor:
    """FRS's feature loss of one level: Σ score · (T − S)² / Σ score, summed over channels (Eq. 3).

    Args:
        student, teacher: (N, C, H, W), the student adapted to the teacher's channels. No gradient
            reaches the teacher.
        score: (N, H, W) >= 0 from :func:`feature_richness`; no gradient reaches it.

    Returns:
        A scalar >= 0; a connected zero where the scores are all 0.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    score = on_cells(score, student)
    return _mean(weighted_squares(student, teacher, score[None])[0], score)


def frs_classes(student: Tensor, teacher: Tensor, score: Tensor) -> Tensor:
    """FRS's class loss of one level: Σ score · BCE(σ(S), σ(T)) / Σ score (Eq. 4).

    The sum runs over the cells and their A·K logits.

    Args:
        student, teacher: (N, A·K, H, W) class logits of A anchors. No gradient reaches the teacher.
        score: see :func:`frs`.

    Returns:
        A scalar >= 0; a connected zero where the scores are all 0.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    entropy = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")
    score = on_cells(score, student)
    return _mean((score * entropy.sum(1)).sum(), score)


def feature_richness(logits: Tensor) -> Tensor:
    """Return FRS's score: the teacher's largest probability at each cell (Eq. 2).

    Args:
        logits: (N, A·K, H, W) of classes, or of objectness.

    Returns:
        (N, H, W) in [0, 1], without gradient.
    """
    return full_precision(logits.detach()).amax(1).sigmoid()


def _mean(error: Tensor, score: Tensor) -> Tensor:
    """Return the sum of weighted errors over that of the scores; 0 where these are all 0."""
    total = score.sum()
    return error / total.where(total > 0, 1)

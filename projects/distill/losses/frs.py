"""FRS (Du et al., "Distilling object detectors with feature richness")."""

import torch.nn.functional as F
from torch import Tensor

from .fgfi import on_cells
from .reduce import full_precision, same_shape


def frs(student: Tensor, teacher: Tensor, score: Tensor) -> Tensor:
    """Σ score · (T − S)² / Σ score of one level, a sum over the channels (Eq. 3).

    Args:
        student, teacher: (N, C, H, W), the student adapted to the teacher's channels. No gradient
            reaches the teacher.
        score: (N, H, W) >= 0 of :func:`feature_richness`.

    Returns:
        A scalar >= 0; a connected zero where the scores are all 0.

    Raises:
        ValueError: shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    return _weighted((student - teacher).square().sum(1), on_cells(score, student))


def frs_classes(student: Tensor, teacher: Tensor, score: Tensor) -> Tensor:
    """Σ score · BCE(σ(S), σ(T)) / Σ score of the class logits of one level (Eq. 4).

    Args:
        student, teacher: (N, A·K, H, W) logits. No gradient reaches the teacher.
        score: as of :func:`frs`.

    Raises:
        ValueError: shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    entropy = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")
    return _weighted(entropy.sum(1), on_cells(score, student))


def feature_richness(logits: Tensor) -> Tensor:
    """(N, H, W) in [0, 1]: the teacher's largest probability at each cell (Eq. 2).

    Args:
        logits: (N, A·K, H, W) of classes, or of objectness.
    """
    return full_precision(logits.detach()).amax(1).sigmoid()


def _weighted(error: Tensor, score: Tensor) -> Tensor:
    total = score.sum()
    return (score * error).sum() / total.where(total > 0, 1)

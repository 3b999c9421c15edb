"""LD (Zheng et al., "Localization distillation for dense object detection")."""

from torch import Tensor

from .kd import categorical_kl


def ld(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Σ weight · T² · mean over the bins of q (log q − log p), q the teacher's softmax (Eq. 3).

    The mean over the bins and the missing normaliser over the rows are the released code's.

    Args:
        student, teacher: (P, bins) logits of the sides of boxes, or of classes. No gradient
            reaches the teacher.
        weight: (P,) >= 0.
        temperature: T > 0.

    Returns:
        A scalar >= 0; a connected zero for no rows.

    Raises:
        ValueError: shapes differ.
    """
    divergence = categorical_kl(student, teacher.detach(), temperature)
    if weight.shape != divergence.shape:
        raise ValueError(
            f"weight {tuple(weight.shape)} does not fit logits {tuple(student.shape)}: it must be "
            "(P,)"
        )
    return (weight.detach() * divergence).sum() / max(student.shape[1], 1)

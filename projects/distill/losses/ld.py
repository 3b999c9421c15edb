"""LD (Zheng et al., "Localization distillation for dense object detection")."""

from torch import Tensor

from .kd import categorical_kl


def ld(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Localization distillation: weighted KL of the distributions of the box sides (Eq. 3).

    L = Σ_p w_p T² 1/bins Σ_bin q (log q − log p), q the teacher's softmax and p the student's at T

    The mean over the bins, and the sum over the rows instead of a mean, follow the released code.

    Args:
        student, teacher: (P, bins) logits of the sides of boxes, or of classes. No gradient
            reaches the teacher.
        weight: (P,) w >= 0; no gradient reaches it.
        temperature: T > 0.

    Returns:
        A scalar >= 0; a connected zero without rows.

    Raises:
        ValueError: if shapes differ.
    """
    divergence = categorical_kl(student, teacher.detach(), temperature)
    if weight.shape != divergence.shape:
        raise ValueError(
            f"weight {tuple(weight.shape)} does not fit logits {tuple(student.shape)}: it must be "
            "(P,)"
        )
    return (weight.detach() * divergence).sum() / max(student.shape[1], 1)

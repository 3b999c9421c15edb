"""Divergences between predictions (Hinton et al., "Distilling the knowledge in a neural network").

KL(P || Q) = Σ P (log P − log Q) with P the teacher; T² keeps the gradient's size independent of T.
"""

import torch.nn.functional as F
from torch import Tensor

from .reduce import same_shape


def categorical_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · KL(softmax(t / T) || softmax(s / T)) of each row, or of each pixel.

    Args:
        student, teacher: (N, K, ...) logits.
        temperature: T > 0.

    Returns:
        (N, ...) >= 0.
    """
    student, teacher = same_shape(student, teacher)
    log_q = F.log_softmax(student / temperature, dim=1)
    log_p = F.log_softmax(teacher / temperature, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1) * temperature**2


def kd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean of :func:`categorical_kl` over the rows; a connected zero for none."""
    loss = categorical_kl(student, teacher, temperature)
    return loss.sum() / max(len(loss), 1)


def pixel_kd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean of :func:`categorical_kl` over the pixels of all pictures.

    Labels are not read: pixels that the task ignores count, too. CIRKD's released code takes the
    same mean; SKD's sums over the pictures, IFVD's also divides by K.

    Args:
        student, teacher: (N, K, H, W) logits of semantic segmentation.
        temperature: T > 0.

    Returns:
        A scalar >= 0; a connected zero for an empty batch.
    """
    loss = categorical_kl(student, teacher, temperature)
    return loss.sum() / max(loss.numel(), 1)


def binary_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · KL(Bernoulli(σ(t / T)) || Bernoulli(σ(s / T))) of each element.

    Args:
        student, teacher: logits of the same shape.
        temperature: T > 0.

    Returns:
        The elements' divergences >= 0, of the same shape, finite for every finite logit.
    """
    student, teacher = same_shape(student, teacher)
    s, t = student / temperature, teacher / temperature
    p = t.sigmoid()
    # Cross entropy minus entropy by the same formula: exactly 0 at s = t, few temporaries.
    cross_entropy = F.binary_cross_entropy_with_logits(s, p, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(t, p, reduction="none")
    return (cross_entropy - entropy) * temperature**2

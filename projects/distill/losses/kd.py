"""Divergences of predictions (Hinton et al., "Distilling the knowledge in a neural network").

KL(P || Q) = Σ P (log P − log Q), where P is the teacher. The factor T² keeps the size of the
gradient independent of T. A gradient reaches both arguments: detach the teacher.
"""

import torch.nn.functional as F
from torch import Tensor

from .reduce import same_shape


def categorical_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Softmax divergence of each row or pixel: T² · KL(softmax(t / T) || softmax(s / T)).

    Args:
        student, teacher: (N, K, ...) logits s and t; the softmax runs over K.
        temperature: T > 0.

    Returns:
        (N, ...) >= 0 (up to rounding).

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher)
    log_q = F.log_softmax(student / temperature, dim=1)
    log_p = F.log_softmax(teacher / temperature, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1) * temperature**2


def kd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Hinton's knowledge distillation: the mean of :func:`categorical_kl` over the rows.

    L = T²/N Σ_n KL(softmax(t_n / T) || softmax(s_n / T))

    Args:
        student, teacher: (N, K) logits.
        temperature: T > 0.

    Returns:
        A scalar >= 0 (up to rounding); a connected zero without rows.

    Raises:
        ValueError: if shapes differ.
    """
    loss = categorical_kl(student, teacher, temperature)
    return loss.sum() / max(len(loss), 1)


def pixel_kd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Pixel-wise knowledge distillation: the mean of :func:`categorical_kl` over all pixels.

    Labels are not read: pixels that the task ignores count, too. CIRKD's released code takes the
    same mean. SKD's sums over the images, and IFVD's also divides by K.

    Args:
        student, teacher: (N, K, H, W) logits of semantic segmentation.
        temperature: T > 0.

    Returns:
        A scalar >= 0 (up to rounding); a connected zero for an empty batch.

    Raises:
        ValueError: if shapes differ.
    """
    loss = categorical_kl(student, teacher, temperature)
    return loss.sum() / max(loss.numel(), 1)


def binary_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Sigmoid divergence of each element: T² · KL(Bernoulli(σ(t / T)) || Bernoulli(σ(s / T))).

    The literal form, which is not finite for large logits::

        p, q = (teacher / T).sigmoid(), (student / T).sigmoid()
        kl = T**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())

    Args:
        student, teacher: logits s and t of the same shape.
        temperature: T > 0.

    Returns:
        Divergences >= 0 (up to rounding) of the same shape, finite for every finite logit.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher)
    s, t = student / temperature, teacher / temperature
    p = t.sigmoid()
    # Cross entropy and entropy by the same formula: exactly 0 at s = t, few temporaries.
    cross_entropy = F.binary_cross_entropy_with_logits(s, p, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(t, p, reduction="none")
    return (cross_entropy - entropy) * temperature**2

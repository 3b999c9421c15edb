"""Class distillation of dense detectors."""

from torch import Tensor

from .kd import binary_kl
from .reduce import full_precision


def dense_kd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Bernoulli KL of dense class logits, weighted by the teacher's confidence.

    L = Σ_a w_a Σ_k KL_ak / Σ_a w_a, w_a = max_k σ(t_ak)

    Nearly all anchors are background, on which both networks agree. The weight lets the few anchors
    decide on which the teacher sees an object.

    Args:
        student, teacher: (..., K) logits of independent sigmoids. Detach the teacher's: a gradient
            reaches both.
        temperature: T > 0 of the divergence. The weight is taken at T = 1.

    Returns:
        The numerator and the sum of the weights, both scalars >= 0. The caller divides, after the
        sum is reduced over processes.

    Raises:
        ValueError: if shapes differ.
    """
    weight = full_precision(teacher).sigmoid().amax(dim=-1)
    divergence = binary_kl(student, teacher, temperature).sum(dim=-1)
    return (weight * divergence).sum(), weight.sum()

"""Classification distillation of dense heads."""

from torch import Tensor

from .kd import binary_kl
from .reduce import full_precision


def dense_kd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Bernoulli KL of dense class logits, weighted by the teacher's confidence.

    L = Σ_a w_a Σ_k KL_ak / Σ_a w_a, w_a = max_k σ(t_ak). Nearly all anchors are background on
    which both agree; the weight lets the few that the teacher believes in decide.

    Args:
        student, teacher: (..., K) logits of independent sigmoids.
        temperature: T > 0 of the divergence; the weight is taken at T = 1.

    Returns:
        The numerator and the weights' sum, both scalars: the caller divides after it has
        reduced the sum over processes.
    """
    weight = full_precision(teacher).sigmoid().amax(dim=-1)
    divergence = binary_kl(student, teacher, temperature).sum(dim=-1)
    return (weight * divergence).sum(), weight.sum()

"""DKD (Zhao et al., "Decoupled knowledge distillation")."""

import torch
from torch import Tensor

from .kd import categorical_kl
from .reduce import same_shape


def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """Mean of :func:`dkd_rows`; a connected zero for no rows."""
    rows = dkd_rows(student, teacher, target, alpha, beta, temperature)
    return rows.sum() / max(len(rows), 1)


def dkd_rows(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """T² (α TCKD + β NCKD) of each row (Eq. 7).

    TCKD = KL of (p, 1 − p), p the probability of the target class; NCKD = KL of the distributions
    over the other classes. Hinton's KD is TCKD + (1 − p) NCKD with the teacher's p (Eq. 6), so
    α = β = 1 is more than KD where the teacher is sure of the target.

    Args:
        student, teacher: (N, K) logits. No gradient reaches the teacher.
        target: (N,) in [0, K).
        alpha, beta: factors of both parts.
        temperature: T > 0.

    Returns:
        (N,) >= 0.

    Raises:
        ValueError: shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    if target.shape != student.shape[:1]:
        raise ValueError(
            f"target {tuple(target.shape)} does not fit logits {tuple(student.shape)}: it must be "
            "(N,)"
        )
    at_target = torch.zeros_like(student, dtype=torch.bool).scatter(1, target[:, None], True)
    pairs = [_split(x, at_target, temperature) for x in (student, teacher)]
    of_target, of_rest = (categorical_kl(s, t) for s, t in zip(*pairs))
    return (alpha * of_target + beta * of_rest) * temperature**2


def _split(logits: Tensor, at_target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(N, 2) log probabilities of the target and of all else, (N, K) logits without the target.

    The target's logit is the lowest there is instead of −∞, whose products would be undefined.
    """
    logits = logits / temperature
    lowest = torch.finfo(logits.dtype).min / 2
    rest = logits.masked_fill(at_target, lowest)
    target = logits.masked_fill(~at_target, lowest).amax(1)
    return torch.stack([target, rest.logsumexp(1)], 1), rest

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
    """Decoupled knowledge distillation: the mean of :func:`dkd_rows` over the rows (Eq. 7).

    Args:
        student, teacher, target, alpha, beta, temperature: see :func:`dkd_rows`.

    Returns:
        A scalar >= 0; a connected zero without rows.

    Raises:
        ValueError: if shapes differ.
    """
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
    """Decoupled knowledge distillation of each row: T² (α TCKD + β NCKD) (Eq. 7).

    TCKD is the KL of (p, 1 − p), where p is the probability of the target class. NCKD is the KL of
    the distributions over the other classes. Hinton's KD is TCKD + (1 − p) NCKD with the teacher's
    p (Eq. 6). So α = β = 1 is more than KD where the teacher is sure of the target.

    Args:
        student, teacher: (N, K) logits. No gradient reaches the teacher.
        target: (N,) class indices in [0, K).
        alpha, beta: α and β, the factors of the two parts.
        temperature: T > 0.

    Returns:
        (N,) >= 0.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    if target.shape != student.shape[:1]:
        raise ValueError(
            f"target {tuple(target.shape)} does not fit logits {tuple(student.shape)}: it must be "
            "(N,)"
        )
    at_target = torch.zeros_like(student, dtype=torch.bool).scatter(1, target[:, None], True)
    pairs = [_split(x, at_target, temperature) for x in (student, teacher)]
    target_kl, rest_kl = (categorical_kl(s, t) for s, t in zip(*pairs))
    return (alpha * target_kl + beta * rest_kl) * temperature**2


def _split(logits: Tensor, at_target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (N, 2) logits of target and rest, and (N, K) logits without the target.

    The target's logit is replaced by half the lowest number of the type. Products with −∞ would be
    undefined.
    """
    logits = logits / temperature
    lowest = torch.finfo(logits.dtype).min / 2
    rest = logits.masked_fill(at_target, lowest)
    target = logits.masked_fill(~at_target, lowest).amax(1)
    return torch.stack([target, rest.logsumexp(1)], 1), rest

"""Channel-wise distillation (CWD; Shu et al., "Channel-wise knowledge distillation for dense
prediction").
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .normalize import NORMALIZE, channel_normalized
from .reduce import same_shape


def cwd(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, normalize: str = "none"
) -> Tensor:
    """Channel-wise distillation: divergence of each channel's distribution over the cells.

    L = 𝒯²/(N·C) Σ_c Σ_i φ(T) log(φ(T)/φ(S)), φ the softmax over the H·W cells of a channel at 𝒯

    On logits the authors use 𝒯 = 4 and weight 3. A channel is then a class, and the resolution is
    that before upsampling. On features they use weight 50. There is no division by H·W.

    With ``normalize`` "channel" both maps are normalized by
    :func:`~distill.losses.channel_normalized` before, as MMYOLO does for RTMDet, with weight 1. A
    map with fewer than eight values per channel then has no loss.

    Args:
        student, teacher: (N, C, H, W) logits, or features already adapted to the teacher's
            channels. No gradient reaches the teacher.
        temperature: 𝒯 > 0.
        normalize: "none" or "channel".

    Returns:
        A scalar >= 0 (up to rounding); a connected zero for an empty batch.

    Raises:
        ValueError: if shapes differ, ``temperature`` is not above 0, or ``normalize`` is unknown.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be none or channel, got {normalize!r}")
    student, teacher = same_shape(student, teacher)
    if normalize == "channel":
        (student, teacher), enough = channel_normalized(student, teacher)
        return cwd(student, teacher, temperature) * enough
    if student.numel() == 0:
        return student.sum()
    logits = (x.flatten(2) for x in (student, teacher.detach()))
    if temperature != 1:
        logits = (x / temperature for x in logits)
    divergence: Tensor = _Divergence.apply(*logits)
    return divergence * temperature**2 / (student.shape[0] * student.shape[1])


class _Divergence(torch.autograd.Function):
    """Σ φ(T) log(φ(T)/φ(S)) of logits, φ the softmax over the last dimension.

    The gradient is φ(S) − φ(T). The literal form, which passes over the memory twice as often::

        log_s, log_t = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
        divergence = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        log_s, log_t = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
        target = log_t.exp()
        divergence = log_t.sub_(log_s).mul_(target).sum()
        ctx.save_for_backward(log_s.exp_().sub_(target))
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradient, None

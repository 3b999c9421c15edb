"""Multi-knowledge distillation (MKD, Sec. 3): four losses on feature maps."""

import math
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .cwd import cwd
from .frequency import masked_energy
from .normalize import NORMALIZE, channel_normalized
from .reduce import connected_zero, mean_square, same_shape

ATTENTION_TEMPERATURE = 0.5  # τ of the spatial attention; the paper gives no value
DISTANCE_EPS = 1e-6  # below the root of a distance, whose gradient is infinite at 0
MKD_TERMS = ("fea", "multiscale", "fdmd", "fad")


def multi_scale(
    student: Tensor, teacher: Tensor, scales: Sequence[int] = (1, 2, 4), power: int = 2
) -> Tensor:
    """MKD's multi-scale loss: distance of average-pooled maps (L_Multiscale, Eq. 1).

    L = 1/(N·C·H·W) Σ_k Σ_nc d_nc, d_nc = ‖pool_k(T) − pool_k(S)‖² over the pooled cells

    pool_k has kernel = stride = k, and ``ceil_mode``. H·W is the unpooled size for every k, as
    printed. The printed l2 may be the distance itself: with ``power`` 1, d is √(‖·‖² + ε), so that
    the loss of equal maps is √ε/(H·W) for each k. The paper leaves open the scales, and the mean
    over N and C. A scale above min(H, W), whose windows would not fill the map, is dropped.

    Args:
        student, teacher: (N, C, H, W). Detach the teacher: a gradient reaches both.
        scales: k >= 1 in cells.
        power: 2 for the squared distance, 1 for the distance.

    Returns:
        A scalar >= 0; a connected zero for an empty batch, or if all scales are dropped.

    Raises:
        ValueError: if shapes differ, a scale is below 1, or ``power`` is neither 1 nor 2.
    """
    if not scales or min(scales) < 1:
        raise ValueError(f"scales must be at least 1 each, got {tuple(scales)}")
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    student, teacher = same_shape(student, teacher)
    gap = student - teacher
    return _multi_scale(gap, scales, power, mean_square(gap))


def channel_alignment(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, attention: bool = True
) -> Tensor:
    """MKD's alignment loss: divergence of each channel's distribution over cells (L_FAD, Eq. 5).

    L = 𝒯²/(N·C) Σ_c Σ_i φ(G^T) log(φ(G^T)/φ(G^S)), G = A ⊙ map, φ = softmax over H·W cells at 𝒯

    A is the sum of both networks' spatial attention H·W·softmax(mean_c|x| / τ), divided by its
    maximum. No gradient flows through A. With a mean of 1 instead, φ collapses onto about one cell
    and the gradient grows a thousandfold. The paper leaves open the form of the attention and 𝒯.

    Args:
        student, teacher: (N, C, H, W). No gradient reaches the teacher.
        temperature: 𝒯 > 0.
        attention: False compares the maps themselves (A = 1), as :func:`~distill.losses.cwd`.

    Returns:
        A scalar >= 0 (up to rounding); a connected zero for an empty batch.

    Raises:
        ValueError: if shapes differ, or ``temperature`` is not above 0.
    """
    student, teacher = same_shape(student, teacher)
    if attention and student.numel():
        area = joint_attention(student, teacher)
        student, teacher = student * area, teacher * area
    return cwd(student, teacher, temperature)


@torch.no_grad()
def joint_attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Return A of :func:`channel_alignment`, (N, 1, H, W) in (0, 1], without gradient."""
    area = sum(
        (x.abs().mean(1).flatten(1) / ATTENTION_TEMPERATURE).softmax(1) for x in (student, teacher)
    )
    assert isinstance(area, Tensor)
    area = area / area.amax(1, keepdim=True)  # H·W cancels here
    return area.view(len(student), 1, *student.shape[2:])


def mkd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    terms: Collection[str] = MKD_TERMS,
    scales: Sequence[int] = (1, 2, 4),
    temperature: float = 1.0,
    attention: bool = True,
    power: int = 2,
    normalize: str = "none",
) -> dict[str, Tensor]:
    """Multi-knowledge distillation of one level: its terms by name (Eq. 6 without α).

    ``fea`` is :func:`~distill.losses.fitnet`, and ``multiscale`` is :func:`multi_scale`. ``fdmd``
    is :func:`~distill.losses.frequency_masked_mse`, and ``fad`` is :func:`channel_alignment`.
    Quantities that several terms need are computed once.

    The text combines the terms "when the normalization is achieved in the channel dimension", and
    leaves open which maps are normalized. With ``normalize`` "channel" both maps are, by
    :func:`~distill.losses.channel_normalized`, before all terms. Then the size of a map's values
    does not matter. A map with fewer than eight values per channel has no loss: two values become
    ±1 whatever they are.

    Args:
        student, teacher: (N, C, H, W). Detach the teacher.
        mask: (N, 1, H, W // 2 + 1) of ``fdmd``. None masks nothing: ``fdmd`` is then ``fea``.
        terms: names of the terms to compute.
        scales, power: options of ``multiscale``.
        temperature, attention: options of ``fad``.
        normalize: "none" or "channel".

    Returns:
        One scalar >= 0 (up to rounding) per term; connected zeros for an empty batch.

    Raises:
        ValueError: if a term or ``normalize`` is unknown, or as in the functions above.
    """
    unknown = set(terms) - set(MKD_TERMS)
    if unknown:
        raise ValueError(f"terms must be among {', '.join(MKD_TERMS)}, got {sorted(unknown)}")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be none or channel, got {normalize!r}")
    student, teacher = same_shape(student, teacher)
    if normalize == "channel":
        (student, teacher), enough = channel_normalized(student, teacher)
        found = mkd(student, teacher, mask, terms, scales, temperature, attention, power)
        return {name: loss * enough for name, loss in found.items()}
    losses = {}
    gap = student - teacher
    square = mean_square(gap)
    if "fea" in terms:
        losses["fea"] = square
    if "multiscale" in terms:
        losses["multiscale"] = _multi_scale(gap, scales, power, square)
    if "fdmd" in terms:
        losses["fdmd"] = square if mask is None else masked_energy(gap, teacher, mask)
    if "fad" in terms:
        losses["fad"] = channel_alignment(student, teacher, temperature, attention)
    return losses


def _multi_scale(gap: Tensor, scales: Sequence[int], power: int, square: Tensor) -> Tensor:
    """Return :func:`multi_scale` from ``gap`` = S − T.

    Pooling is linear, so that pool(T) − pool(S) = pool(T − S).

    Args:
        square: the term of k = 1 and power 2.
    """
    cells = math.prod(gap.shape[2:])
    terms = []
    for k in scales if gap.numel() else ():
        if k == 1 and power == 2:
            terms.append(square)
        elif k <= min(gap.shape[2:]):
            distance = F.avg_pool2d(gap, k, ceil_mode=True).square().sum((2, 3))
            distance = distance if power == 2 else (distance + DISTANCE_EPS).sqrt()
            terms.append(distance.mean() / cells)
    return torch.stack(terms).sum() if terms else connected_zero(gap)

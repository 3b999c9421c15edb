"""Instance mask alignment (IMA; Sec. "Methods", Eq. 1-10, Algorithm 1).

Steps 2 to 4 of :func:`ima` need only means, variances and the covariance of each channel. These
*moments* come from the spectra (Parseval), so that no map is transformed back, standardized or
scaled.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .frequency import energy, frequency_filtered, product
from .reduce import class_members, full_precision, same_shape

IMA_STATISTICS = ("instance", "image")
EPS = 1e-5  # added to the variances of Eq. 6; the paper gives no value


class Moments(NamedTuple):
    """Means, variances and covariance over the cells of each instance and channel, (N, C) each."""

    mean_s: Tensor
    mean_t: Tensor
    var_s: Tensor
    var_t: Tensor
    cov: Tensor


class Alignment(NamedTuple):
    """Options of steps 2 and 3; see :func:`ima`."""

    standardize: bool
    standardize_teacher: bool
    deflate: bool
    scale_on: str
    scale_floor: float
    statistics: str = "instance"


def ima(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    standardize: bool = True,
    standardize_teacher: bool = True,
    deflate: bool = True,
    scale_on: str = "standardized",
    scale_floor: float = 0.1,
    weight: Tensor | None = None,
) -> Tensor:
    """Instance mask alignment: masked frequencies, standardization, scale deflation, squared error.

    1. F̂ = F⁻¹(M ⊙ F(S)) (Eq. 2-4); skipped if ``mask`` is None.
    2. F ← (F − μ)/√(σ² + 1e-5) per instance and channel, biased σ² (Eq. 5-7).
    3. F̃ = α F, α = clamp(cos(F^S, F^T), 0, 1) over the instance's flattened maps (Eq. 8-10), then
       α ← f + (1 − f) α. No gradient flows through α.
    4. L = mean over instances of the mean over channels and cells of (F̃^S − F^T)² (Eq. 4).

    The literal form for one instance of shape (C, cells) without ``weight``, after step 1::

        s, t = (F.batch_norm(x[None], None, None, training=True, eps=EPS)[0] for x in (s, t))
        cosine = F.cosine_similarity(s.flatten(), t.flatten(), dim=0)
        alpha = scale_floor + (1 - scale_floor) * cosine.clamp(0, 1).detach()
        loss = (alpha * s - t).square().mean()

    The paper leaves open ε, which maps Eq. 8 compares, and whether the teacher is standardized
    (Eq. 7: no, Eq. 15: yes). It also leaves open the case of a negative cosine. There the clamped
    α = 0 would be an exactly zero gradient for ever, hence the floor f. The paper to the letter is
    ``scale_on="raw", scale_floor=0, standardize_teacher=False``.

    Args:
        student, teacher: (N, C, H, W), one instance per batch entry. Detach the teacher: a gradient
            reaches both.
        mask: (N, 1, H, W // 2 + 1) from ``frequency_mask``, applied to the student. None skips
            step 1.
        standardize: True for step 2.
        standardize_teacher: True for step 2 of the teacher, too. Read only if ``standardize``.
        deflate: True for step 3.
        scale_on: maps of the cosine, "standardized" (after step 2) or "raw" (before it).
        scale_floor: f in [0, 1].
        weight: (N, 1, H, W) >= 0, the instance's share of each cell. It enters μ, σ, α and the
            loss. An instance whose weights are all 0 counts as a full rectangle. None means all
            cells.

    Returns:
        A scalar >= 0 (up to rounding); a connected zero without instances.

    Raises:
        ValueError: if shapes differ, or ``scale_on`` or ``scale_floor`` is invalid.
    """
    student, teacher = same_shape(student, teacher)
    if len(student) == 0:
        return student.sum()
    moments = instance_moments(student, teacher, mask, weight)
    align = Alignment(standardize, standardize_teacher, deflate, scale_on, scale_floor)
    return _aligned(moments, align).mean()


def ima_classes(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    num_classes: int,
    mask: Tensor | None = None,
    standardize: bool = True,
    standardize_teacher: bool = True,
    deflate: bool = True,
    scale_on: str = "standardized",
    scale_floor: float = 0.1,
    statistics: str = "instance",
) -> tuple[Tensor, Tensor]:
    """Instance mask alignment with one instance per class and image; see :func:`ima`.

    The cells of a class do not form a rectangle. Therefore the frequency mask acts on the whole
    map. Statistics, α and the loss run over the cells of the instance.

    With ``statistics`` "image", step 2 takes μ and σ of all labelled cells of the image. Those of
    an instance would remove the mean of each class, which is what tells classes apart. The paper
    has no version for segmentation.

    Args:
        student, teacher: (N, C, H, W). Detach the teacher: a gradient reaches both.
        labels: (N, H, W) int64. Values outside [0, num_classes) belong to no instance.
        num_classes: K.
        mask: (N, 1, H, W // 2 + 1) from ``frequency_mask``, applied to the student. None skips
            step 1.
        standardize, standardize_teacher, deflate, scale_on, scale_floor: see :func:`ima`.
        statistics: "instance" or "image".

    Returns:
        The sum of the losses of the instances that have a cell, and their number, both scalars.

    Raises:
        ValueError: as :func:`ima`, or if the labels have another size than the maps, or
            ``statistics`` is invalid.
    """
    if statistics not in IMA_STATISTICS:
        raise ValueError(f"statistics must be 'instance' or 'image', got {statistics!r}")
    student, teacher = same_shape(student, teacher)
    member = class_members(labels, student, num_classes)
    if len(student) == 0:
        return student.sum(), student.new_zeros(())
    moments, cells = class_moments(student, teacher, member, mask)
    align = Alignment(standardize, standardize_teacher, deflate, scale_on, scale_floor, statistics)
    losses = _aligned(moments, align, image_moments(moments, cells))
    present = (cells > 0).flatten().to(student.dtype)
    return (losses * present).sum(), present.sum()


def instance_moments(
    student: Tensor, teacher: Tensor, mask: Tensor | None, weight: Tensor | None
) -> Moments:
    """Return the moments of the instances of :func:`ima`.

    Args:
        student, teacher, mask, weight: those of :func:`ima`, in full precision.
    """
    if weight is None and mask is not None:
        return _spectral_moments(student, teacher, mask)
    return _spatial_moments(frequency_filtered(student, mask), teacher, weight)


def class_moments(
    student: Tensor, teacher: Tensor, member: Tensor, mask: Tensor | None
) -> tuple[Moments, Tensor]:
    """Return the moments of the instances of :func:`ima_classes`.

    Args:
        student, teacher, mask: those of :func:`ima_classes`, in full precision.
        member: (N, K, H·W) bool, True for the cells of each class.

    Returns:
        The moments of N·K instances, 0 without cells, and the (N, K) numbers of their cells.
    """
    student = frequency_filtered(student, mask)
    member = member.to(student.dtype)
    with torch.autocast(student.device.type, enabled=False):  # keeps the products in float32
        moments = _class_moments(student.flatten(2), teacher.flatten(2), member)
    return moments, member.sum(2)


def image_moments(moments: Moments, cells: Tensor) -> Moments:
    """Return the moments of the image of each instance, (N·K, C).

    Args:
        moments: those of N·K instances.
        cells: (N, K) numbers of their cells.
    """
    parts = Moments(*(x.unflatten(0, cells.shape) for x in moments))
    share = (cells / cells.sum(1, keepdim=True).clamp(min=1))[..., None]
    mean_s, mean_t = ((share * x).sum(1, keepdim=True) for x in (parts.mean_s, parts.mean_t))
    s, t = parts.mean_s - mean_s, parts.mean_t - mean_t
    within = (parts.var_s + s * s, parts.var_t + t * t, parts.cov + s * t)
    products = ((share * x).sum(1, keepdim=True) for x in within)
    return Moments(*(x.expand_as(parts.cov).flatten(0, 1) for x in (mean_s, mean_t, *products)))


def deflation(
    moments: Moments, align: Alignment, image: Moments | None = None
) -> tuple[Moments, Tensor]:
    """Return the moments after step 2 of :func:`ima`, and α of each instance, (n, 1).

    Args:
        image: moments of the image of each instance, for ``statistics`` "image".

    Raises:
        ValueError: if ``scale_on`` or ``scale_floor`` is invalid.
    """
    if align.scale_on not in ("standardized", "raw"):
        raise ValueError(f"scale_on must be 'standardized' or 'raw', got {align.scale_on!r}")
    if not 0 <= align.scale_floor <= 1:
        raise ValueError(f"scale_floor must be in [0, 1], got {align.scale_floor}")
    compared = moments
    if align.standardize:
        by = image if align.statistics == "image" and image else moments
        compared = _standardized(moments, by, align.standardize_teacher)
    scale = torch.ones_like(compared.mean_s[:, :1])
    if align.deflate:
        cosine = _cosine(compared if align.scale_on == "standardized" else moments).detach()
        scale = align.scale_floor + (1 - align.scale_floor) * cosine.clamp(0, 1)[:, None]
    return compared, scale


def _aligned(moments: Moments, align: Alignment, image: Moments | None = None) -> Tensor:
    """Return the (n,) losses of the instances from their moments: steps 2 to 4 of :func:`ima`."""
    compared, scale = deflation(moments, align, image)
    mean_s, mean_t, var_s, var_t, cov = compared
    # Means stay separate: adding their large squares would round small variances away.
    gap = scale * mean_s - mean_t
    return (scale**2 * var_s + var_t - 2 * scale * cov + gap**2).mean(1)


def _spatial_moments(student: Tensor, teacher: Tensor, weight: Tensor | None) -> Moments:
    """Return the moments over the cells, weighted by ``weight``."""
    cells = (-2, -1)
    if weight is None:
        share = student.new_full((1, 1, 1, 1), 1 / (student.shape[-2] * student.shape[-1]))
    else:
        weight = full_precision(weight)
        total = weight.sum(cells, keepdim=True)
        weight = torch.where(total > 0, weight, torch.ones_like(weight))
        share = weight / weight.sum(cells, keepdim=True)
    mean_s = (share * student).sum(cells, keepdim=True)
    mean_t = (share * teacher).sum(cells, keepdim=True)
    s, t = student - mean_s, teacher - mean_t
    return Moments(
        mean_s[..., 0, 0],
        mean_t[..., 0, 0],
        (share * s * s).sum(cells),
        (share * t * t).sum(cells),
        (share * s * t).sum(cells),
    )


def _class_moments(student: Tensor, teacher: Tensor, member: Tensor) -> Moments:
    """Return the moments over the cells of each class, (N·K, C).

    Args:
        student, teacher: (N, C, H·W).
        member: (N, K, H·W) in {0, 1}.
    """
    share = member / member.sum(2, keepdim=True).clamp(min=1)
    mean_s, mean_t = (torch.einsum("nkx,ncx->nkc", share, x) for x in (student, teacher))
    s = student - torch.einsum("nkc,nkx->ncx", mean_s, member)
    t = teacher - torch.einsum("nkc,nkx->ncx", mean_t, member)
    products = (torch.einsum("nkx,ncx->nkc", share, x) for x in (s * s, t * t, s * t))
    return Moments(*(x.flatten(0, 1) for x in (mean_s, mean_t, *products)))


def _spectral_moments(student: Tensor, teacher: Tensor, mask: Tensor) -> Moments:
    """Return the moments of the masked student from the spectra (Parseval).

    The literal form::

        student = torch.fft.irfft2(mask * torch.fft.rfft2(student), s=student.shape[-2:])
        return _spatial_moments(student, teacher, None)
    """
    mean_t = teacher.mean((-2, -1))
    spread = torch.linalg.vector_norm(teacher - mean_t[..., None, None], dim=(-2, -1))
    var_t = spread.square() / teacher[0, 0].numel()
    mean_s, var_s, cov = _MaskedMoments.apply(student, teacher, mask)
    return Moments(mean_s, mean_t, var_s, var_t, cov)


class _MaskedMoments(torch.autograd.Function):
    """Mean and variance of the filtered student, and its covariance with the teacher.

    The constant terms of the spectra are the means. Without them, the gradient is

    F⁻¹(2 g_var M ŝ + g_cov M t̂) / (H·W) + g_mean M₀ / (H·W)
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.size = height, width = student.shape[-2:]
        cells = height * width
        s, t = (torch.fft.rfft2(x).mul_(mask) for x in (student, teacher))
        mean = s[..., 0, 0].real / cells
        s[..., 0, 0] = t[..., 0, 0] = 0
        ctx.save_for_backward(s, t, mask[..., 0, 0])
        return mean, energy(s, width) / cells**2, product(s, t, width) / cells**2

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, mean: Tensor, variance: Tensor, covariance: Tensor
    ) -> tuple[Tensor, None, None]:
        s, t, first = ctx.saved_tensors
        cells = math.prod(ctx.size)
        of_s, of_t = (x[..., None, None, None] / cells for x in (2 * variance, covariance))
        gradient = (torch.view_as_real(s) * of_s).addcmul_(torch.view_as_real(t), of_t)
        gradient[..., 0, 0, 0] = mean * first
        return torch.fft.irfft2(torch.view_as_complex(gradient), s=ctx.size), None, None


def _standardized(m: Moments, by: Moments, teacher: bool) -> Moments:
    """Return the moments after step 2 by the means and variances of ``by``.

    Args:
        teacher: False leaves the teacher as it is.
    """
    std_s, std_t = (by.var_s + EPS).sqrt(), (by.var_t + EPS).sqrt()
    mean_s, var_s = (m.mean_s - by.mean_s) / std_s, m.var_s / (by.var_s + EPS)
    if teacher:
        mean_t, var_t = (m.mean_t - by.mean_t) / std_t, m.var_t / (by.var_t + EPS)
        return Moments(mean_s, mean_t, var_s, var_t, m.cov / (std_s * std_t))
    return Moments(mean_s, m.mean_t, var_s, m.var_t, m.cov / std_s)


def _cosine(m: Moments) -> Tensor:
    """Return the (N,) cosines of the flattened maps, 0 where a map is zero."""
    ss, tt, st = m.var_s + m.mean_s**2, m.var_t + m.mean_t**2, m.cov + m.mean_s * m.mean_t
    norm = (ss.sum(1) * tt.sum(1)).clamp(min=1e-24).sqrt()
    return st.sum(1) / norm

"""Random masks in the frequency domain (MKD Sec. 3 Eq. 2-4, IMA Eq. 2-4).

F̂ = F⁻¹(M ⊙ F(S)) with M = 0 where R < ζ, R ~ U(0, 1) for each frequency. The papers do not say
how a real map stays real: here M is Hermitian, M[k] = M[−k], so that F̂ is real.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reduce import same_shape


def frequency_mask(
    batch: int, height: int, width: int, mask_ratio: float, generator: torch.Generator
) -> Tensor:
    """Draw M on the half spectrum of ``torch.fft.rfft2``, one draw a batch entry.

    Args:
        batch, height, width: of the map in cells.
        mask_ratio: ζ in [0, 1), the expected share of removed frequencies.
        generator: source of randomness; the mask is made on its device.

    Returns:
        (batch, 1, height, width // 2 + 1) float32 in {0, 1}. Columns that are their own mirror
        image (0, and width / 2 for an even width) are Hermitian in themselves; independent
        draws there would break Parseval's identity.

    Raises:
        ValueError: ``mask_ratio`` is outside [0, 1).
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}")
    columns = width // 2 + 1
    draw = torch.rand((batch, 1, height, columns), generator=generator, device=generator.device)
    mirrored_rows = (-torch.arange(height, device=draw.device)) % height
    rows = torch.arange(height, device=draw.device)
    first = torch.minimum(rows, mirrored_rows)  # both of a pair read the same draw
    hermitian = draw[:, :, first]
    draw[..., 0] = hermitian[..., 0]
    if width % 2 == 0:
        draw[..., -1] = hermitian[..., -1]
    return (draw >= mask_ratio).float()


def half_spectrum_weight(width: int, device: torch.device) -> Tensor:
    """(width // 2 + 1,): how often a column of the half spectrum stands in the full one."""
    weight = torch.full((width // 2 + 1,), 2.0, device=device)
    weight[0] = 1
    if width % 2 == 0:
        weight[-1] = 1
    return weight


class _HalfSpectrum(torch.autograd.Function):
    """``rfft2`` whose backward is one real inverse transform.

    PyTorch's own backward fills up the half spectrum and transforms it as a complex map: twice the
    memory and several times the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = x.shape[-2:]
        return torch.fft.rfft2(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        height, width = ctx.size
        # The inverse counts the mirrored columns twice and divides by the number of cells.
        scale = height * width / half_spectrum_weight(width, gradient.device)
        return torch.fft.irfft2(gradient * scale, s=ctx.size)


def half_spectrum(x: Tensor) -> Tensor:
    """(..., H, W // 2 + 1) complex spectrum of real (..., H, W) maps."""
    spectrum: Tensor = _HalfSpectrum.apply(x)
    return spectrum


def frequency_filtered(maps: Tensor, mask: Tensor | None) -> Tensor:
    """F̂ = F⁻¹(M ⊙ F(S)) of (N, C, H, W) maps; without a mask the maps themselves."""
    if mask is None:
        return maps
    return torch.fft.irfft2(mask * half_spectrum(maps), s=maps.shape[-2:])


def frequency_masked_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """mean (F⁻¹(M ⊙ F(S)) − T)² without the inverse transform.

    By Parseval, Σ_x (F̂ − T)² = 1/(H·W) Σ_k |M_k Ŝ_k − T̂_k|².

    Args:
        student, teacher: (N, C, H, W).
        mask: (N, 1, H, W // 2 + 1) from :func:`frequency_mask`.

    Returns:
        A scalar >= 0, a connected zero for an empty batch. At S = T it is the removed energy,
        not 0; for M = 1 it is ``fitnet``.
    """
    student, teacher = same_shape(student, teacher)
    return masked_energy(student - teacher, teacher, mask)


def masked_energy(gap: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """:func:`frequency_masked_mse` from ``gap`` = S − T, which other losses have at hand.

    M Ŝ − T̂ is Ŝ − T̂ where M = 1 and −T̂ where M = 0: the second part is the removed energy of the
    teacher, a constant.
    """
    if gap.numel() == 0:  # the FFT refuses an empty batch
        return gap.sum()
    height, width = gap.shape[-2:]
    weight = half_spectrum_weight(width, gap.device)
    kept = _energy(half_spectrum(gap), weight * mask)
    removed = _energy(half_spectrum(teacher.detach()), weight * (1 - mask))
    return (kept + removed) / (height * width) / gap.numel()


def _energy(spectrum: Tensor, weight: Tensor) -> Tensor:
    parts = torch.view_as_real(spectrum).square().sum(-1)
    return (parts * weight).sum()

"""Random masks in the frequency domain (MKD Sec. 3 Eq. 2-4, IMA Eq. 2-4).

F̂ = F⁻¹(M ⊙ F(S)) with M = 0 where R < ζ, R ~ U(0, 1) for each frequency

The papers do not say how a real map stays real. Here M is Hermitian, M[k] = M[−k], so that F̂
is real.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reduce import same_shape


def frequency_mask(
    batch: int, height: int, width: int, mask_ratio: float, generator: torch.Generator
) -> Tensor:
    """Draw M on the half spectrum of ``torch.fft.rfft2``, once per image.

    Columns that are their own mirror image are made Hermitian: column 0, and column width / 2 of an
    even width. With independent draws there, Parseval's identity would fail.

    Args:
        batch, height, width: number of images and size of the map in cells.
        mask_ratio: ζ in [0, 1), the expected share of removed frequencies. The papers leave it
            open.
        generator: source of randomness. The mask is made on its device.

    Returns:
        (batch, 1, height, width // 2 + 1) float32 in {0, 1}.

    Raises:
        ValueError: if ``mask_ratio`` is outside [0, 1).
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}")
    columns = width // 2 + 1
    draw = torch.rand((batch, 1, height, columns), generator=generator, device=generator.device)
    mirrored_rows = (-torch.arange(height, device=draw.device)) % height
    rows = torch.arange(height, device=draw.device)
    first = torch.minimum(rows, mirrored_rows)  # both rows of a pair read the same draw
    hermitian = draw[:, :, first]
    draw[..., 0] = hermitian[..., 0]
    if width % 2 == 0:
        draw[..., -1] = hermitian[..., -1]
    return (draw >= mask_ratio).float()


def half_spectrum_weight(width: int, device: torch.device) -> Tensor:
    """Return how often each column of the half spectrum is in the full one, (width // 2 + 1,)."""
    weight = torch.full((width // 2 + 1,), 2.0, device=device)
    weight[0] = 1
    if width % 2 == 0:
        weight[-1] = 1
    return weight


class _HalfSpectrum(torch.autograd.Function):
    """``torch.fft.rfft2`` whose backward is a single real inverse transform.

    PyTorch's backward fills up the half spectrum and transforms it as a complex map. That takes
    twice the memory and several times as long. Forward and gradient equal those of
    ``torch.fft.rfft2(x)``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = x.shape[-2:]
        return torch.fft.rfft2(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        height, width = ctx.size
        # irfft2 counts the mirrored columns twice and divides by the number of cells.
        scale = height * width / half_spectrum_weight(width, gradient.device)
        return torch.fft.irfft2(gradient * scale, s=ctx.size)


def half_spectrum(x: Tensor) -> Tensor:
    """Return the complex (..., H, W // 2 + 1) spectrum of real (..., H, W) maps."""
    spectrum: Tensor = _HalfSpectrum.apply(x)
    return spectrum


def frequency_filtered(maps: Tensor, mask: Tensor | None) -> Tensor:
    """Return F̂ = F⁻¹(M ⊙ F(S)) of (N, C, H, W) maps, or the maps themselves if ``mask`` is None."""
    if mask is None:
        return maps
    return torch.fft.irfft2(mask * half_spectrum(maps), s=maps.shape[-2:])


def frequency_masked_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of the frequency-masked student: mean (F⁻¹(M ⊙ F(S)) − T)² (MKD Eq. 4).

    There is no inverse transform: by Parseval, Σ_x (F̂ − T)² = 1/(H·W) Σ_k |M_k Ŝ_k − T̂_k|². The
    literal form::

        masked = torch.fft.irfft2(mask * torch.fft.rfft2(student), s=student.shape[-2:])
        loss = (masked - teacher).square().mean()

    Args:
        student, teacher: (N, C, H, W). Detach the teacher: its gradient would be incomplete.
        mask: (N, 1, H, W // 2 + 1) from :func:`frequency_mask`.

    Returns:
        A scalar >= 0; a connected zero for an empty batch. At S = T it is the removed energy, not
        0. For M = 1 it equals ``fitnet``.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher)
    return masked_energy(student - teacher, teacher, mask)


def masked_energy(gap: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return :func:`frequency_masked_mse` from ``gap`` = S − T, which other losses already have.

    M Ŝ − T̂ is Ŝ − T̂ where M = 1, and −T̂ where M = 0. The second part is the removed energy of
    the teacher, a constant.
    """
    if gap.numel() == 0:  # the FFT raises on an empty batch
        return gap.sum()
    removed = energy(torch.fft.rfft2(teacher.detach()).mul_(1 - mask), gap.shape[-1]).sum()
    kept: Tensor = _FilteredEnergy.apply(gap, mask)
    return (kept + removed / gap[0, 0].numel()) / gap.numel()


class _FilteredEnergy(torch.autograd.Function):
    """Σ (F⁻¹(M ⊙ F(x)))² of (N, C, H, W) maps.

    M ⊙ M = M, and M is Hermitian. So the gradient is twice the filtered map.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, mask: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(maps).mul_(mask)
        ctx.save_for_backward(spectrum)
        ctx.size = maps.shape[-2:]
        return energy(spectrum, maps.shape[-1]).sum() / maps[0, 0].numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (spectrum,) = ctx.saved_tensors
        return torch.fft.irfft2(spectrum, s=ctx.size).mul_(2 * gradient), None


def energy(spectrum: Tensor, width: int) -> Tensor:
    """Return the sum of |x̂|² over the full spectrum of each map, (N, C).

    Args:
        spectrum: (N, C, H, width // 2 + 1), the half of it that ``torch.fft.rfft2`` returns.
    """
    return _over_full(lambda x: torch.linalg.vector_norm(x, dim=2).square(), width, spectrum)


def product(first: Tensor, second: Tensor, width: int) -> Tensor:
    """Return the real part of Σ x̂ ŷ* over the full spectra of each pair of maps, (N, C).

    Args: those of :func:`energy`.
    """
    with torch.autocast(first.device.type, enabled=False):  # keeps float32
        return _over_full(torch.linalg.vecdot, width, first, second)


def _over_full(measure: Callable[..., Tensor], width: int, *halves: Tensor) -> Tensor:
    """Return a sum over full spectra from one over the rows of real numbers of their halves."""

    def of(columns: slice) -> Tensor:
        return measure(*(torch.view_as_real(x[..., columns]).flatten(2) for x in halves))

    total = 2 * of(slice(None)) - of(slice(1))
    return total if width % 2 else total - of(slice(-1, None))

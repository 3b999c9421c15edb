"""Multi-scale self-distillation (MSSD, Sec. 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .fitnet import fitnet

CHUNK = 32  # boxes of one picture whose masks are held at once
MIN_SIDE = 1.0  # pixels; annotations of zero width or height divide by it


def mssd(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of a neck's deep map to its own shallow map of the same level.

    L_k = 1/(N·H·W·C) Σ (S − sg(T))² (Eq. 1-3); the factor γ of the finest level and the mean over
    the levels (Eq. 4) are the head's.

    Args:
        student: (N, C, H, W), bottom-up (PAN) output.
        teacher: (N, C, H, W), top-down (FPN) output; no gradient reaches it.

    Returns:
        A scalar >= 0 in float32; a connected zero for an empty batch.

    Raises:
        ValueError: shapes differ.
    """
    return fitnet(student, teacher.detach())


def gaussian_mask(
    boxes: Sequence[Tensor],
    height: int,
    width: int,
    stride: float,
    sigma2: float = 2.0,
    binary: bool = False,
) -> Tensor:
    """Masks of the ground-truth boxes on the cells of one level.

    M(x, y) = exp(−(x−xc)² / (σ²(w/2)²) − (y−yc)² / (σ²(h/2)²)) inside a box, 0 outside (Eq. 5),
    evaluated at the cell centres ((j + 0.5)·stride, (i + 0.5)·stride). The paper leaves open:
    overlapping boxes take the maximum; a box that covers no centre lights the cell that holds its
    own centre (small objects would vanish otherwise). Sides are at least one pixel. Boxes whose
    centre is off the map are skipped.

    Args:
        boxes: one (K, 4) XYXY tensor in canvas pixels a picture.
        height, width: of the level in cells.
        stride: pixels a cell.
        sigma2: σ² > 0.
        binary: σ² = ∞, 1 inside a box.

    Returns:
        (N, height, width) float32 in [0, 1], without gradient.

    Raises:
        ValueError: ``sigma2`` is not positive.
    """
    if sigma2 <= 0:
        raise ValueError(f"sigma2 must be above 0, got {sigma2}")
    masks = []
    for picture in boxes:
        picture = picture.detach().float()
        mask = picture.new_zeros((height, width))
        for start in range(0, len(picture), CHUNK):
            chunk = picture[start : start + CHUNK]
            columns, in_x = _profile(chunk[:, 0], chunk[:, 2], width, stride, sigma2, binary)
            rows, in_y = _profile(chunk[:, 1], chunk[:, 3], height, stride, sigma2, binary)
            covers = (in_x.any(1) & in_y.any(1))[:, None]
            columns = torch.where(covers, columns, _home(chunk[:, 0], chunk[:, 2], width, stride))
            rows = torch.where(covers, rows, _home(chunk[:, 1], chunk[:, 3], height, stride))
            # Both factors of Eq. 5 are 0 outside their interval, so that the product is Eq. 5.
            mask = torch.maximum(mask, (rows[:, :, None] * columns[:, None, :]).amax(0))
        masks.append(mask)
    return torch.stack(masks)


def _profile(
    low: Tensor, high: Tensor, cells: int, stride: float, sigma2: float, binary: bool
) -> tuple[Tensor, Tensor]:
    """Eq. 5 along one axis, (K, cells), and which cells lie inside; 0 for a centre off the map."""
    low, high = low[:, None], high[:, None]
    centre, half = (low + high) / 2, (high - low).clamp(min=MIN_SIDE) / 2
    position = (torch.arange(cells, device=low.device) + 0.5) * stride
    # The box's own edges, not centre -+ half: rounding would lose a cell that lies on an edge.
    left, right = torch.minimum(low, centre - half), torch.maximum(high, centre + half)
    on_map = (centre >= 0) & (centre < cells * stride)
    inside = (position >= left) & (position <= right) & on_map
    value = torch.ones_like(centre) if binary else _bell((position - centre) / half, sigma2)
    return torch.where(inside, value, 0.0), inside


def _bell(x: Tensor, sigma2: float) -> Tensor:
    return (-x.square() / sigma2).exp()


def _home(low: Tensor, high: Tensor, cells: int, stride: float) -> Tensor:
    """(K, cells): 1 in the cell that holds the centre, all 0 for a centre off the map."""
    centre = ((low + high) / 2)[:, None]
    return ((centre / stride).floor() == torch.arange(cells, device=low.device)).float()

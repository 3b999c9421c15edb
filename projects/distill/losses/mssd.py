"""Multi-scale self-distillation (MSSD, Sec. 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .fitnet import fitnet

CHUNK = 32  # boxes of one image whose masks are held at once
MIN_SIDE = 1.0  # pixels; without it, boxes of zero width or height would divide by 0


def mssd(student: Tensor, teacher: Tensor) -> Tensor:
    """Multi-scale self-distillation: mean squared error of a neck's deep map to its shallow map.

    L_k = 1/(N·H·W·C) Σ (S − sg(T))² of level k (Eq. 1-3)

    The head adds the factor γ of the finest level and the mean over the levels (Eq. 4).

    Args:
        student: (N, C, H, W), the bottom-up (PAN) output.
        teacher: (N, C, H, W), the top-down (FPN) output of the same level; no gradient reaches it.

    Returns:
        A scalar >= 0 in float32; a connected zero for an empty batch.

    Raises:
        ValueError: if shapes differ.
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
    """Return MSSD's soft masks of the ground-truth boxes on the cells of one level (Eq. 5).

    M(x, y) = exp(−(x−xc)² / (σ²(w/2)²) − (y−yc)² / (σ²(h/2)²)) inside a box, 0 outside

    M is evaluated at the cell centres ((j + 0.5)·stride, (i + 0.5)·stride). The paper leaves open
    the following. Overlapping boxes take the maximum. A box that covers no cell centre sets the
    cell that holds its own centre to 1, because small objects would vanish otherwise. Sides are at
    least one pixel. Boxes whose centre is off the map are skipped.

    The literal form for one box and the cell centres x, y::

        inside = (x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)
        bell = exp(-((x - xc) / (w / 2)) ** 2 / sigma2 - ((y - yc) / (h / 2)) ** 2 / sigma2)
        mask = maximum(mask, where(inside, bell, 0))

    Args:
        boxes: one (K, 4) XYXY tensor per image, in pixels of the padded image.
        height, width: size of the level in cells.
        stride: pixels per cell.
        sigma2: σ² > 0.
        binary: True for σ² = ∞, which is 1 inside a box.

    Returns:
        (N, height, width) float32 in [0, 1], without gradient.

    Raises:
        ValueError: if ``sigma2`` is not above 0.
    """
    if sigma2 <= 0:
        raise ValueError(f"sigma2 must be above 0, got {sigma2}")
    masks = []
    for image_boxes in boxes:
        image_boxes = image_boxes.detach().float()
        mask = image_boxes.new_zeros((height, width))
        for start in range(0, len(image_boxes), CHUNK):
            chunk = image_boxes[start : start + CHUNK]
            columns, in_x = _profile(chunk[:, 0], chunk[:, 2], width, stride, sigma2, binary)
            rows, in_y = _profile(chunk[:, 1], chunk[:, 3], height, stride, sigma2, binary)
            covers = (in_x.any(1) & in_y.any(1))[:, None]
            columns = torch.where(
                covers, columns, _centre_cell(chunk[:, 0], chunk[:, 2], width, stride)
            )
            rows = torch.where(covers, rows, _centre_cell(chunk[:, 1], chunk[:, 3], height, stride))
            # Each factor is 0 outside its interval, so that the product is Eq. 5.
            mask = torch.maximum(mask, (rows[:, :, None] * columns[:, None, :]).amax(0))
        masks.append(mask)
    return torch.stack(masks)


def _profile(
    low: Tensor, high: Tensor, cells: int, stride: float, sigma2: float, binary: bool
) -> tuple[Tensor, Tensor]:
    """Return Eq. 5 along one axis, (K, cells), and a mask of the cells inside the boxes.

    Both are 0 for boxes whose centre is off the map.
    """
    low, high = low[:, None], high[:, None]
    centre, half = (low + high) / 2, (high - low).clamp(min=MIN_SIDE) / 2
    position = (torch.arange(cells, device=low.device) + 0.5) * stride
    # Use the edges themselves: with centre -+ half, rounding would lose cells on an edge.
    left, right = torch.minimum(low, centre - half), torch.maximum(high, centre + half)
    on_map = (centre >= 0) & (centre < cells * stride)
    inside = (position >= left) & (position <= right) & on_map
    value = torch.ones_like(centre) if binary else _bell((position - centre) / half, sigma2)
    return torch.where(inside, value, 0.0), inside


def _bell(x: Tensor, sigma2: float) -> Tensor:
    """Return exp(−x² / σ²)."""
    return (-x.square() / sigma2).exp()


def _centre_cell(low: Tensor, high: Tensor, cells: int, stride: float) -> Tensor:
    """Return (K, cells): 1 in the cell that holds the centre, all 0 for a centre off the map."""
    centre = ((low + high) / 2)[:, None]
    return ((centre / stride).floor() == torch.arange(cells, device=low.device)).float()

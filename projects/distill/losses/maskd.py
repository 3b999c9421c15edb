"""Masked distillation (MasKD; Huang et al., "Masked distillation with receptive tokens")."""

import torch
from torch import Tensor

from .reduce import full_precision, same_shape

MASK_EPS = 1e-5  # added to the area of a mask
DICE_EPS = 1e-12  # added to Σ M² of a mask


def maskd(student: Tensor, teacher: Tensor, masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """MasKD's stage-2 loss for segmentation: squared error under each mask, divided by its area.

    L = 1/(2N) Σ_n Σ_t w_nt 1/C Σ_c [Σ_hw M² (S − T)² / (Σ_hw M + 1e-5)]

    The mask enters squared, as in the released code, which masks both maps before it takes the
    square. Segmentation compares logits with w = 1/T, T being the number of tokens. Detection
    compares features with learned w and without the factor 1/2.

    Args:
        student, teacher: (N, C, H, W); no gradient reaches the teacher.
        masks: (N, T, H, W) in [0, 1] from :func:`receptive_masks` of the teacher, or the product of
            both networks' masks. No gradient reaches them.
        weights: (N, T) w >= 0 with Σ_t w = 1; no gradient reaches them. None means 1/T.

    Returns:
        A scalar >= 0 in float32; a connected zero for an empty batch.

    Raises:
        ValueError: if shapes differ, or masks or weights do not fit.
    """
    student, teacher = same_shape(student, teacher)
    batch, channels, *size = student.shape
    if masks.shape[:1] + masks.shape[2:] != (batch, *size):
        raise ValueError(
            f"masks {tuple(masks.shape)} do not fit maps {tuple(student.shape)}: they must be "
            "(N, T, H, W)"
        )
    masks = full_precision(masks.detach())
    square = (student - teacher.detach()).square().sum(1, keepdim=True) / max(channels, 1)
    error = (masks.square() * square).sum((2, 3)) / (masks.sum((2, 3)) + MASK_EPS)
    if weights is None:
        weights = torch.full_like(error, 1 / max(masks.shape[1], 1))
    if weights.shape != error.shape:
        raise ValueError(
            f"weights {tuple(weights.shape)} do not fit masks {tuple(masks.shape)}: they must be "
            "(N, T)"
        )
    return (weights.detach() * error).sum() / (2 * max(batch, 1))


def receptive_masks(tokens: Tensor, features: Tensor) -> Tensor:
    """Return MasKD's receptive masks: σ(token · feature) for each token and cell.

    Args:
        tokens: (T, C), learned in stage 1.
        features: (N, C, H, W).

    Returns:
        (N, T, H, W) float32 in [0, 1]. The gradient reaches both arguments.

    Raises:
        ValueError: if the channels differ.
    """
    if tokens.ndim != 2 or tokens.shape[1] != features.shape[1]:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} do not fit maps {tuple(features.shape)}: they must be "
            "(T, C)"
        )
    tokens, features = full_precision(tokens), full_precision(features)
    with torch.autocast(features.device.type, enabled=False):  # keeps the products in float32
        return torch.einsum("tc,nchw->nthw", tokens, features).sigmoid()


def dice_overlap(masks: Tensor) -> Tensor:
    """MasKD's stage-1 loss, which keeps tokens different: mean Dice coefficient of two masks.

    2 Σ M_i M_j / (Σ M_i² + Σ M_j²), averaged over the ordered pairs i ≠ j of an image and the
    images

    Args:
        masks: (N, T, H, W) in [0, 1].

    Returns:
        A scalar in [0, 1]; a connected zero for an empty batch or a single token.
    """
    cells = full_precision(masks).flatten(2)
    with torch.autocast(cells.device.type, enabled=False):
        products = cells @ cells.transpose(1, 2)
    squares = products.diagonal(dim1=1, dim2=2) + DICE_EPS
    dice = 2 * products / (squares[:, :, None] + squares[:, None])
    batch, tokens = cells.shape[:2]
    different = 1 - torch.eye(tokens, device=cells.device, dtype=cells.dtype)
    return (dice * different).sum() / max(batch * tokens * (tokens - 1), 1)

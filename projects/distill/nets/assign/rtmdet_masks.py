"""Masks of RTMDet-Ins: dynamic convolutions of prototypes, their loss, and centres of mass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...losses.reduce import full_precision

WIDTH = 8  # channels of the two hidden maps
REACH = 8.0  # the relative coordinates are in units of so many strides of the point
MASK_STRIDE = 4  # stride in pixels at which masks are compared
DICE_EPS = 5e-6
MASS_EPS = 1e-7


def mask_kernel_size(channels: int) -> int:
    """Return the number of weights and biases of an object, 169 for 8 prototypes."""
    return (channels + 2) * WIDTH + WIDTH * WIDTH + WIDTH + 2 * WIDTH + 1


def dynamic_masks(
    kernels: Tensor, points: Tensor, strides: Tensor, prototypes: Tensor, stride: int = 8
) -> Tensor:
    """Return the mask logits of the objects of one image (RTMDet, Sec. 3.4).

    Each object has three 1x1 convolutions of its own with ReLU between them, C + 2 → 8 → 8 → 1.
    Their input is x and y of the object's point relative to the cell, followed by the prototypes.
    A cell is at its top left corner, and the unit is 8 strides of the point's level. The paper
    gives the layers; order and units are the released code's.

    Args:
        kernels: (P, 10 · 8 + 8 · 8 + 8 + 8 + 8 + 1) for C = 8: the three weights, rows are outputs,
            and then the three biases.
        points: (P, 2) x, y in pixels.
        strides: (P,) in pixels.
        prototypes: (C, H, W).
        stride: size of a cell of the prototypes in pixels.

    Returns:
        (P, H, W) in full precision.

    Raises:
        ValueError: if the kernels do not fit C prototypes.
    """
    kernels, points, strides, prototypes = (
        full_precision(x) for x in (kernels, points, strides, prototypes)
    )
    channels, height, width = prototypes.shape
    if kernels.shape[1] != mask_kernel_size(channels):
        raise ValueError(
            f"kernels of {kernels.shape[1]} numbers do not fit {channels} prototypes: "
            f"these need {mask_kernel_size(channels)}"
        )
    x, y = (torch.arange(n, device=points.device) * stride for n in (width, height))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy")).flatten(1)  # (2, H · W)
    relative = (points[..., None] - grid) / (REACH * strides)[:, None, None]
    inputs = prototypes.flatten(1).expand(points.shape[0], -1, -1)
    hidden = torch.cat([relative, inputs], 1)
    sizes = [(channels + 2) * WIDTH, WIDTH * WIDTH, WIDTH, WIDTH, WIDTH, 1]
    parts = kernels.split(sizes, 1)
    with torch.autocast(kernels.device.type, enabled=False):  # keeps the products in float32
        for layer, (weight, bias) in enumerate(zip(parts[:3], parts[3:])):
            hidden = hidden.relu() if layer else hidden
            weight = weight.unflatten(1, (bias.shape[1], hidden.shape[1]))
            hidden = torch.baddbmm(bias[..., None], weight, hidden)
    return hidden.view(points.shape[0], height, width)


def sampled_masks(masks: Tensor, height: int, width: int) -> Tensor:
    """Sample masks at the stride 4, one pixel in the middle of 4x4, and pad them with zeros.

    Args:
        masks: (M, h, w) bool or in [0, 1], in pixels.
        height, width: size of the result, at least that of the sampled masks.

    Returns:
        (M, height, width) in full precision, without gradient.

    Raises:
        ValueError: if the sampled masks are larger.
    """
    first = MASK_STRIDE // 2
    sampled = full_precision(masks.detach()[:, first::MASK_STRIDE, first::MASK_STRIDE])
    down, right = height - sampled.shape[1], width - sampled.shape[2]
    if min(down, right) < 0:
        raise ValueError(
            f"masks of {masks.shape[1]}x{masks.shape[2]} pixels are larger than the image, "
            f"{MASK_STRIDE * height}x{MASK_STRIDE * width} pixels"
        )
    return F.pad(sampled, (0, right, 0, down))


def mask_loss(
    logits: Tensor,
    masks: Tensor,
    number: Tensor | float,
    weight: float = 2.0,
    counts: Tensor | None = None,
) -> Tensor:
    """Dice loss of RTMDet-Ins, with squares in the denominator (Milletari et al., "V-Net").

    Logits are enlarged to the stride 4. With probabilities p and masks t::

        weight · Σ over objects of 1 − 2 Σ p t / (Σ p² + Σ t² + 1e-5) / number

    The released code weighs all objects equally. Its ``number`` is their number, a mean over
    processes, at least 1.

    Args:
        logits: (P, H, W) at the stride 8.
        masks: (P, 2 · H, 2 · W) in [0, 1], see :func:`sampled_masks`. No gradient reaches them.
        number: > 0.
        weight: factor of the loss.
        counts: (P,) bool, False for rows that are no objects. None means that all are.

    Returns:
        A scalar >= 0, a connected zero without objects.

    Raises:
        ValueError: if the sizes do not fit.
    """
    size = [2 * n for n in logits.shape[1:]]
    if [len(logits), *size] != list(masks.shape):
        raise ValueError(
            f"masks {tuple(masks.shape)} do not fit logits {tuple(logits.shape)}: "
            "pad the sampled masks to twice the size of the logits"
        )
    large = F.interpolate(full_precision(logits)[:, None], size, mode="bilinear")[:, 0]
    losses = dice(large.sigmoid(), full_precision(masks.detach()))
    return weight * (losses if counts is None else losses.where(counts, 0)).sum() / number


def dice(probability: Tensor, target: Tensor) -> Tensor:
    """Return 1 − 2 Σ pt / (Σ p² + Σ t² + 1e-5) of each object, (P,) in [0, 1].

    Args:
        probability, target: (P, H, W) in [0, 1].
    """
    both = (probability * target).sum((1, 2))
    squares = [x.square().sum((1, 2)) + DICE_EPS for x in (probability, target)]
    return 1 - 2 * both / (squares[0] + squares[1])


@torch.no_grad()
def mask_centers(masks: Tensor) -> Tensor:
    """Return the (M, 2) x, y of the centres of mass of (M, H, W) masks, in pixels.

    A pixel is at its integer index, as in the released code. An empty mask has the centre (0, 0).
    """
    masks = full_precision(masks)
    mass = masks.sum((1, 2)).clamp(min=MASS_EPS)
    sums = masks.sum(1), masks.sum(2)  # columns and rows
    along = [(x * torch.arange(x.shape[1], device=x.device)).sum(1) / mass for x in sums]
    return torch.stack(along, 1)

"""Quality focal loss (Li et al., "Generalized focal loss: learning qualified and distributed
bounding boxes for dense object detection"), which GFL and RTMDet use.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def quality_focal(logits: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    """Quality focal loss (QFL, Eq. 2): |q − σ|^β times the binary cross entropy.

    Args:
        logits: any shape.
        quality: q in [0, 1], same shape.
        beta: β >= 0.

    Returns:
        The loss of each element, >= 0, same shape.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return entropy * (quality - logits.sigmoid()).abs() ** beta


def soft_labels(logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
    """Return targets that are the quality at the class of each row, and 0 elsewhere.

    Args:
        logits: (..., K), read only for shape and precision.
        labels: (...) int64. Labels outside [0, K) are clamped, so their quality must be 0.
        quality: (...) in [0, 1].

    Returns:
        (..., K), as ``logits``.
    """
    index = labels.clamp(0, logits.shape[-1] - 1)[..., None]
    return torch.zeros_like(logits).scatter(-1, index, quality[..., None].to(logits.dtype))

"""Quality focal loss (Li et al., "Generalized focal loss: learning qualified and distributed
bounding boxes for dense object detection"), which GFL and RTMDet use.
"""

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

"""CrossKD (Wang et al., "CrossKD: Cross-head knowledge distillation for object detection")."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .kd import categorical_kl
from .pkd import standardized, statistics
from .reduce import same_shape

IOU_EPS = 1e-6  # smallest IoU whose logarithm is taken, and pixels² that are added to areas


def crosskd_aligned(student: Tensor, teacher: Tensor) -> Tensor:
    """Give the student's features the teacher's mean and standard deviation in each channel.

    The statistics of a channel run over N, H and W together, unbiased, as in the released code.

    Args:
        student, teacher: (N, C, H, W). No gradient reaches the teacher.

    Returns:
        (N, C, H, W); the gradient also flows through the student's statistics.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    if student.numel() == 0:
        return student
    mean, deviation = statistics(teacher)
    return standardized(student) * deviation + mean


def crosskd_classes(
    reused: Tensor, teacher: Tensor, number: Tensor | float, weight: Tensor | None = None
) -> Tensor:
    """CrossKD's classification loss: quality focal loss with β = 1 (Sec. 3.3).

    L = Σ w · BCE(R, σ(T)) · |σ(R) − σ(T)| / number, summed over rows and classes.

    Args:
        reused: (P, K) logits R that the teacher's last layers compute from the student's features.
        teacher: (P, K) logits T. No gradient reaches them.
        number: number of positives, > 0.
        weight: (P,) w, 0 where the student is not trained. None means 1.

    Returns:
        A scalar >= 0; a connected zero without rows.

    Raises:
        ValueError: if shapes differ.
    """
    reused, teacher = same_shape(reused, teacher.detach())
    target = teacher.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(reused, target, reduction="none")
    loss = (entropy * (reused.sigmoid() - target).abs()).sum(1)
    return (loss if weight is None else loss * weight.detach()).sum() / number


def crosskd_boxes(
    reused: Tensor, teacher: Tensor, weight: Tensor, number: Tensor | float, *, log_iou: bool
) -> Tensor:
    """CrossKD's box loss: Σ w (1 − GIoU) / number, or Σ w (−log IoU) / number.

    Args:
        reused, teacher: (P, 4) XYXY boxes. No gradient reaches the teacher.
        weight: (P,) w >= 0; no gradient reaches it.
        number: number of positives, > 0.
        log_iou: True for −log IoU, False for 1 − GIoU.

    Returns:
        A scalar >= 0; a connected zero without rows.

    Raises:
        ValueError: if shapes differ.
    """
    reused, teacher = same_shape(reused, teacher.detach())
    if log_iou:
        gap = -paired_iou(reused, teacher)[0].clamp(min=IOU_EPS).log()
    else:
        gap = 1 - paired_iou(reused, teacher)[1]
    return (gap * weight.detach()).sum() / number


def paired_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the IoU and the GIoU of each pair of boxes, (P,) each.

    A box has an IoU and a GIoU of 1 with itself, even if it is empty. torchvision's GIoU is not
    used because it selects the overlapping boxes with a mask, for which the host waits.

    Args:
        a, b: (P, 4) XYXY boxes.
    """
    lower, upper = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    both = (upper - lower).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - both
    iou = (both + IOU_EPS) / (union + IOU_EPS)
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    return iou, iou - (hull - union) / (hull + IOU_EPS)


def crosskd_bins(reused: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """CrossKD's box loss of GFL: divergence of the distributions of the four sides.

    L = Σ w · KL(softmax T ‖ softmax R) / (4 Σ w), summed over rows and sides.

    Args:
        reused, teacher: (P, 4, bins) logits. No gradient reaches the teacher.
        weight: (P,) w >= 0; no gradient reaches it.

    Returns:
        A scalar >= 0; a connected zero where the weights are all 0.

    Raises:
        ValueError: if shapes differ.
    """
    divergence = categorical_kl(reused.flatten(0, 1), teacher.detach().flatten(0, 1))
    total = weight.sum()
    weighted = (weight.detach()[:, None] * divergence.view(*reused.shape[:2])).sum()
    return weighted / (4 * total.where(total > 0, 1))

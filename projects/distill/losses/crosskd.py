"""CrossKD (Wang et al., "CrossKD: Cross-head knowledge distillation for object detection")."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .kd import categorical_kl
from .pkd import standardized, statistics
from .reduce import same_shape

IOU_EPS = 1e-6  # the smallest overlap whose logarithm is taken; pixels² added to areas


def crosskd_aligned(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's features with the teacher's mean and standard deviation in each channel.

    Statistics are of a channel over N, H and W together, unbiased, as released.

    Args:
        student, teacher: (N, C, H, W). No gradient reaches the teacher.

    Raises:
        ValueError: shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    if student.numel() == 0:
        return student
    mean, deviation = statistics(teacher)
    return standardized(student) * deviation + mean


def crosskd_classes(
    reused: Tensor, teacher: Tensor, number: Tensor | float, weight: Tensor | None = None
) -> Tensor:
    """Σ w · BCE(R, σ(T)) · |σ(R) − σ(T)| / number: quality focal loss with β = 1 (Sec. 3.3).

    Args:
        reused: (P, K) logits that the teacher's last layers make of the student's features.
        teacher: (P, K) logits. No gradient reaches them.
        number: > 0, of positives.
        weight: (P,) w, 0 where the student is not trained; None: 1.

    Raises:
        ValueError: shapes differ.
    """
    reused, teacher = same_shape(reused, teacher.detach())
    target = teacher.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(reused, target, reduction="none")
    loss = (entropy * (reused.sigmoid() - target).abs()).sum(1)
    return (loss if weight is None else loss * weight.detach()).sum() / number


def crosskd_boxes(
    reused: Tensor, teacher: Tensor, weight: Tensor, number: Tensor | float, *, log_iou: bool
) -> Tensor:
    """Σ w (1 − GIoU) / number, or Σ w (−log IoU) / number.

    Args:
        reused, teacher: (P, 4) XYXY boxes. No gradient reaches the teacher.
        weight: (P,) w >= 0.
        number: > 0, of positives.
        log_iou: the second.

    Raises:
        ValueError: shapes differ.
    """
    reused, teacher = same_shape(reused, teacher.detach())
    if log_iou:
        gap = -paired_iou(reused, teacher)[0].clamp(min=IOU_EPS).log()
    else:
        gap = 1 - paired_iou(reused, teacher)[1]
    return (gap * weight.detach()).sum() / number


def paired_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) IoU and GIoU of each of the (P, 4) XYXY boxes ``a`` with its own of ``b``.

    Of a box with itself they are 1, of an empty one, too. torchvision's GIoU picks the boxes that
    overlap by a mask, for which the host waits.
    """
    lower, upper = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    both = (upper - lower).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - both
    iou = (both + IOU_EPS) / (union + IOU_EPS)
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    return iou, iou - (hull - union) / (hull + IOU_EPS)


def crosskd_bins(reused: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of the divergences of the four sides' distributions (GFL).

    Σ w · KL(softmax T ‖ softmax R) / (4 Σ w).

    Args:
        reused, teacher: (P, 4, bins) logits. No gradient reaches the teacher.
        weight: (P,) >= 0.

    Returns:
        A scalar >= 0; a connected zero where the weights are all 0.

    Raises:
        ValueError: shapes differ.
    """
    divergence = categorical_kl(reused.flatten(0, 1), teacher.detach().flatten(0, 1))
    total = weight.sum()
    weighted = (weight.detach()[:, None] * divergence.view(*reused.shape[:2])).sum()
    return weighted / (4 * total.where(total > 0, 1))

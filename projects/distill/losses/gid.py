"""GID (Dai et al., "General instance distillation for object detection")."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms

from .reduce import same_shape

MIN_DISTANCE = 1e-6  # smallest distance between the features of two instances


@torch.no_grad()
def general_instances(
    score: Tensor,
    boxes: Tensor,
    sizes: Sequence[tuple[int, int]],
    number: int = 10,
    candidates: int = 3000,
    nms_iou: float = 0.3,
    min_side: float = 10.0,
) -> tuple[Tensor, Tensor]:
    """Select GID's general instances: the boxes on which the networks differ most (GISM, Eq. 1-3).

    The default values are those of the released code.

    Args:
        score: (N, R) >= 0, the difference of the networks' class probabilities.
        boxes: (N, R, 4) XYXY in pixels.
        sizes: (height, width) of each image in pixels. Boxes are clipped to it.
        number: instances per image, K.
        candidates: number of boxes per image, by descending score, that enter the NMS.
        nms_iou: IoU threshold of the NMS, in [0, 1].
        min_side: pixels that the width and the height of an instance must exceed.

    Returns:
        boxes: (N, K, 4), by descending score; zeros where there are fewer instances.
        valid: (N, K) bool, True for the instances that exist.
    """
    score, index = score.topk(min(candidates, score.shape[1]), dim=1)
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    corners = torch.tensor([[w, h, w, h] for h, w in sizes], dtype=boxes.dtype)
    limits = corners.view(-1, 1, 4).to(boxes.device, non_blocking=True)
    boxes = boxes.clamp(min=0).minimum(limits).flatten(0, 1)
    small = (boxes[:, 2:] - boxes[:, :2]).amin(1) <= min_side
    ranked = score.flatten().masked_fill(small, -1.0)
    images = torch.arange(len(score), device=score.device)
    kept = batched_nms(boxes, ranked, images.repeat_interleave(score.shape[1]), nms_iou)
    image = kept // max(score.shape[1], 1)
    rank = (image[:, None] == images).cumsum(0).gather(1, image[:, None])[:, 0] - 1
    slots = kept.new_full((len(score), number + 1), -1)  # the last slot takes the surplus
    slots.view(-1).scatter_(0, image * (number + 1) + rank.clamp(max=number), kept)
    chosen = slots[:, :number]
    valid = chosen >= 0
    if len(ranked):
        chosen = chosen.clamp(min=0)
        valid = valid & (ranked[chosen] >= 0)
        return boxes[chosen].where(valid[..., None], 0), valid
    return boxes.new_zeros(*chosen.shape, 4), valid


def gid_feature(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """GID's feature loss: Σ (S − T)² / (R · h · w) of the general instances (Eq. 4).

    Args:
        student, teacher: (R, C, h, w), cropped from the maps of both networks with the same boxes.
            No gradient reaches the teacher.
        valid: (R,) bool, True for the instances that count; R is then their number. None means all.

    Returns:
        A scalar >= 0, summed over the channels; a connected zero without instances.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    share = _share(valid, student)
    cells = max(student.shape[2] * student.shape[3], 1)
    squares = (student - teacher).square().sum((1, 2, 3)) / cells
    return (squares * share).sum() / share.sum().clamp(min=1)


def gid_relation(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """GID's relation loss: smooth L1 of the instances' distances, in units of their mean (Eq. 5-7).

    Args:
        student, teacher: (n, D) features of the instances of all images. No gradient reaches the
            teacher.
        valid: (n,) bool, True for the instances that count. None means all.

    Returns:
        A scalar >= 0, the mean over the ordered pairs; a connected zero for fewer than three
        instances.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    counted = _share(valid, student)
    pairs = counted[:, None] * counted * (1 - torch.eye(len(counted), device=counted.device))
    number = pairs.sum().clamp(min=1)
    distances = ((_distances(x) * pairs) for x in (student, teacher))
    student_d, teacher_d = (d / (d.sum() / number).clamp(min=MIN_DISTANCE) for d in distances)
    gap = F.smooth_l1_loss(student_d, teacher_d, reduction="sum")
    return (gap / number).where(counted.sum() >= 3, 0)


def _distances(x: Tensor) -> Tensor:
    """Return the (n, n) Euclidean distances of (n, D) rows, at least ``MIN_DISTANCE``."""
    with torch.autocast(x.device.type, enabled=False):  # keeps the products in float32
        squares = x.square().sum(1)
        between = squares[:, None] + squares - 2 * x @ x.T
    return between.clamp(min=MIN_DISTANCE**2).sqrt()


def _share(valid: Tensor | None, rows: Tensor) -> Tensor:
    """Return (R,) numbers: 1 for the rows that count, else 0."""
    return rows.new_ones(len(rows)) if valid is None else valid.to(rows.dtype)


def gid_response(
    logits: tuple[Tensor, Tensor], deltas: tuple[Tensor, Tensor], selected: Tensor
) -> tuple[Tensor, Tensor]:
    """GID's response loss: Σ BCE(student, σ(teacher)) and Σ |student − teacher| (Eq. 8).

    Both sums run over the selected anchors only.

    Args:
        logits: (N, R, K) logits of student and teacher. No gradient reaches the teacher.
        deltas: (N, R, 4) box deltas of student and teacher, likewise.
        selected: (N, R) in {0, 1}, 1 for the selected anchors.

    Returns:
        Two scalars >= 0, not divided by the number of selected anchors.

    Raises:
        ValueError: if shapes differ.
    """
    student, teacher = same_shape(logits[0], logits[1].detach())
    entropy = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")
    student_deltas, teacher_deltas = same_shape(deltas[0], deltas[1].detach())
    gap = (student_deltas - teacher_deltas).abs().sum(2)
    return (entropy.sum(2) * selected).sum(), (gap * selected).sum()

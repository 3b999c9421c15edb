"""GID (Dai et al., "General instance distillation for object detection")."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms

from .reduce import same_shape

MIN_DISTANCE = 1e-6  # between two instances


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
    """The boxes about which the networks differ most (GISM, Eq. 1-3).

    The values are those of the released code.

    Args:
        score: (N, R) >= 0.
        boxes: (N, R, 4) XYXY.
        sizes: (height, width) in pixels of each picture, to which its boxes are clipped.
        number: of instances a picture, K.
        candidates: with the highest scores, of a picture, that are considered.
        nms_iou: in [0, 1].
        min_side: in pixels, that an instance exceeds in width and in height.

    Returns:
        (N, K, 4) boxes, best first, and (N, K) bool, which of them there are; others are zeros.
    """
    score, index = score.topk(min(candidates, score.shape[1]), dim=1)
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    corners = torch.tensor([[w, h, w, h] for h, w in sizes], dtype=boxes.dtype)
    limits = corners.view(-1, 1, 4).to(boxes.device, non_blocking=True)
    boxes = boxes.clamp(min=0).minimum(limits).flatten(0, 1)
    small = (boxes[:, 2:] - boxes[:, :2]).amin(1) <= min_side
    ranked = score.flatten().masked_fill(small, -1.0)
    pictures = torch.arange(len(score), device=score.device)
    kept = batched_nms(boxes, ranked, pictures.repeat_interleave(score.shape[1]), nms_iou)
    picture = kept // max(score.shape[1], 1)
    rank = (picture[:, None] == pictures).cumsum(0).gather(1, picture[:, None])[:, 0] - 1
    slots = kept.new_full((len(score), number + 1), -1)  # the last one takes what is left over
    slots.view(-1).scatter_(0, picture * (number + 1) + rank.clamp(max=number), kept)
    chosen = slots[:, :number]
    valid = chosen >= 0
    if len(ranked):
        chosen = chosen.clamp(min=0)
        valid = valid & (ranked[chosen] >= 0)
        return boxes[chosen].where(valid[..., None], 0), valid
    return boxes.new_zeros(*chosen.shape, 4), valid


def gid_feature(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Σ (S − T)² / (R · h · w) of the features of the general instances (Eq. 4).

    Args:
        student, teacher: (R, C, h, w), cropped from both networks by the same boxes. No gradient
            reaches the teacher.
        valid: (R,) bool, which of them count; None: all.

    Returns:
        A scalar >= 0; a connected zero for no instances.

    Raises:
        ValueError: shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    share = _share(valid, student)
    cells = max(student.shape[2] * student.shape[3], 1)
    squares = (student - teacher).square().sum((1, 2, 3)) / cells
    return (squares * share).sum() / share.sum().clamp(min=1)


def gid_relation(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Smooth L1 of the instances' distances, in units of their mean (Eq. 5-7).

    Args:
        student, teacher: (n, D) features of the instances of all pictures. No gradient reaches
            the teacher.
        valid: (n,) bool, which of them count; None: all.

    Returns:
        A scalar >= 0, the mean over the ordered pairs; a connected zero for fewer than three.

    Raises:
        ValueError: shapes differ.
    """
    student, teacher = same_shape(student, teacher.detach())
    counted = _share(valid, student)
    pairs = counted[:, None] * counted * (1 - torch.eye(len(counted), device=counted.device))
    number = pairs.sum().clamp(min=1)
    distances = ((_distances(x) * pairs) for x in (student, teacher))
    ours, theirs = (d / (d.sum() / number).clamp(min=MIN_DISTANCE) for d in distances)
    gap = F.smooth_l1_loss(ours, theirs, reduction="sum")
    return (gap / number).where(counted.sum() >= 3, 0)


def _distances(x: Tensor) -> Tensor:
    """(n, n) Euclidean distances."""
    with torch.autocast(x.device.type, enabled=False):  # it would halve matrix products
        squares = x.square().sum(1)
        between = squares[:, None] + squares - 2 * x @ x.T
    return between.clamp(min=MIN_DISTANCE**2).sqrt()


def _share(valid: Tensor | None, rows: Tensor) -> Tensor:
    """(R,) 1 of the rows that count, else 0."""
    return rows.new_ones(len(rows)) if valid is None else valid.to(rows.dtype)


def gid_response(
    logits: tuple[Tensor, Tensor], deltas: tuple[Tensor, Tensor], selected: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ BCE(student, σ(teacher)) and Σ |student − teacher| of the selected anchors (Eq. 8).

    Args:
        logits: (N, R, K) of student and teacher. No gradient reaches the teacher.
        deltas: (N, R, 4) likewise.
        selected: (N, R) in {0, 1}.

    Returns:
        Two scalars >= 0, not divided by the number of the selected.

    Raises:
        ValueError: shapes differ.
    """
    ours, theirs = same_shape(logits[0], logits[1].detach())
    entropy = F.binary_cross_entropy_with_logits(ours, theirs.sigmoid(), reduction="none")
    own, other = same_shape(deltas[0], deltas[1].detach())
    return (entropy.sum(2) * selected).sum(), ((own - other).abs().sum(2) * selected).sum()

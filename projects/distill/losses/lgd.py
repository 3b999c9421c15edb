"""LGD (Zhang et al., "LGD: Label-guided self-distillation for object detection")."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .boxes import covered
from .reduce import full_precision, same_shape

LGD_EPS = 1e-5  # added to the variance of a channel


def lgd(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """LGD's distillation loss: mean squared error of instance-normalized maps of all levels.

    L = mean (IN(S) − IN(sg(T)))², where IN gives each channel of each image mean 0 and variance 1

    The variance is biased. The mean runs over the cells of all levels together, so that fine levels
    weigh most.

    Args:
        student, teacher: one (N, C, H, W) map per level; the student's are adapted. No gradient
            reaches the teacher.

    Returns:
        A scalar >= 0 in float32; a connected zero for an empty batch.

    Raises:
        ValueError: if shapes or the numbers of levels differ.
    """
    if len(student) != len(teacher):
        raise ValueError(f"student has {len(student)} levels and teacher {len(teacher)}")
    pairs = [same_shape(s, t.detach()) for s, t in zip(student, teacher)]
    gaps = [instance_normalized(s) - instance_normalized(t) for s, t in pairs]
    squares = torch.stack([gap.square().sum() for gap in gaps]).sum()
    return squares / max(sum(gap.numel() for gap in gaps), 1)


def instance_normalized(x: Tensor) -> Tensor:
    """Normalize each channel of (N, C, H, W) maps to mean 0 and variance 1 over the cells.

    A map of one cell becomes 0.
    """
    centred = x - x.mean((2, 3), keepdim=True)
    return centred * (centred.square().mean((2, 3), keepdim=True) + LGD_EPS).rsqrt()


def lgd_labels(
    boxes: Tensor, classes: Tensor, padded_size: tuple[int, int], num_classes: int
) -> Tensor:
    """Return LGD's label descriptors: relative corners and one-hot class, in [−1, 1] (Sec. 3.2).

    Args:
        boxes: (N, M, 4) XYXY in pixels of the padded image; NaN where an image has fewer than M
            objects.
        classes: (N, M) in [0, K).
        padded_size: (height, width) of the padded image.
        num_classes: K.

    Returns:
        (N, 1 + M, 4 + K). The first row is the context: the box of the padded image, of no class.
    """
    height, width = padded_size
    x1, y1, x2, y2 = full_precision(boxes).nan_to_num().unbind(2)
    corners = torch.stack([x1 / width, y1 / height, x2 / width, y2 / height], 2).clamp(0, 1)
    one_hot = classes[..., None] == torch.arange(num_classes, device=classes.device)
    objects = torch.cat([corners, one_hot.to(corners.dtype)], 2)
    context = objects.new_zeros(len(objects), 1, 4 + num_classes)
    context[..., 2:4] = 1
    return torch.cat([context, objects], 1) * 2 - 1


def lgd_masks(boxes: Tensor, padded_size: tuple[int, int], height: int, width: int) -> Tensor:
    """Return LGD's masks: the cells whose centres lie in each box. A small box may have no cell.

    Args:
        boxes: (N, M, 4) XYXY in pixels of the padded image. A box with NaN has no cell.
        padded_size: (height, width) of the padded image.
        height, width: size of the map in cells.

    Returns:
        (N, M, height, width) float32 in {0, 1}.
    """
    boxes = full_precision(boxes)
    first, last = (
        torch.stack([x * width / padded_size[1] - 0.5, y * height / padded_size[0] - 0.5], 2)
        for x, y in (boxes[..., :2].unbind(2), boxes[..., 2:].unbind(2))
    )
    return covered(first, last, height, width).to(boxes.dtype)


def lgd_pooled(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the means of maps over masks, 0 over an empty mask.

    Args:
        maps: (N, C, H, W).
        masks: (N, M, H, W) in {0, 1}.

    Returns:
        (N, M, C) in full precision.
    """
    with torch.autocast(maps.device.type, enabled=False):  # sums of many cells need float32
        sums = torch.einsum("nchw,nmhw->nmc", full_precision(maps), masks)
        return sums / masks.sum((2, 3)).clamp(min=1)[..., None]


def lgd_rendered(objects: Tensor, masks: Tensor) -> Tensor:
    """Render objects into a map: each cell gets the sum of the objects whose masks hold it.

    Args:
        objects: (N, M, C).
        masks: (N, M, H, W) in {0, 1}.

    Returns:
        (N, C, H, W) in full precision.
    """
    with torch.autocast(objects.device.type, enabled=False):
        return torch.einsum("nmc,nmhw->nchw", full_precision(objects), masks)

"""Hand-made outputs of two networks, and checks of the losses that a head computes from them.

Each network has two levels of random maps for two images, of which the second has no object.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from distill.heads.fpn import Level
from distill.structures import NetworkOutputs
from tests.support.networks import image_dict, outputs

PADDED_SIZE = (64, 80)  # the second image is smaller
SIZES = {"p3": (8, 10), "p4": (4, 5)}
LEVELS = [Level("p3", "c3", 8, 8), Level("p4", "c4", 16, 16)]
BOXES = [[[3.0, 5.0, 42.0, 37.0], [8.0, 8.0, 16.0, 16.0], [30.5, 20.25, 79.0, 60.0]], []]
BoxLists = Sequence[Sequence[Sequence[float]]]


def ground_truth(boxes: BoxLists = BOXES) -> list[Instances]:
    """Return the instances of each image; every box has a class of its own."""
    found = []
    for size, own in zip([PADDED_SIZE, (48, 64)], boxes):
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.tensor(own).reshape(-1, 4))
        instances.gt_classes = torch.arange(len(own))
        found.append(instances)
    return found


def random_outputs(
    student: int = 3, teacher: int = 4, boxes: BoxLists = BOXES
) -> tuple[NetworkOutputs, NetworkOutputs]:
    """Return float64 outputs of a student and a teacher with these numbers of channels."""
    g = torch.Generator().manual_seed(0)

    def maps(channels: int, prefix: str) -> dict[str, Tensor]:
        return {
            f"{prefix}{name[1]}": torch.randn(2, channels, *size, generator=g).double()
            for name, size in SIZES.items()
        }

    ours, theirs = maps(student, "p"), maps(teacher, "c")
    for x in ours.values():
        x.requires_grad_()
    instances = [ground_truth(boxes) for _ in range(2)]
    return outputs(PADDED_SIZE, instances[0], **ours), outputs(PADDED_SIZE, instances[1], **theirs)


def two_level_head(cls: Any, channels: tuple[int, int] = (3, 4), **kw: Any) -> Any:
    """Return a float64 head of :data:`LEVELS` for these channels of student and teacher."""
    torch.manual_seed(0)
    return cls(levels=LEVELS, channels=[channels] * 2, **kw).double()


def to_numpy(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def level_maps(
    head: Any, student: NetworkOutputs, teacher: NetworkOutputs
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (level name, adapted student map, teacher map) as arrays."""
    for level in LEVELS:
        s = head.adapters[level.student](student.features[level.student])
        yield level.student, to_numpy(s), to_numpy(teacher.features[level.teacher])


def check_losses(
    head: nn.Module, student: NetworkOutputs, teacher: NetworkOutputs, expected: dict[str, float]
) -> None:
    """Check the losses, and that their gradient reaches the student and all parameters."""
    found = head(student, teacher)
    assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, rel=1e-6)
    assert all(abs(x) > 1e-9 for x in expected.values())
    sum(found.values()).backward()
    assert all(x.grad.abs().sum() > 0 for x in student.features.values())
    assert all(p.grad is not None for p in head.parameters())
    assert all(not x.requires_grad for x in teacher.features.values())


def batch_norm(norm: nn.BatchNorm2d, x: np.ndarray) -> np.ndarray:
    """Normalize (N, C, H, W) as the layer does in training."""
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    scale, shift = (to_numpy(p)[:, None, None] for p in (norm.weight, norm.bias))
    return (x - mean) / np.sqrt(variance + norm.eps) * scale + shift


def semantic_images(count: int = 2, height: int = 64, width: int = 64) -> list[dict[str, Any]]:
    """Return random inputs of a network that have semantic labels too."""
    return [image_dict(k, height, width, semantic=True) for k in range(count)]

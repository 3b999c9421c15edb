"""Label-guided self-distillation (LGD)."""

from collections.abc import Callable
from itertools import pairwise
from math import gcd, inf
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..losses import lgd, lgd_labels, lgd_masks, lgd_pooled, lgd_rendered
from ..losses.boxes import padded
from ..losses.reduce import full_precision
from ..section import SWITCH, Key, Section, at_least
from ..structures import NetworkInfo, NetworkOutputs
from ..utils.training import current_iteration
from .base import DISTILL_HEAD_REGISTRY, DistillHead

ATTENTION_HEADS = 8


def perceptron(*sizes: int) -> nn.Sequential:
    """Build linear layers of these sizes, each followed by a layer norm and a ReLU."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        norm = nn.LayerNorm(after, elementwise_affine=False)
        layers += [nn.Linear(before, after), norm, nn.ReLU()]
    return nn.Sequential(*layers)


def convolution(channels: int) -> nn.Sequential:
    """Build a 3x3 convolution, normalized over all channels and cells of an image."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        nn.GroupNorm(1, channels, affine=False),
    )


class Transform(nn.Module):
    """Multiply a vector by a matrix made of it (PointNet's T-Net, without identity, as released).

    Args:
        size: k of the vector; the last layer has 256 k² weights.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.matrix = nn.Sequential(
            perceptron(size, 64, 128, 1024, 512, 256), nn.Linear(256, size * size)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, M, k) for (N, M, k)."""
        matrix = self.matrix(x).unflatten(2, (self.size, self.size))
        return torch.einsum("nmi,nmij->nmj", x, matrix)


class LabelEncoder(nn.Module):
    """PointNet over the objects of an image, with layer norms (Sec. 3.2).

    Args:
        size: k of an object's descriptor.
        channels: C of its embedding.
    """

    def __init__(self, size: int, channels: int):
        super().__init__()
        self.local = nn.Sequential(Transform(size), perceptron(size, 64), Transform(64))
        self.scene = perceptron(64, 128, 1024)
        self.fused = perceptron(64 + 1024, channels, channels)

    def forward(self, labels: Tensor, absent: Tensor) -> Tensor:
        """Return (N, M, C) embeddings of (N, M, k) descriptors.

        Args:
            absent: (N, M) bool, True for padding.
        """
        local = self.local(labels)
        scene = self.scene(local).masked_fill(absent[..., None], -inf).amax(1, keepdim=True)
        return self.fused(torch.cat([local, scene.expand(-1, labels.shape[1], -1)], 2))


class ImplicitTeacher(nn.Module):
    """Make an image's maps of its labels and of the appearance of its objects in the student.

    The appearance of an object on a level is the mean over its cells. By attention, appearances
    (queries) ask the embedded labels of all objects of the image (keys and values). The answers
    are drawn into the boxes, where they add up, on top of the answer of the context. The context is
    an object without a class that covers the padded image. All levels share the modules.

    Args:
        num_classes: K of the labels.
        channels: C of every level.
    """

    def __init__(self, num_classes: int, channels: int):
        super().__init__()
        self.num_classes = num_classes
        self.labels = LabelEncoder(4 + num_classes, channels)
        self.appearance = nn.Sequential(convolution(channels), nn.ReLU())
        heads = gcd(channels, ATTENTION_HEADS)
        self.relation = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.object = nn.Linear(channels, channels)
        self.drawn = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.context = nn.Linear(channels, channels)
        self.refined = nn.Sequential(
            nn.ReLU(),
            *(convolution(channels), nn.ReLU(), convolution(channels), nn.ReLU()),
            convolution(channels),
        )

    def forward(
        self,
        maps: list[Tensor],
        boxes: list[Tensor],
        classes: list[Tensor],
        padded_size: tuple[int, int],
    ) -> list[Tensor]:
        """Return one (N, C, Hi, Wi) map per level, of the size of the student's.

        Args:
            maps: the student's maps.
            boxes: one (Ri, 4) XYXY tensor per image, in pixels of the padded images.
            classes: one (Ri,) tensor in [0, K) per image.
            padded_size: (height, width) of the padded images in pixels.
        """
        corners = padded(boxes)
        kinds = pad_sequence(classes, batch_first=True, padding_value=-1)
        absent = F.pad(corners[..., 0].isnan(), (1, 0))  # the context, which is first, never is
        labels = self.labels(lgd_labels(corners, kinds, padded_size, self.num_classes), absent)
        masks = [lgd_masks(corners, padded_size, *x.shape[2:]) for x in maps]
        queries = torch.cat([self.seen(x, mask) for x, mask in zip(maps, masks)], 1)
        answers, _ = self.relation(queries, labels, labels, key_padding_mask=absent)
        return [self.draw(x, mask) for x, mask in zip(answers.chunk(len(maps), 1), masks)]

    def seen(self, x: Tensor, masks: Tensor) -> Tensor:
        """Return the (N, 1 + M, C) appearances of the context and the objects on a level."""
        x = full_precision(self.appearance(x))
        return torch.cat([x.mean((2, 3))[:, None], lgd_pooled(x, masks)], 1)

    def draw(self, answers: Tensor, masks: Tensor) -> Tensor:
        """Draw (N, 1 + M, C) answers into (N, M, H, W) masks; returns a (N, C, H, W) map."""
        objects = self.drawn(lgd_rendered(self.object(answers[:, 1:]), masks))
        return self.refined(objects + self.context(answers[:, 0])[..., None, None])


@DISTILL_HEAD_REGISTRY.register()
class LGD(DistillHead):
    """LGD: maps made of the student's maps and the labels teach the student.

    See :class:`ImplicitTeacher` and :func:`distill.losses.lgd`. ``teacher`` is the student's own
    detection losses on these maps. Their gradient reaches its head and, through the objects'
    appearances, its backbone. ``BALANCE`` does not scale that. ``distill`` compares the student's
    adapted maps with the made ones. This second run of the head leaves the student as it is. The
    authors' second run changes its loss normalizer and running statistics.

    In the first iterations the distillation loss trains only its adapter. Until then the student
    learns nothing from the made maps, and gets a second detection loss. This cost a RetinaNet 1.5
    AP in a training of 400 steps, so do not use LGD unless the training is several times as long as
    ``DETACH_ITERS``. The authors also freeze
    the backbone below the neck for the first 10000 (1x) or 20000 iterations, which is not done
    here. An object has the cells whose centres lie in its box. The authors take the cells whose
    upper left corners do.

    Args:
        detector_losses: the student's, see :class:`~distill.structures.NetworkInfo`.
        levels: names of the maps that the student's head reads, finest first.
        channels: C of all these maps.
        num_classes: K of the student.
        distill_weight: λ, factor of ``distill``.
        detach_iters: iterations before ``distill`` has a gradient to the student.
        detach_appearance: True to detach the objects' appearances from the student.
    """

    section = Section(  # WEIGHT is the factor of both losses
        DISTILL_WEIGHT=Key(1.0, "λ: factor of the distillation loss", at_least(0)),
        DETACH_ITERS=Key(
            30000, "iterations in which the distillation loss trains only its adapter", at_least(0)
        ),
        DETACH_APPEARANCE=Key(
            False, "the objects' appearance has no gradient to the student", SWITCH
        ),
    )
    needs = frozenset({"features"})
    needs_teacher = False
    parts = ("distill", "teacher")

    @configurable
    def __init__(
        self,
        *,
        detector_losses: Callable[..., dict[str, Tensor]],
        levels: list[str],
        channels: int,
        num_classes: int,
        distill_weight: float,
        detach_iters: int,
        detach_appearance: bool,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.detector_losses = detector_losses
        self.levels = levels
        self.distill_weight = distill_weight
        self.detach_iters = detach_iters
        self.detach_appearance = detach_appearance
        self.teacher = ImplicitTeacher(num_classes, channels)
        convs = [nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in range(3)]
        self.adapter = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    @classmethod
    def from_config(cls, cfg: CfgNode, student: NetworkInfo, teacher: Any) -> dict[str, Any]:
        shapes = student.features
        levels = list(student.detector_levels)
        return {
            **super().from_config(cfg, student, teacher),
            "detector_losses": student.detector_losses,
            "levels": levels,
            "channels": shapes[levels[0]].channels,
            "num_classes": len(student.classes),
        }

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: Any) -> str | None:
        if not student.has_boxes:
            return f"a {student.kind} has no ground-truth boxes"
        if student.detector_losses is None:
            return "the student has no RPN, whose losses it needs"
        channels = student.channels_of(student.detector_levels)
        if len(channels) > 1:
            return f"its teacher is one for all levels; the student's have {channels} channels"
        return super().problem(student, teacher)

    def losses(self, student: NetworkOutputs, teacher: Any) -> dict[str, Tensor]:
        batch, maps = student.batch, [student.features[k] for k in self.levels]
        detached = [x.detach() for x in maps]
        made = self.teacher(
            detached if self.detach_appearance else [teacher.features[k] for k in self.levels],
            batch.boxes,
            [x.gt_classes for x in batch.instances],
            batch.padded_size,
        )
        detection = self.detector_losses(dict(zip(self.levels, made)), batch)
        taught = detached if current_iteration() < self.detach_iters else maps
        return {
            "distill": self.distill_weight * lgd([self.adapter(x) for x in taught], made),
            "teacher": torch.stack([x.float() for x in detection.values()]).sum(),
        }

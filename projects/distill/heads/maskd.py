"""Masked distillation with receptive tokens (MasKD) of feature maps and of semantic logits."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..errors import ConfigError
from ..losses import dice_overlap, maskd, receptive_masks
from ..losses.reduce import connected_zero, full_precision
from ..section import Key, Presets, Section, at_least
from ..structures import Batch, NetworkInfo, NetworkOutputs
from ..utils.distributed import reduce_mean
from ..utils.training import current_iteration
from .base import DISTILL_HEAD_REGISTRY, DistillHead, Losses, NonModuleRef
from .fpn import BoxedFPNHead, Level, cell_labels
from .semantic import SemSegDistillHead


class ReceptiveTokens(nn.Module):
    """Learned tokens that draw masks on a map, and a share of each mask.

    Args:
        tokens: T, number of masks.
        channels: C of the map.
    """

    def __init__(self, tokens: int, channels: int):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(tokens, channels) * 0.01)
        self.weighting = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, tokens, 1),
            nn.Softmax(dim=1),
        )

    def masks(self, x: Tensor) -> Tensor:
        """Return (N, T, H, W) masks in [0, 1] of a (N, C, H, W) map."""
        return receptive_masks(self.tokens, x)

    def shares(self, x: Tensor) -> Tensor:
        """Return the (N, T) shares of the masks, of sum 1 per image."""
        return full_precision(self.weighting(x)[:, :, 0, 0])

    def masked(self, x: Tensor, masks: Tensor) -> Tensor:
        """Return the map times the weighted sum of its masks, on which tokens are trained."""
        return x * torch.einsum("nt,nthw->nhw", self.shares(x), masks)[:, None]


def frozen(drawn: nn.Module) -> Any:
    """Return a frozen copy, which weight decay and momentum do not change."""
    return copy.deepcopy(drawn).requires_grad_(False)


def check_stages(head: type[DistillHead], cfg: CfgNode) -> None:
    """Raise ConfigError if no iteration is left after the tokens are learned."""
    node, last = head.config_node(cfg), cfg.SOLVER.MAX_ITER
    if min(node.STOP_ITER or last, last) <= node.TOKEN_ITERS:
        raise ConfigError(
            f"MODEL.DISTILL.{head.__name__.upper()}.TOKEN_ITERS is {node.TOKEN_ITERS}, and the "
            f"masks distil from there on; lower it below SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} and "
            "STOP_ITER."
        )


@torch.no_grad()
def remember(learned: nn.Module, drawn: nn.Module) -> None:
    """Update a frozen copy."""
    for kept, parameter in zip(learned.parameters(), drawn.parameters()):
        kept.copy_(parameter)


@DISTILL_HEAD_REGISTRY.register()
class MasKD(BoxedFPNHead):
    """MasKD of feature maps: compare levels under learned masks; see :func:`distill.losses.maskd`.

    The tokens are learned first (``tokens``), by the teacher's own detection losses on its masked
    levels and by the overlap of the masks. Then they distil. In the paper the first stage is a
    training of its own, here it is the first iterations of the student's training. The authors'
    further term on the outputs of the box regression is left out.

    Args:
        detector_losses: the teacher's, see :class:`~distill.structures.NetworkInfo`.
        tokens: number of masks.
        token_iters: iterations of the first stage.
        student_mask_iters: iterations of the second stage before the teacher's masks are multiplied
            by the student's.
    """

    section = Section(
        WEIGHT=Presets(DenseDetector=7.0, FCOS=10.0, RepPoints=10.0, GeneralizedRCNN=1.0),
        TOKENS=Key(6, "number of masks", at_least(1)),
        TOKEN_ITERS=Key(
            2000, "iterations in which the tokens are learned, before they distil", at_least(0)
        ),
        STUDENT_MASK_ITERS=Key(
            5000,
            "iterations of distillation before the masks are multiplied by the student's",
            at_least(0),
        ),
    )
    reads_labels = True

    @configurable
    def __init__(
        self,
        *,
        detector_losses: Callable[..., dict[str, Tensor]],
        tokens: int,
        token_iters: int,
        student_mask_iters: int,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.detector_losses = NonModuleRef(detector_losses)
        self.token_iters = token_iters
        self.student_mask_iters = student_mask_iters
        self.drawn = nn.ModuleDict(
            {
                level.student: ReceptiveTokens(tokens, channels)
                for level, (_, channels) in zip(self.levels, self.channels)
            }
        )
        self.learned = frozen(self.drawn)
        self.parts = ("tokens", *self.parts)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        return {**ret, "detector_losses": teacher.detector_losses}

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        super().check_config(cfg)
        check_stages(cls, cfg)

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        problem = super().problem(student, teacher)
        if problem:
            return problem
        if not teacher.has_boxes:
            return f"a {teacher.kind} does not learn boxes, and so no masks"
        if teacher.detector_losses is None:
            return "the teacher has no RPN, whose losses train the masks"
        if student.classes != teacher.classes:
            return "the teacher's task, by which the masks are learned, has other classes"
        more = ", ".join(sorted((teacher.outputs - student.outputs) & {"masks", "sem_seg"}))
        if more:
            return f"the teacher's task, by which the masks are learned, has {more}, too"
        return None

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> Losses:
        none = connected_zero(*student.features.values(), parameters=self.parameters())
        passed = current_iteration() - self.token_iters
        if passed < 0:
            return {**dict.fromkeys(self.parts, none), "tokens": self.token_loss(student, teacher)}
        return {"tokens": none, **super().losses(student, teacher)}

    def token_loss(self, student: NetworkOutputs, teacher: NetworkOutputs) -> Tensor:
        """Return the loss of the first stage: the teacher's losses and the masks' overlap."""
        remember(self.learned, self.drawn)
        features, overlaps = dict(teacher.features), []
        for level in self.levels:
            drawn: Any = self.drawn[level.student]
            masks = drawn.masks(features[level.teacher])
            features[level.teacher] = drawn.masked(features[level.teacher], masks)
            overlaps.append(dice_overlap(masks))
        task = self.detector_losses.value(features, student.batch)
        return torch.stack([x.float() for x in task.values()]).sum() + torch.stack(overlaps).mean()

    def level_loss(self, level: Level, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        learned = self.learned[level.student]
        masks = learned.masks(teacher)
        if current_iteration() - self.token_iters >= self.student_mask_iters:
            masks = masks * learned.masks(student.detach())
        # maskd has the factor 1/2 of segmentation.
        return 2 * maskd(student, teacher, masks, learned.shares(teacher))


@DISTILL_HEAD_REGISTRY.register()
class MasKDLogits(SemSegDistillHead):
    """MasKD of semantic logits: compare them under learned masks; see :func:`distill.losses.maskd`.

    The tokens are learned first, as in :class:`MasKD`, by the cross entropy of the teacher's masked
    logits at the cells. All masks count the same. The head's weight scales both parts.

    Args:
        tokens: number of masks.
        token_iters: iterations of the first stage.
    """

    section = Section(
        TEMPERATURE=None,
        TOKENS=Key(8, "number of masks", at_least(1)),
        TOKEN_ITERS=Key(
            2000, "iterations in which the tokens are learned, before they distil", at_least(0)
        ),
    )
    reads_labels = True
    parts = ("tokens", "masks")

    @configurable
    def __init__(self, *, tokens: int = 8, token_iters: int = 2000, **kwargs: Any):
        super().__init__(**kwargs)
        self.token_iters = token_iters
        self.drawn = ReceptiveTokens(tokens, int(self.classes.in_student.numel()))
        self.learned = frozen(self.drawn)

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        super().check_config(cfg)
        check_stages(cls, cfg)

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        s, t = self.logits(student, teacher)
        none = connected_zero(s, parameters=self.parameters())
        if current_iteration() >= self.token_iters:
            return {"tokens": none, "masks": maskd(s, t, self.learned.masks(t))}
        labels = cell_labels(student.batch.sem_seg, *t.shape[2:])
        return {"tokens": self.token_loss(t, labels), "masks": none}

    def token_loss(self, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of the first stage.

        Args:
            teacher: (N, K', H, W) logits.
            labels: (N, H, W) in the student's classes; other values are ignored.
        """
        remember(self.learned, self.drawn)
        masks = self.drawn.masks(teacher)
        masked = self.drawn.masked(teacher, masks)
        target = self.classes.shared_labels(labels)
        task = F.cross_entropy(masked.float(), target, ignore_index=-1, reduction="sum")
        return task / reduce_mean((target >= 0).sum()) + dice_overlap(masks)

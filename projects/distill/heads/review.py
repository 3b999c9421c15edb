"""Knowledge review (ReviewKD): coarser levels of the student are fused into finer ones."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ..losses import hcl
from ..structures import NetworkOutputs
from .base import DISTILL_HEAD_REGISTRY
from .fpn import BatchNorm, FPNDistillHead

MIDDLE = 256  # channels in which levels are fused


class AttentionBasedFusion(nn.Module):
    """Attention-based fusion (ABF) of a level and the fused coarser ones, weighted cell by cell.

    Args:
        channels: channels of the student's level.
        out_channels: channels of the teacher's level.
        coarsest: True if there are no coarser levels to fuse.
    """

    def __init__(self, channels: int, out_channels: int, coarsest: bool):
        super().__init__()
        self.inside = nn.Sequential(
            nn.Conv2d(channels, MIDDLE, kernel_size=1, bias=False), BatchNorm(MIDDLE)
        )
        self.outside = nn.Sequential(
            nn.Conv2d(MIDDLE, out_channels, kernel_size=3, padding=1, bias=False),
            BatchNorm(out_channels),
        )
        self.attention = None if coarsest else nn.Conv2d(2 * MIDDLE, 2, kernel_size=1)
        for convolution in (self.inside[0], self.outside[0]):
            nn.init.kaiming_uniform_(convolution.weight, a=1)  # type: ignore[arg-type]

    def forward(self, x: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the map to compare with the teacher's, and the fused map for the next finer level.

        Args:
            x: (N, C, H, W) map of the student.
            coarser: (N, MIDDLE, h, w) fused map of the next coarser level; None on the coarsest.
        """
        x = self.inside(x)
        if self.attention is not None and coarser is not None:
            y = F.interpolate(coarser, x.shape[2:], mode="nearest")
            share = self.attention(torch.cat([x, y], 1)).sigmoid()
            x = share[:, :1] * x + share[:, 1:] * y
        return self.outside(x), x


@DISTILL_HEAD_REGISTRY.register()
class ReviewKD(FPNDistillHead):
    """ReviewKD: compare levels fused from coarse to fine; see :func:`distill.losses.hcl`.

    Levels are summed. The authors' weights are 0.8 to 2, and 1 for R-101 to R-50.
    """

    adapts = False

    @configurable
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        last = len(self.levels) - 1
        self.fusions = nn.ModuleDict(
            {
                level.student: AttentionBasedFusion(s, t, coarsest=k == last)
                for k, (level, (s, t)) in enumerate(zip(self.levels, self.channels))
            }
        )

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        coarser = None
        for level, (s, t) in reversed(list(zip(self.levels, self.maps(student, teacher)))):
            fused, coarser = self.fusions[level.student](s, coarser)
            losses[level.student] = hcl([fused], [t])
        return losses

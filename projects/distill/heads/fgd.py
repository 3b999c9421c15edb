"""Focal and global distillation (FGD)."""

from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..losses import fgd
from ..losses.fgd import fgd_relation, pooled
from ..section import POSITIVE, Key, Presets, Section, at_least
from ..structures import Batch, NetworkInfo
from .base import DISTILL_HEAD_REGISTRY, Terms
from .fpn import BoxedFPNHead, Level
from .instances import RegionHead


class GlobalContext(nn.Module):
    """The vector, made of all cells of a map, that is added to each of them (Cao et al., "GCNet").

    It is 0 at the start. The authors' projection has a bias, which a softmax cancels.

    Args:
        channels: C, at least 2.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.where = nn.Conv2d(channels, 1, kernel_size=1, bias=False)
        last = nn.Conv2d(channels // 2, channels, kernel_size=1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, channels // 2, kernel_size=1),
            nn.LayerNorm([channels // 2, 1, 1]),
            nn.ReLU(inplace=True),
            last,
        )
        nn.init.kaiming_normal_(self.where.weight)
        for parameter in (last.weight, last.bias):
            nn.init.zeros_(parameter)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Return the (N, C) vectors of (N, C, H, W) maps."""
        context = pooled(x, self.where.weight.flatten())
        added: Tensor = self.transform(context[..., None, None])
        return added.flatten(1)


@DISTILL_HEAD_REGISTRY.register()
class FGD(RegionHead, BoxedFPNHead):
    """FGD: compare objects and background apart, and the relation of all cells.

    α foreground + β background + γ attention + λ relation

    The first three are of :func:`distill.losses.fgd`. The relation is the squared distance of both
    maps after a :class:`GlobalContext` each (Eq. 10-12). All sums run over channels and cells.

    Args:
        alpha, beta, gamma, lambda_: factors of the four terms.
        temperature: 𝒯 > 0 of the attention.
    """

    section = Section(
        ALPHA=Key(
            Presets(DenseDetector=1e-3, RepPoints=1.6e-3, FCOS=1.6e-3, GeneralizedRCNN=5e-5),
            "factor α of the foreground",
            at_least(0),
            term="foreground",
        ),
        BETA=Key(
            Presets(DenseDetector=5e-4, RepPoints=8e-4, FCOS=8e-4, GeneralizedRCNN=2.5e-5),
            "factor β of the background",
            at_least(0),
            term="background",
        ),
        GAMMA=Key(
            Presets(DenseDetector=5e-4, RepPoints=8e-4, FCOS=8e-4, GeneralizedRCNN=5e-5),
            "factor γ of the attention",
            at_least(0),
            term="attention",
        ),
        LAMBDA=Key(
            Presets(DenseDetector=5e-6, RepPoints=8e-6, FCOS=8e-6, GeneralizedRCNN=5e-7),
            "factor λ of the global relation",
            at_least(0),
            term="relation",
        ),
        TEMPERATURE=Key(
            Presets(DenseDetector=0.5, FCOS=0.8, GeneralizedRCNN=0.5),
            "temperature 𝒯 of the attention",
            POSITIVE,
        ),
    )

    @configurable
    def __init__(
        self,
        *,
        alpha: float,
        beta: float,
        gamma: float,
        lambda_: float,
        temperature: float,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.factors = alpha, beta, gamma
        self.lambda_ = lambda_
        self.temperature = temperature
        names = [level.student for level in self.levels]
        of_teacher = [t for _, t in self.channels]
        self.contexts = nn.ModuleDict(
            {
                name: nn.ModuleList([GlobalContext(c), GlobalContext(c)])
                for name, c in zip(names, of_teacher)
            }
        )

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        ret["lambda_"] = ret.pop("lambda")  # a keyword of Python
        return ret

    def level_loss(self, level: Level, student: Tensor, teacher: Tensor, batch: Batch) -> Terms:
        focal = fgd(student, teacher, batch.boxes, batch.padded_size, self.temperature)
        contexts: Any = self.contexts[level.student]
        added = contexts[0](student).float() - contexts[1](teacher).float()
        return {
            **{name: f * x for name, f, x in zip(focal._fields, self.factors, focal)},
            "relation": self.lambda_ * fgd_relation(student, teacher, added),
        }

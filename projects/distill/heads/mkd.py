"""Multi-knowledge distillation."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..losses import MKD_TERMS, mkd
from ..structures import NetworkInfo, NetworkOutputs
from .base import DISTILL_HEAD_REGISTRY
from .fpn import FPNDistillHead, FrequencyMasks


@DISTILL_HEAD_REGISTRY.register()
class MKD(FPNDistillHead):
    """The four losses of MKD on every level; see :func:`distill.losses.mkd`.

    L = α (L_fea + L_Multiscale + L_FDMD + L_FAD) (Eq. 6), α the head's weight.

    Args:
        term_weights: factor of each term by its name in ``MKD_TERMS``; 0 leaves it out.
        scales: of ``multiscale``, in cells.
        mask_ratio: ζ of ``fdmd``; 0 makes it ``fea``.
        temperature, attention: of ``fad``.
        seed: of the frequency masks.
    """

    @configurable
    def __init__(
        self,
        *,
        term_weights: dict[str, float],
        scales: Sequence[int],
        mask_ratio: float,
        temperature: float,
        attention: bool,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.term_weights = {k: w for k, w in term_weights.items() if w > 0}
        self.masks = FrequencyMasks(mask_ratio, seed)
        self.options: dict[str, Any] = {
            "terms": tuple(self.term_weights),
            "scales": tuple(scales),
            "temperature": temperature,
            "attention": attention,
        }
        self.parts = tuple(
            f"{level.student}/{term}" for level in self.levels for term in self.term_weights
        )

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        node = cls.section(cfg)
        return {
            **super().from_config(cfg, student, teacher),
            "term_weights": {term: node[f"{term.upper()}_WEIGHT"] for term in MKD_TERMS},
            "scales": node.SCALES,
            "mask_ratio": node.MASK_RATIO,
            "temperature": node.TEMPERATURE,
            "attention": node.ATTENTION,
            "seed": cfg.SEED,
        }

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        losses = {}
        for level, (s, t) in zip(self.levels, self.maps(student, teacher)):
            mask = self.masks(s) if "fdmd" in self.term_weights else None
            for term, value in mkd(s, t, mask, **self.options).items():
                weight = self.term_weights[term] / len(self.levels)
                losses[f"{level.student}/{term}"] = value * weight
        return losses

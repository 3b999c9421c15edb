"""Multi-knowledge distillation (MKD)."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..losses import MKD_TERMS, NORMALIZE, mkd
from ..section import BELOW_1, COUNTS, POSITIVE, SWITCH, Key, Rule, Section, at_least, one_of
from ..structures import NetworkInfo, NetworkOutputs
from .base import DISTILL_HEAD_REGISTRY
from .fpn import FPNDistillHead, FrequencyMasks


@DISTILL_HEAD_REGISTRY.register()
class MKD(FPNDistillHead):
    """MKD: four losses on every level; see :func:`distill.losses.mkd`.

    L = α (L_fea + L_Multiscale + L_FDMD + L_FAD) (Eq. 6), α the head's weight.

    Args:
        term_weights: factor of each term by its name in ``MKD_TERMS``; 0 leaves it out.
        scales, power: options of ``multiscale``.
        mask_ratio: ζ of ``fdmd``; 0 makes it ``fea``.
        temperature, attention: options of ``fad``.
        normalize: which maps the terms compare, see :func:`distill.losses.mkd`.
        seed: seed of the frequency masks.
    """

    section = Section(  # WEIGHT is α (Eq. 6)
        FEA_WEIGHT=Key(1.0, "factor of L_fea; 0 leaves a term out", at_least(0), term="fea"),
        MULTISCALE_WEIGHT=Key(
            1.0, "factor of L_Multiscale (Eq. 1)", at_least(0), term="multiscale"
        ),
        FDMD_WEIGHT=Key(1.0, "factor of L_FDMD (Eq. 2-4)", at_least(0), term="fdmd"),
        FAD_WEIGHT=Key(1.0, "factor of L_FAD (Eq. 5)", at_least(0), term="fad"),
        SCALES=Key((1, 2, 4), "pooling kernels of L_Multiscale in cells (paper silent)", COUNTS),
        MULTISCALE_POWER=Key(
            2,
            "2: L_Multiscale sums squared distances; 1: distances",
            Rule(lambda x: x in (1, 2), "1 | 2"),
        ),
        MASK_RATIO=Key(0.15, "ζ of L_FDMD: share of removed frequencies (paper silent)", BELOW_1),
        TEMPERATURE=Key(1.0, "temperature 𝒯 of L_FAD (paper silent)", POSITIVE),
        ATTENTION=Key(
            True,
            "L_FAD compares maps weighted by the joint attention; False: the maps themselves",
            SWITCH,
        ),
        NORMALIZE=Key(
            "none",
            "channel: all terms compare maps whose channels have mean 0 and deviation 1 (paper "
            "unclear); none: the maps themselves",
            one_of(*NORMALIZE),
        ),
    )

    @configurable
    def __init__(
        self,
        *,
        term_weights: dict[str, float],
        scales: Sequence[int],
        mask_ratio: float,
        temperature: float,
        attention: bool,
        power: int,
        normalize: str,
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
            "power": power,
            "normalize": normalize,
        }
        self.parts = tuple(
            f"{level.student}/{term}" for level in self.levels for term in self.term_weights
        )

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, student, teacher)
        ret["term_weights"] = {term: ret.pop(f"{term}_weight") for term in MKD_TERMS}
        ret["power"] = ret.pop("multiscale_power")
        return {**ret, "seed": cfg.SEED}

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        losses = {}
        for level, (s, t) in zip(self.levels, self.maps(student, teacher)):
            mask = self.masks(s) if "fdmd" in self.term_weights else None
            for term, value in mkd(s, t, mask, **self.options).items():
                weight = self.term_weights[term] / len(self.levels)
                losses[f"{level.student}/{term}"] = value * weight
        return losses

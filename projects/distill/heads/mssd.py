"""Multi-scale self-distillation (MSSD)."""

from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..losses import fitnet, gaussian_mask, mssd
from ..section import POSITIVE, SHARE, Key, Section, at_least, one_of
from ..structures import NetworkInfo, NetworkOutputs
from .base import DISTILL_HEAD_REGISTRY, DistillHead


class MaskAdapter(nn.Sequential):
    """Map a mask of one channel to C channels: 3x3 convolution and ReLU (Eq. 6)."""

    def __init__(self, channels: int):
        super().__init__(nn.Conv2d(1, channels, kernel_size=3, padding=1), nn.ReLU())


@DISTILL_HEAD_REGISTRY.register()
class MSSD(DistillHead):
    """MSSD: a student with an FPN+PAN neck teaches its deep maps with its shallow ones.

    L = w_distill L_distill + w_mask L_mask (Eq. 7; the weight of L_gt is 1)

    L_distill is the mean over the levels of g · :func:`distill.losses.mssd`, with g = γ on the
    finest level, else 1 (Eq. 1-4). L_mask is the mean squared error of each deep map and the
    adapted mask of the ground-truth boxes (Eq. 6, :func:`distill.losses.gaussian_mask`). Its
    gradient reaches both. The paper does not say how levels add up in L_mask; they are averaged.
    Levels without a shallow map, which strided convolutions make of the last one, do not count.

    The shallow maps know no more than the student. With the whole ratio of the balance, L_distill
    undoes what the deep pathway adds: in 400 steps it left 0.3 of a RetinaNet's 7.7 AP, and L_mask
    2.1. So the head has a hundredth of the ratio. The paper trains for 200 epochs; do not use the
    method in trainings of a few epochs.

    Args:
        levels: names of the deep maps, finest first.
        strides, channels: values of each level.
        distill_weight, mask_weight: factors of the two losses; 0 leaves one out.
        gamma: γ.
        binary: binary masks instead of Gaussian ones.
        sigma2: σ² of the Gaussian masks.
    """

    section = Section(
        DISTILL_WEIGHT=Key(1.0, "factor of L_distill (Eq. 4)", at_least(0), term="distill"),
        MASK_WEIGHT=Key(1.0, "factor of L_mask (Eq. 6)", at_least(0), term="mask"),
        GAMMA=Key(0.05, "γ: factor of the finest level (Eq. 3; the best of Table 5)", SHARE),
        MASK=Key(
            "gaussian", "kind of the masks (Eq. 5); binary: σ² = ∞", one_of("gaussian", "binary")
        ),
        SIGMA2=Key(2.0, "σ² of the Gaussian masks (the best of Table 6)", POSITIVE),
    )
    needs = frozenset({"features", "shallow"})
    needs_teacher = False
    balance_share = 0.01
    least_epochs = 20  # a tenth of the paper's; two were too few

    @configurable
    def __init__(
        self,
        *,
        levels: list[str],
        strides: list[int],
        channels: list[int],
        distill_weight: float,
        mask_weight: float,
        gamma: float,
        binary: bool,
        sigma2: float,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.strides = dict(zip(levels, strides))
        self.distill_weight = distill_weight
        self.mask_weight = mask_weight
        self.gamma = gamma
        self.binary = binary
        self.sigma2 = sigma2
        self.mask_adapters = nn.ModuleDict()
        if mask_weight > 0:
            self.mask_adapters.update({k: MaskAdapter(c) for k, c in zip(levels, channels)})
        terms = {"distill": distill_weight, "mask": mask_weight}
        self.parts = tuple(f"{k}/{term}" for k in levels for term, w in terms.items() if w > 0)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: NetworkInfo, teacher: Any) -> dict[str, Any]:
        levels = sorted(student.shallow, key=lambda k: student.features[k].stride)
        ret = super().from_config(cfg, student, teacher)
        ret["binary"] = ret.pop("mask") == "binary"
        return {
            **ret,
            "levels": levels,
            "strides": [student.features[k].stride for k in levels],
            "channels": [student.features[k].channels for k in levels],
        }

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: Any) -> str | None:
        if "shallow" not in student.outputs:
            return (
                "the student's neck has no bottom-up pathway; set MODEL.BACKBONE.NAME to a "
                "build_..._pafpn_backbone"
            )
        if not student.has_boxes:
            return f"a {student.kind} has no ground-truth boxes"
        return super().problem(student, teacher)

    def losses(self, student: NetworkOutputs, teacher: Any) -> dict[str, Tensor]:
        losses = {}
        finest = next(iter(self.strides))
        for level, stride in self.strides.items():
            deep = student.features[level]
            if self.distill_weight > 0:
                factor = self.distill_weight * (self.gamma if level == finest else 1.0)
                loss = mssd(deep, student.shallow[level]) * factor
                losses[f"{level}/distill"] = loss / len(self.strides)
            if self.mask_weight > 0:
                mask = self.mask(student, level, stride)
                loss = fitnet(deep, self.mask_adapters[level](mask[:, None])) * self.mask_weight
                losses[f"{level}/mask"] = loss / len(self.strides)
        return losses

    def mask(self, student: NetworkOutputs, level: str, stride: int) -> Tensor:
        """Return the (N, H, W) masks of the ground-truth boxes on the cells of a level."""
        height, width = student.features[level].shape[2:]
        boxes = student.batch.boxes
        return gaussian_mask(boxes, height, width, stride, self.sigma2, self.binary)

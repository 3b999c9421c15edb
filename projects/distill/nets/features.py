"""A backbone without a detector, which teaches its features only."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import ImageList
from torch import Tensor, nn


@META_ARCH_REGISTRY.register()
class FeatureExtractor(nn.Module):
    """A network whose outputs are the maps of its backbone: a foundation model as a teacher.

    Args:
        backbone: gives maps (N, C, H / stride, W / stride) by name.
        pixel_mean, pixel_std: mean and deviation of each channel of images in [0, 255].
    """

    @configurable
    def __init__(
        self, *, backbone: Backbone, pixel_mean: Sequence[float], pixel_std: Sequence[float]
    ):
        super().__init__()
        self.backbone = backbone
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            "backbone": build_backbone(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of its detections; empty if it has none or they are unknown."""
        return getattr(self.backbone, "classes", ())

    @property
    def num_classes(self) -> int:
        """Number of classes whose names are known."""
        return len(self.classes)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device  # type: ignore[return-value]

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the maps of detectron2's inputs by name; it has no losses."""
        images = [
            (x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs
        ]
        padded = ImageList.from_tensors(images, self.backbone.size_divisibility)
        return self.backbone(padded.tensor)

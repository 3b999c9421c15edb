"""Feature extractors: a backbone alone, which may have detections."""

from collections.abc import Collection
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..nets.features import FeatureExtractor
from ..structures import NetworkOutputs
from ..utils.text import clause
from .base import Family


class FeatureFamily(Family):
    """Backbones without a head, which only teach."""

    architecture = FeatureExtractor

    @property
    def outputs(self) -> frozenset[str]:
        detects = getattr(self.model.backbone, "detects", False)
        return super().outputs | ({"detections"} if detects else set())

    @property
    def classes(self) -> tuple[str, ...]:
        return self.model.classes

    def ask(self, *args: Any, **kwargs: Any) -> NetworkOutputs:
        try:
            return super().ask(*args, **kwargs)
        except ValueError as e:  # the network of a user may refuse an image
            raise ConfigError(f"The teacher fails: {clause(e)}.") from e

    def answer(
        self,
        images: Tensor,
        student: NetworkOutputs,
        outputs: NetworkOutputs,
        needs: Collection[str],
    ) -> None:
        if "detections" in needs:
            outputs.detections = self.model.backbone.detect(images)

"""Feature extractors: a backbone alone, which may have detections."""

from collections.abc import Collection

from torch import Tensor

from ..nets.features import FeatureExtractor
from ..structures import NetworkOutputs
from .base import Family


class FeatureFamily(Family):
    """Backbones without a head, which only teach."""

    architecture = FeatureExtractor

    @property
    def outputs(self) -> frozenset[str]:
        detects = getattr(self.model.backbone, "detects", False)
        return super().outputs | ({"detections"} if detects else set())

    def ask(
        self, images: Tensor, student: NetworkOutputs, needs: Collection[str]
    ) -> NetworkOutputs:
        outputs = super().ask(images, student, needs)
        if "detections" in needs:
            outputs.detections = self.model.backbone.detect(images)
        return outputs

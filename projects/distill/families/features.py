"""Feature extractors: a backbone alone, which may have detections."""

from collections.abc import Collection, Mapping

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

    def ask(
        self,
        images: Tensor,
        student: NetworkOutputs,
        needs: Collection[str],
        known: Mapping[str, Tensor] | None = None,
    ) -> NetworkOutputs:
        try:
            outputs = super().ask(images, student, needs, known)
            if "detections" in needs:
                outputs.detections = self.model.backbone.detect(images)
        except ValueError as e:  # the network of a user may refuse an image
            raise ConfigError(f"The teacher fails: {clause(e)}.") from e
        return outputs

"""Feature extractors: a backbone alone, which may have detections."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

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

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        with _refusals():
            return super().maps(images)

    def answer(
        self,
        images: Tensor,
        student: NetworkOutputs,
        outputs: NetworkOutputs,
        needs: Collection[str],
    ) -> None:
        if "detections" in needs:
            with _refusals():
                outputs.detections = self.model.backbone.detect(images)


@contextmanager
def _refusals() -> Iterator[None]:
    """Raise ConfigError where the network of a user refuses an image by a ValueError."""
    try:
        yield
    except ValueError as e:
        raise ConfigError(f"The teacher fails: {clause(e)}.") from e

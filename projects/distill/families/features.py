"""Feature extractors: a backbone alone."""

from ..nets.features import FeatureExtractor
from .base import Family


class FeatureFamily(Family):
    """Backbones without a head, which only teach."""

    architecture = FeatureExtractor

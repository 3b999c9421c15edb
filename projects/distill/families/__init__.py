"""Families of networks: where each keeps the outputs that heads compare.

A family is an adapter of one kind of architecture. The networks themselves are in
:mod:`distill.nets` and in detectron2.
"""

from torch import nn

from ..errors import ConfigError
from .base import Family
from .dense import DenseFamily
from .features import FeatureFamily
from .rcnn import RCNNFamily
from .semantic import SemanticFamily

FAMILIES: tuple[type[Family], ...] = (
    RCNNFamily,
    DenseFamily,
    SemanticFamily,
    FeatureFamily,
)


def build_family(model: nn.Module) -> Family:
    """Wrap a network in its family.

    Raises:
        ConfigError: if no family fits.
    """
    for family in FAMILIES:
        if isinstance(model, family.architecture):
            return family(model)
    families = ", ".join(x.architecture.__name__ for x in FAMILIES)
    raise ConfigError(
        f"{type(model).__name__} has no family; it must be a subclass of one of: {families}."
    )


__all__ = ["DenseFamily", "Family", "FeatureFamily", "RCNNFamily", "SemanticFamily", "build_family"]

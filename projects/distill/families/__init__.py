"""Probes: where the signals live in a family of networks."""

from torch import nn

from ..errors import ConfigError
from .base import Family
from .dense import DenseFamily
from .rcnn import RCNNFamily
from .semantic import SemanticFamily

FAMILIES: tuple[type[Family], ...] = (RCNNFamily, DenseFamily, SemanticFamily)


def build_family(model: nn.Module) -> Family:
    """The probe of ``model``'s family.

    Raises:
        ConfigError: no family fits.
    """
    for family in FAMILIES:
        if isinstance(model, family.architecture):
            return family(model)
    families = ", ".join(p.architecture.__name__ for p in FAMILIES)
    raise ConfigError(f"{type(model).__name__} cannot be distilled; it must be one of: {families}.")


__all__ = ["DenseFamily", "Family", "RCNNFamily", "SemanticFamily", "build_family"]

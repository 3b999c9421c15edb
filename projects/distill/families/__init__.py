"""Probes: where the signals live in a family of networks."""

from torch import nn

from ..errors import ConfigError
from .base import Probe
from .dense import DenseProbe
from .rcnn import RCNNProbe
from .semantic import SemanticProbe

PROBES: tuple[type[Probe], ...] = (RCNNProbe, DenseProbe, SemanticProbe)


def build_probe(model: nn.Module) -> Probe:
    """The probe of ``model``'s family.

    Raises:
        ConfigError: no family fits.
    """
    for probe in PROBES:
        if isinstance(model, probe.family):
            return probe(model)
    families = ", ".join(p.family.__name__ for p in PROBES)
    raise ConfigError(f"{type(model).__name__} cannot be distilled; it must be one of: {families}.")


__all__ = ["DenseProbe", "Probe", "RCNNProbe", "SemanticProbe", "build_probe"]

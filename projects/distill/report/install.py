"""The optional dependency of the report."""

from importlib.util import find_spec

from ..errors import ConfigError

MISSING = "Install plotly for the report: pip install plotly."


def installed() -> bool:
    """Return whether the report can be written."""
    return find_spec("plotly") is not None


def check_installed() -> None:
    """Raise ConfigError if plotly is not installed."""
    if not installed():
        raise ConfigError(MISSING)

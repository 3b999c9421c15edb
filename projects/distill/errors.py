"""Errors that a user can mend: one sentence that names what to change."""


class DistillError(Exception):
    """Base class; the command line prints its message alone and exits with code 2."""


class ConfigError(DistillError, ValueError):
    """A config key or value that cannot work."""


class DataError(DistillError, ValueError):
    """A data set that cannot be trained on."""


class WeightsError(DistillError):
    """A checkpoint that is missing, unreadable or of another network."""


class CheckpointError(DistillError):
    """A checkpoint that cannot be written."""


class NumericalError(DistillError):
    """A loss or gradient that is not finite."""


class RecorderError(DistillError, RuntimeError):
    """A tapped module that does not exist or did not run."""

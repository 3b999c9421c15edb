"""Errors that a user can fix; the message is one sentence that says what to change."""


class DistillError(Exception):
    """Base class; the command line prints only the message and exits with code 2."""


class ConfigError(DistillError, ValueError):
    """An invalid config key or value."""


class DataError(DistillError, ValueError):
    """A data set that cannot be used for training or evaluation."""


class WeightsError(DistillError):
    """A checkpoint that is missing, unreadable or of another network."""


class CheckpointError(DistillError):
    """A checkpoint that cannot be written."""


class NumericalError(DistillError):
    """A loss or gradient that is not finite."""


class RecorderError(DistillError, RuntimeError):
    """A module whose output should be recorded, but which does not exist or did not run."""

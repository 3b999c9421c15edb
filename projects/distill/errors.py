"""Errors that a user can fix; the message is one sentence that says what to change."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


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


class ResultsError(DistillError):
    """Results of an evaluation that are not those of TEST.EXPECTED_RESULTS."""


class RecorderError(DistillError, RuntimeError):
    """A module whose output should be recorded, but which does not exist or did not run."""


@contextmanager
def of_teacher(name: str) -> Iterator[None]:
    """Say in the errors of this context to which of several teachers they belong.

    Args:
        name: name of the teacher; "" if there is only one.
    """
    try:
        yield
    except DistillError as e:
        if not name:
            raise
        raise type(e)(f"Teacher {name} of MODEL.DISTILL.TEACHERS: {e}") from e


_UNBUILDABLE = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)


@contextmanager
def building(network: str) -> Iterator[None]:
    """Turn detectron2's errors for a config that it cannot build into one sentence.

    Raises:
        ConfigError: the network cannot be built. The message has the statement that failed, which
            names the key in most cases.
    """
    try:
        yield
    except DistillError:
        raise
    except _UNBUILDABLE as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        reason = " ".join(str(e.args[0] if e.args else "").split())
        where = f" at {os.path.basename(frame.filename)}:{frame.lineno} `{frame.line}`"
        if (frame.line or "").startswith("raise "):  # then the reason is written for users
            where = ""
        raise ConfigError(
            f"The {network} cannot be built from its config: {type(e).__name__} {reason}{where}"
        ) from e

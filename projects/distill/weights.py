"""Reading weights: any format that detectron2 reads, strictly."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from .errors import WeightsError


class _StrictCheckpointer(DetectionCheckpointer):
    """Keeps what did not fit instead of logging it."""

    incompatible: Any = None

    def _load_model(self, checkpoint: Any) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible


ONCE_SAVED = ("pixel_mean", "pixel_std")  # by earlier detectron2; from the config now
UNREADABLE = (
    *(RuntimeError, OSError, EOFError, pickle.UnpicklingError),  # the file
    *(KeyError, ValueError, TypeError, AttributeError, AssertionError, ImportError),  # its content
)


@contextmanager
def readable(path: str, key: str) -> Iterator[None]:
    """Say in one sentence why a checkpoint cannot be loaded.

    Args:
        path: file or URL.
        key: config key that gave ``path``, for the message.

    Raises:
        WeightsError: the file is missing, or what is loaded inside failed.
    """
    if "://" not in path and not os.path.isfile(path):
        raise WeightsError(f"{key}: there is no file '{path}'.")
    try:
        yield
    except UNREADABLE as e:
        reason = " ".join(str(e).split()).split(". ")[0][:200] or type(e).__name__
        raise WeightsError(
            f"{key}: '{path}' cannot be read as a checkpoint (missing, truncated or of another "
            f"format): {reason}"
        ) from e


def load_strictly(model: nn.Module, path: str, key: str) -> None:
    """Load a checkpoint of which every key must fit, in any format that detectron2 reads.

    Args:
        model: receives the weights.
        path: file or URL.
        key: config key that gave ``path``, for the messages.

    Raises:
        WeightsError: the file is missing or unreadable, or a key is missing, left over or of
            another shape. A partly loaded teacher is the most common silent failure there is.
    """
    if not path:
        raise WeightsError(f"{key} is empty; name a checkpoint file or URL.")
    checkpointer = _StrictCheckpointer(model)
    with readable(path, key):
        checkpointer.load(path)
    found = checkpointer.incompatible
    misfits = {k: (a, b) for k, a, b in found.incorrect_shapes}
    problems = [f"{k} has shape {a} where {b} is needed" for k, (a, b) in misfits.items()]
    problems += [f"{k} is missing" for k in found.missing_keys if k not in misfits]
    problems += [f"{k} is left over" for k in found.unexpected_keys if k not in ONCE_SAVED]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" * (len(problems) > 5))
        raise WeightsError(
            f"{key}: '{path}' does not fit {type(model).__name__} of the given config: {shown}."
        )

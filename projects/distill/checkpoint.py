"""Checkpoints: strict loading, and the layout that is a stock detectron2 checkpoint.

``{"model": student, "distill": heads, "student_state": floats outside the state dict, "trainer":
optimizer, scheduler and hooks, "iteration": int}``. Only plain types and tensors go in, so that
``torch.load(..., weights_only=True)`` reads it.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from .errors import WeightsError


class StudentCheckpointer(DetectionCheckpointer):
    """Writes a checkpoint to a temporary file first: a crash leaves the earlier ones intact."""

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with open(f"{path}.tmp", "wb") as f:
            torch.save(data, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
        self.tag_last_checkpoint(f"{name}.pth")


class StudentState:
    """Python numbers of a student that its state dict lacks but an exact resume needs.

    RetinaNet and FCOS keep a moving average of the number of positive anchors.
    """

    NAMES = ("loss_normalizer",)

    def __init__(self, student: nn.Module):
        self.student = student

    def state_dict(self) -> dict[str, float]:
        return {n: float(getattr(self.student, n)) for n in self.NAMES if hasattr(self.student, n)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            setattr(self.student, name, value)


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

"""Training checkpoints: a stock detectron2 checkpoint of the student, and what a resume needs.

``{"model": student, "distill": heads, "student_state": floats outside the state dict, "trainer":
optimizer, scheduler and hooks, "iteration": int}``. Only plain types and tensors go in, so that
``torch.load(..., weights_only=True)`` reads it.
"""

import os
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn


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

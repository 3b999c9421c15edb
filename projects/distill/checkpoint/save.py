"""Training checkpoints: a stock detectron2 checkpoint of the student, and the state of a resume.

``{"model": student, "distill": heads, "student_state": floats outside the state dict, "trainer":
optimizer, scheduler, hooks and the run's seed, "iteration": int}``. With ``SOLVER.QAT``,
"quantization" has the ranges of the student's tensors. A checkpoint has plain types and tensors
only, so that ``torch.load(..., weights_only=True)`` reads it.
"""

import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import CheckpointError, WeightsError
from ..utils.io import file_hash, replacing
from ..utils.old_names import HEADS, with_renamed_keys
from ..utils.text import first_sentence
from .compare import tensor_misfits
from .load import SafeCheckpointer, read_torch

T = TypeVar("T")
STUDENT = "model", "quantization"  # parts without which the student predicts something else
PERIODIC = re.compile(r"model_(\d+)\.pth")  # detectron2's names of periodic checkpoints


class StudentCheckpointer(SafeCheckpointer):
    """Checkpointer whose files survive a crash, and which finds the newest intact one.

    Args:
        weights_in_place: context in which the student has the weights to write.
        args, kwargs: arguments of :class:`SafeCheckpointer`.
    """

    def __init__(
        self,
        *args: Any,
        weights_in_place: Callable[[], AbstractContextManager[None]] = nullcontext,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.weights_in_place = weights_in_place
        self._check: Callable[[dict[str, Any]], None] | None = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        nothing: dict[str, Any] = {key: {} for key in self.checkpointables}
        content = {**nothing, **super()._load_file(filename)}  # fvcore skips what a file lacks
        if self._check:
            self._check(content)
        return content

    def resume(self, path: str, check: Callable[[str, dict[str, Any]], T]) -> T:
        """Load everything of a checkpoint, after a check of its content.

        Args:
            path: file that :meth:`save` has written.
            check: function of the path and the content. It raises an error if they do not fit.

        Returns:
            The result of ``check``.
        """
        checked: list[T] = []
        self._check = lambda content: checked.append(check(path, content))
        try:
            self.load(path)
        finally:
            self._check = None
        return checked[0]

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``save_dir/<name>.pth`` and its checksum, and tag it as the last checkpoint.

        Raises:
            CheckpointError: it cannot be written; the earlier checkpoints are unchanged.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        with self.weights_in_place():
            data = {"model": self.model.state_dict()}
            data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
            data.update(kwargs)
            self._write(name, data)
        self.tag_last_checkpoint(f"{name}.pth")

    def save_best(self, iteration: int, metric: str, value: float) -> None:
        """Write ``model_best.pth`` with the student only, from which no run can resume."""
        with self.weights_in_place():
            parts = {"model": self.model, **self.checkpointables}
            student = {key: x.state_dict() for key, x in parts.items() if key in STUDENT}
            self._write("model_best", {**student, "iteration": iteration, metric: value})

    def _write(self, name: str, data: dict[str, Any]) -> None:
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        try:
            write_checked(path, data)
        except (OSError, RuntimeError) as e:
            # torch's writer raises its own RuntimeError after the error that stopped it.
            cause = e if isinstance(e, OSError) else e.__context__ or e
            if isinstance(cause, RuntimeError) and "inline_container" not in str(cause):
                raise cause from None  # from another place: a data worker died meanwhile
            reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
            before = len(resumable(self.save_dir))
            raise CheckpointError(
                f"Checkpoint '{path}' cannot be written ({reason}); the {before} before it are "
                "intact: fix the cause and continue with --resume."
            ) from e

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as f:
            f.write(last_filename_basename.encode())

    def newest_intact(self) -> str | None:
        """Return the checkpoint to resume from, or None if the folder has no checkpoint.

        Raises:
            WeightsError: all checkpoints are damaged.
        """
        damaged = []
        for path in resumable(self.save_dir):
            reason = damage(path)
            if reason is None:
                return path
            self.logger.warning("Checkpoint %s %s: using the one before it.", path, reason)
            damaged.append(f"'{path}' {reason}")
        if damaged:
            raise WeightsError(
                f"--resume: {damaged[0]}, and none of {len(damaged)} checkpoints is intact; "
                "remove them or set another OUTPUT_DIR to start from the beginning."
            )
        return None

    def prune(self, keep: int) -> None:
        """Remove all periodic checkpoints except the newest ``keep``."""
        for name in _periodic(self.save_dir)[keep:]:
            path = os.path.join(self.save_dir, name)
            # A crash between the two may leave a checkpoint, but no checksum without a checkpoint.
            if os.path.isfile(checksum_file(path)):
                os.remove(checksum_file(path))
            os.remove(path)


def resumable(folder: str) -> list[str]:
    """List the checkpoints to resume from: the tagged one, then the others, newest first."""
    if not os.path.isdir(folder):
        return []
    names = _periodic(folder)
    tag = os.path.join(folder, "last_checkpoint")
    if os.path.isfile(tag):
        with open(tag, errors="replace") as f:
            last = f.read().strip()
        # The file may hold anything; accept only the name of a file in this folder.
        if last == os.path.basename(last) and last in os.listdir(folder):
            names = [last] + [x for x in names if x != last]
    return [os.path.join(folder, x) for x in names]


def _periodic(folder: str) -> list[str]:
    """List the names of the periodic checkpoints, the last one written first.

    A checkpoint of a higher iteration may be older: it is damaged, or of another run in the folder.
    """
    names = filter(PERIODIC.fullmatch, os.listdir(folder))
    written = {x: os.path.getmtime(os.path.join(folder, x)) for x in names}
    return sorted(written, key=lambda x: (written[x], x), reverse=True)


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
        for name in self.NAMES:
            if name in state:
                setattr(self.student, name, state[name])
            elif hasattr(self.student, name):  # the first step sets it
                delattr(self.student, name)


class HeadState:
    """State of the distillation heads, which is loaded only into the same heads."""

    def __init__(self, heads: nn.ModuleDict):
        self.heads = heads

    def state_dict(self) -> dict[str, Any]:
        return self.heads.state_dict()

    def misfits(self, state: dict[str, Any]) -> Iterator[str]:
        """Yield how the tensors of a checkpoint differ from those of the heads.

        Raises:
            WeightsError: a state belongs to no head, or a head has none.
        """
        state, tensors = self._renamed(state), self.state_dict()
        saved, own = ({name.split(".")[0] for name in x} for x in (state, tensors))
        check_states("head", saved, own, own, "set MODEL.DISTILL.HEADS as it was")
        yield from tensor_misfits(state, tensors)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of every head, also under the name that it had in an earlier version."""
        self.heads.load_state_dict(self._renamed(state))

    @staticmethod
    def _renamed(state: dict[str, Any]) -> dict[str, Any]:
        return with_renamed_keys(state, HEADS, "The checkpoint")


def check_states(
    kind: str, saved: Collection[str], own: Collection[str], needed: Collection[str], remedy: str
) -> None:
    """Raise a WeightsError if a checkpoint has other states than this training.

    Args:
        kind: noun for the message, such as "hook".
        saved: names of those whose state is in the checkpoint.
        own: names of those in this training.
        needed: names of those that cannot start without a state.
        remedy: advice for the message.
    """
    unknown, missing = sorted({*saved} - {*own}), sorted({*needed} - {*saved})
    if unknown or missing:
        problem = "a state of" if unknown else "no state of"
        raise WeightsError(
            f"the checkpoint has {problem} the {kind} {', '.join(unknown or missing)}, which this "
            f"training {'lacks' if unknown else 'has'}; {remedy}."
        )


def checksum_file(path: str) -> str:
    """Return the path of a checkpoint's checksum, in the format of ``sha256sum --check``."""
    return f"{path}.sha256"


def write_checked(path: str, data: Any) -> None:
    """Save so that a crash at any moment leaves the complete old file or the complete new one.

    After a crash, the new file may lack its checksum, but it never has a wrong one.
    """
    with replacing(path) as f:
        torch.save(data, f)
        f.flush()
        os.fsync(f.fileno())
        digest = file_hash(f.name)
        if os.path.exists(checksum_file(path)):
            os.remove(checksum_file(path))  # it belongs to the old file
    with replacing(checksum_file(path)) as f:
        f.write(f"{digest}  {os.path.basename(path)}\n".encode())


def damage(path: str) -> str | None:
    """Return what is wrong with a checkpoint file, or None; nothing of it is executed.

    A file without a checksum is judged by the checksums of torch's zip format, and by torch.
    """
    try:
        if os.path.isfile(checksum_file(path)):
            with open(checksum_file(path), errors="replace") as f:
                expected = f.read().split()
            return None if file_hash(path) in expected else "does not have its checksum"
        read_torch(path)
        return None
    except Exception as e:  # damaged bytes may raise anything
        return f"cannot be read ({first_sentence(e)})"

"""Child process with a training that is disturbed at a chosen step."""

import builtins
import ctypes
import io
import json
import multiprocessing
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.engine.hooks import PeriodicWriter

import distill.utils.io
from distill.launch.main import main

METRICS_PERIOD = 2  # iterations; with detectron2's 20, the short run would write a single row

Place = tuple[str, str, int]
"""Step of a training: kind (open, write, fsync, replace, remove), name of the file, and number of
equal steps before it. The fork of a data worker is ("fork", name of OUTPUT_DIR, number). The steps
of a training are always the same."""
Act = Callable[[], Any]


class Steps:
    """Record of the steps that write checkpoints and metrics, and of forks.

    Args:
        folder: OUTPUT_DIR of the training.
        place: step at which ``act`` is called: before the step, in the middle of a write, or after
            a fork. None: never.
        act: function that disturbs the training.
    """

    def __init__(self, folder: Path, place: Place | None, act: Act):
        self.folder = str(folder)
        self.place = place
        self.act = act
        self.taken: list[Place] = []
        self._counts: Counter[tuple[str, str]] = Counter()

    def watch(self) -> None:
        """Replace the functions of the operating system by recording ones."""
        fsync, replace, remove = os.fsync, os.replace, os.remove

        os.register_at_fork(after_in_parent=lambda: self.take("fork", self.folder))

        def watched_fsync(fd: int) -> None:
            self.take("fsync", os.readlink(f"/proc/self/fd/{fd}"))
            fsync(fd)

        def watched_replace(source: str, target: str) -> None:
            self.take("replace", target)
            replace(source, target)

        def watched_remove(path: str) -> None:
            self.take("remove", path)
            remove(path)

        os.fsync, os.replace, os.remove = watched_fsync, watched_replace, watched_remove  # type: ignore[assignment]

        def watched_open(path: str, mode: str = "r", **kw: Any) -> Any:
            if mode != "wb":
                return builtins.open(path, mode, **kw)
            self.take("open", path)
            return _Writer(path, self)

        distill.utils.io.open = watched_open  # type: ignore[attr-defined]

    def take(self, kind: str, path: str) -> None:
        if self.reaches(kind, path):
            self.act()

    def reaches(self, kind: str, path: str) -> bool:
        """Record a step, and return True if it is the step at which to act."""
        if self.folder not in (path, os.path.dirname(path)):
            return False
        name = os.path.basename(path)
        place = (kind, name, self._counts[kind, name])
        self._counts[kind, name] += 1
        self.taken.append(place)
        return place == self.place


class _Writer(io.BufferedWriter):
    """File opened with "wb"; when the act comes in a write, half of the data is on the disk."""

    def __init__(self, path: str, steps: Steps):
        super().__init__(io.FileIO(path, "w"))
        self.steps = steps

    def write(self, data: Any) -> int:
        data = bytes(data)
        if self.steps.reaches("write", str(self.name)):
            half = len(data) // 2
            super().write(data[:half])
            self.flush()
            self.steps.act()
            data = data[half:]
        return super().write(data)


# ---- Disturbances.


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_a_worker() -> None:
    worker = multiprocessing.active_children()[0]
    assert worker.pid
    os.kill(worker.pid, signal.SIGKILL)
    # On a busy machine it dies later than the next steps are taken. Its parent reaps it.
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)


def nothing() -> None:
    pass


def hide(path: Path) -> None:
    """Rename a file; :func:`unhide` restores it."""
    path.rename(f"{path}.hidden")


def unhide(path: Path) -> None:
    Path(f"{path}.hidden").rename(path)


def fill(folder: Path, free: int = 0) -> None:
    """Fill the file system of ``folder`` up to ``free`` bytes, in whole pages."""
    space = os.statvfs(folder)
    with open(folder / "ballast", "ab") as f:
        used = f.tell()
        size = used + space.f_bavail * space.f_frsize - free
        if size > used:
            os.posix_fallocate(f.fileno(), 0, size)


def limit_files(size: int) -> None:
    """Limit the size of all files that this process writes, in bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# ---- Process.


def enter(pid: int) -> None:
    """Join the user and mount namespaces of another process, which can mount file systems there."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("user", "mnt"):
        with open(f"/proc/{pid}/ns/{kind}") as f:
            if libc.setns(f.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"setns {kind}")


def train(
    argv: Sequence[str], output: Path, log: Path, place: Place | None, act: Act, disk: int
) -> int:
    """Run ``train_net.py`` in this process, and return its exit code.

    Args:
        argv: arguments of the command line.
        output: OUTPUT_DIR.
        log: file to which the steps are written if ``place`` is None.
        place, act: see :class:`Steps`.
        disk: process whose file systems are visible; 0: this process.
    """
    with open(log, "w") as steps_file:  # while the disk of the log is visible
        if disk:
            enter(disk)
        init = PeriodicWriter.__init__
        PeriodicWriter.__init__ = lambda self, writers, period: init(self, writers, METRICS_PERIOD)  # type: ignore[method-assign]
        steps = Steps(output, place, act)
        steps.watch()
        code = main(argv)
        if place is None:
            json.dump(steps.taken, steps_file)
    return code

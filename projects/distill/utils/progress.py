"""Progress of a command's stages: bars on a terminal, and lines in a file or pipe."""

import sys
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from .text import printable

PARTS = 10  # parts of a stage; there is one line after each part
LINE_PERIOD_S = 2.0  # shortest time between two of these lines, so that quick stages print few


class Progress(RichProgress):
    """rich's progress bars, which become lines if stdout is not a terminal.

    A stage prints a line when it starts, a line when it ends, and after every 10 % a line with the
    remaining time.

    Args:
        json: True if the command prints JSON on stdout. Then there are no lines, and bars only if
            stderr is a terminal, on which they are printed.
        transient: remove the bars at the end.
    """

    def __init__(self, json: bool = False, transient: bool = False):
        # Keep the current stream: bars stay visible while a stage's own output goes to a file.
        console = Console(file=sys.stderr if json else sys.stdout)
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=transient,
            disable=not console.is_terminal,
            auto_refresh=console.is_terminal,  # otherwise `track` advances in a thread
        )
        self._lines: dict[TaskID, _Lines] | None = {} if self.disable and not json else None

    def add_task(self, *args: Any, **kwargs: Any) -> TaskID:
        task_id = super().add_task(*args, **kwargs)
        self._print_line(task_id)
        return task_id

    def update(self, task_id: TaskID, **kwargs: Any) -> None:
        super().update(task_id, **kwargs)
        self._print_line(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._print_line(task_id)

    def _print_line(self, task_id: TaskID) -> None:
        if self._lines is None:
            return
        task = self._tasks[task_id]
        line = self._lines.setdefault(task_id, _Lines(task)).due(task)
        if line:
            print(printable(line), file=self.console.file, flush=True)


class _Lines:
    """Lines of one stage."""

    def __init__(self, task: Task):
        self.start = self.last = time.monotonic()
        self.done_at_start = task.completed  # by an earlier run
        self.part = -1  # parts of the stage that were done at the last line

    def due(self, task: Task) -> str | None:
        """Return the line to print now, or None."""
        now, name, done, total = time.monotonic(), task.description, task.completed, task.total or 0
        part = int(done * PARTS // total) if total else PARTS
        if self.part < 0:
            steps = f"{name}: {done:g} of {total:g}" if total > 1 else f"{name} ..."
            line = steps if part < PARTS else name
        elif part == PARTS > self.part and total > 1:
            line = f"{name}: done in {_duration(now - self.start)}"
        elif self.part < part < PARTS and now - self.last >= LINE_PERIOD_S:
            left = (now - self.start) / (done - self.done_at_start) * (total - done)
            line = f"{name}: {done:g} of {total:g}, ETA {_duration(left)}"
        else:
            return None
        self.last, self.part = now, part
        return line


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

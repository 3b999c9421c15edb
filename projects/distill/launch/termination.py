"""End of a run by an error or a signal: one sentence with the remedy, and no orphans.

An orphan is a process that this one started and that would keep running after it.
"""

import errno
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any, NoReturn

import torch

from ..errors import DistillError
from ..utils.text import print_error

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPORT_DELAY_S = 2.0  # time for another process to report the cause of a SecondaryError
GRACE_PERIOD_S = 5.0  # seconds that started processes have to end, before they are killed


class SecondaryError(DistillError):
    """Error of a process because another one ended, which knows the cause."""


RESUME = "continue with --resume."
RERUN = "start the same command again."
_WORKER = (
    "a data worker (pid {0}) was killed or crashed: lower DATALOADER.NUM_WORKERS to save memory, "
    f"or give /dev/shm more room (docker run --shm-size 8g), and {RESUME}"
)
_SLOW_DATA = (
    "no batch came for {0} seconds (DATALOADER.TIMEOUT): the disk is slow or a data worker hangs; "
    f"raise DATALOADER.TIMEOUT or DATALOADER.NUM_WORKERS and {RESUME}"
)
_FILES = f"too many files are open: raise `ulimit -n` or lower DATALOADER.NUM_WORKERS, and {RESUME}"
_SHARED = (
    "shared memory is full: give /dev/shm more room (docker run --shm-size 8g) or lower "
    f"DATALOADER.NUM_WORKERS, and {RESUME}"
)
_GPU_MEMORY = (
    "the GPU is out of memory: raise SOLVER.ACCUMULATE, lower SOLVER.IMS_PER_BATCH, "
    "INPUT.MIN_SIZE_TRAIN or INPUT.MAX_SIZE_TRAIN, or set SOLVER.AMP.ENABLED True, and "
    f"{RESUME}"
)
_MEMORY = (
    "the machine is out of memory: raise SOLVER.ACCUMULATE, lower SOLVER.IMS_PER_BATCH, "
    f"INPUT.MIN_SIZE_TRAIN, INPUT.MAX_SIZE_TRAIN or DATALOADER.NUM_WORKERS and {RESUME}"
)
_DISK = f"there is no space left on the device{{0}}; free some and {RESUME}"
_TEMPORARY = (
    "no folder for temporary files can be written ({0}): free some space there, or name another "
    f"one by the environment variable TMPDIR, and {RESUME}"
)
_SHARED_GPU = (
    "two processes use one GPU: start as many as there are GPUs (--num-gpus, --nproc-per-node or "
    "--ntasks-per-node)."
)
PORT_TAKEN = (
    "port {0} is taken, perhaps by another run: choose another one in --dist-url or MASTER_PORT, "
    "or on a single machine --dist-url auto."
)
_ABSENT = (
    "only {0} of {1} processes came within --dist-timeout: start all of them with the same "
    "--dist-url and --num-machines, on connected machines."
)
_HANGS = (
    "another process did not answer for {0} s (--dist-timeout): it hangs, is stopped, or needs "
    f"longer; find out which, or raise --dist-timeout, and {RESUME}"
)
_LOST = (
    "lost the connection to another process: it ended, was killed, or its machine cannot be "
    f"reached (its own last lines say why); {RESUME}"
)
_SECONDARY = (_WORKER, _HANGS, _LOST)

_Types = type[Exception] | tuple[type[Exception], ...]
# Type, pattern of the message, and sentence. The first row that matches an error gives its
# sentence, in which {0} and {1} are the groups of the pattern. gloo, NCCL and the data loader raise
# RuntimeError or classes derived from it.
_USER_ERRORS: tuple[tuple[_Types, str, str], ...] = (
    (RuntimeError, r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", _WORKER),
    (RuntimeError, r"DataLoader timed out after (\d+)", _SLOW_DATA),
    ((RuntimeError, OSError), "Too many open files", _FILES),
    (RuntimeError, "shared memory object|</torch_", _SHARED),
    (torch.OutOfMemoryError, "", _GPU_MEMORY),
    (RuntimeError, "CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED", _GPU_MEMORY),
    (MemoryError, "", _MEMORY),
    ((RuntimeError, OSError), "annot allocate memory|can't allocate memory", _MEMORY),
    (OSError, rf"\[Errno (?:{errno.ENOSPC}|{errno.EDQUOT})\][^:\n]*(: '.*')?", _DISK),
    (OSError, r"No usable temporary directory found in \[(.*)\]", _TEMPORARY),
    (RuntimeError, "inline_container.*(?:unexpected pos|failed writing)()", _DISK),
    (RuntimeError, "Duplicate GPU detected", _SHARED_GPU),
    (RuntimeError, r"failed to listen .* port: (\d+).*EADDRINUSE", PORT_TAKEN),
    (RuntimeError, r"waiting for clients\. (\d+)/(\d+) clients joined", _ABSENT),
    (RuntimeError, r"(?:Timed out waiting |wait timeout after |\(ms\)=)(\d+)\d{3}", _HANGS),
    (RuntimeError, "Connection (?:closed|reset|refused|timed out|was likely closed)", _LOST),
    (RuntimeError, "Broken pipe|failed to recv|caused pair closure", _LOST),
    (RuntimeError, "remote process exited|communicator was aborted", _LOST),
)


def user_error(error: BaseException) -> DistillError | None:
    """Translate an error to one that says what to do, or return None for a bug.

    If an error is unknown but was raised while another one was handled, the other one is
    translated.
    """
    if isinstance(error, DistillError):
        return error
    for types, pattern, sentence in _USER_ERRORS:
        if isinstance(error, types) and (found := re.search(pattern, str(error))):
            kind = SecondaryError if sentence in _SECONDARY else DistillError
            return kind(sentence.format(*(x or "" for x in found.groups())))
    before = error.__cause__ or error.__context__
    return user_error(before) if before else None


def run_command(run: Callable[[], int]) -> int:
    """Run a command in this process, and turn every end of it into an exit code.

    This is the rule for all commands. A command returns 0, or another code for what it found. The
    code is 2 after one sentence about a mistake of the user, and 1 after the traceback of a bug. It
    is 130 and 143 after SIGINT and SIGTERM.

    Args:
        run: function that runs the command and returns its exit code.
    """

    def exit_message() -> str:
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h\n")  # show the cursor, which progress bars hide
        return RERUN

    quiet_libraries()
    with exit_on_signals(exit_message):
        try:
            return run()
        except Exception as e:
            return report_error(e, advice=RERUN)


def quiet_libraries() -> None:
    """Suppress remarks of libraries on stderr, which is for the line that says why a run ends."""
    # These two remark on a CUDA toolkit without a GPU, and on how detectron2 calls torch.fx.
    for name in ("torch.utils.cpp_extension", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_without_explanation)
    logging.raiseExceptions = False  # no traceback for each line that a full disk does not accept
    # The thread of TensorBoard would print errors that its next call raises in this thread.
    usual = threading.excepthook
    threading.excepthook = lambda x: None if x.exc_value and user_error(x.exc_value) else usual(x)


def _without_explanation(record: logging.LogRecord) -> bool:
    return not (record.exc_info and record.exc_info[1] and user_error(record.exc_info[1]))


def report_error(
    error: BaseException, rank: int = 0, local_rank: int = 0, advice: str = RESUME
) -> int:
    """Print why this process ends: one sentence, or the traceback of a bug.

    Several processes often find the same error, or only notice that another one ended. The process
    that started them stops all of them after the first one ends. So processes whose sentence may
    not be needed wait before they print it.

    Args:
        error: the error that ends the process.
        rank, local_rank: ranks of this process, see :class:`ProcessInfo`.
        advice: sentence that says how to continue the command.

    Returns:
        The exit code: 2 for an error with a sentence, else 1.
    """
    found = user_error(error)
    time.sleep(REPORT_DELAY_S * (local_rank + isinstance(found, SecondaryError)))
    who = f"rank {rank}: " if rank else ""
    if found:
        print_error(f"{who}{found}".replace(RESUME, advice))
        return 2
    trace = "".join(traceback.format_exception(error))
    print(f"{who}{trace}", end="", file=sys.stderr, flush=True)
    return 1


@contextmanager
def exit_on_signals(
    exit_message: Callable[[], str] | None, grace_period_s: float = 0.0
) -> Iterator[None]:
    """In this context, SIGINT and SIGTERM end this process and those that it started.

    The exit code is 130 or 143. The process ends at once, as if it were killed. An exception raised
    by a signal handler could be swallowed, and clean-up could wait for a collective operation that
    no other process joins.

    Args:
        exit_message: function that returns the line for stderr when the signal comes; None: no
            line.
        grace_period_s: see :func:`exit_process`.
    """
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # other threads cannot set handlers
        yield
        return
    owner = os.getpid()

    def end(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a data worker, forked with these handlers
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return  # Ctrl-C reaches the owner too, which ends its workers
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        if exit_message:  # do not use print: the signal may have interrupted one
            line = f"stopped by {signal.Signals(number).name}: {exit_message()}\n"
            with suppress(OSError):  # stderr may be closed
                os.write(2, line.encode())
        exit_process(128 + number, grace_period_s)

    with _handling(end):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see `signals_deferred`
        yield


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Delay signals while processes are started in this context.

    The started processes get SIGINT only when they have set their handlers. Otherwise Ctrl-C would
    print a traceback of the imports of each process.
    """
    resource_tracker.ensure_running()  # it would start with the first process and unblock SIGINT
    came: list[int] = []
    with _handling(lambda number, frame: came.append(number)):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # which the processes inherit
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if came:
        signal.raise_signal(came[0])


@contextmanager
def _handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    caught = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]  # as by nohup
    for number in caught:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number] or signal.SIG_DFL)


def exit_process(code: int, grace_period_s: float = 0.0) -> NoReturn:
    """End this process and those that it started at once, without clean-up.

    Args:
        code: exit code.
        grace_period_s: seconds that the started processes have to end, before they are killed.
    """
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the data loader's handler raises
    children = multiprocessing.active_children()
    if grace_period_s:
        deadline = time.monotonic() + grace_period_s
        for child in children:
            child.terminate()
        for child in children:
            child.join(max(0.0, deadline - time.monotonic()))
    for child in children:
        child.kill()
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


def resume_hint(folder: str) -> str:
    """Return the line on how to resume a training in ``folder``; "" if none was running."""
    if not folder:
        return "no training was running."
    try:
        with open(os.path.join(folder, "last_checkpoint"), errors="replace") as f:
            last = os.path.join(folder, f.read().strip())
    except OSError:
        return f"there is no checkpoint in {folder} yet."
    return f"the last checkpoint is {last}; {RESUME}"

"""Processes of their own, in which everything is imported already, alone or in a group."""

import multiprocessing
import os
import runpy
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import popen_forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def starts_processes(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that starts processes; all of these run on one worker of pytest-xdist."""
    return pytest.mark.e2e(pytest.mark.xdist_group("processes")(test))


WORLD = 2  # processes of `spawn`
TIMEOUT = 300.0  # seconds

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["distill.engine", "torch.utils.tensorboard"])


class _Popen(popen_forkserver.Popen):
    """Process whose end several threads may notice.

    Each start of a process asks all others for their exit codes. A code can be read only once; of
    two threads that read it at the same time, one would get 255.
    """

    _reading = threading.Lock()

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if flag != os.WNOHANG:
            wait([self.sentinel])
        with self._reading:
            return super().poll(os.WNOHANG)


class _Process(_context.Process):  # type: ignore[name-defined,misc]
    @staticmethod
    def _Popen(process: BaseProcess) -> _Popen:
        return _Popen(process)


def start(function: Callable[..., int | None], *args: Any, out: Path, err: Path) -> BaseProcess:
    """Call a function in a process that leads a session of its own.

    Args:
        function: returns the exit code.
        args: arguments of the function.
        out: file to which stdout is appended.
        err: likewise, of stderr.
    """
    process = _Process(target=_call, args=(function, args, out, err))
    process.start()
    return process


def _call(function: Callable[..., int | None], args: Any, out: Path, err: Path) -> None:
    os.setsid()
    for fd, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    # As in a process that was started by hand: data workers are forks of it.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    raise SystemExit(function(*args))


def call(function: Callable[..., int | None], *args: Any, folder: Path) -> CompletedProcess[str]:
    """Call a function in a process of its own, and wait for its end.

    Args:
        function: returns the exit code.
        args: arguments of the function.
        folder: for the files that keep what it writes.
    """
    out, err = folder / "stdout", folder / "stderr"
    process = start(function, *args, out=out, err=err)
    process.join(TIMEOUT)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return CompletedProcess(args, process.exitcode, out.read_text(), err.read_text())


def script(path: Path, argv: list[str], folder: Path) -> None:
    """Run a Python script as a program, in a folder."""
    os.chdir(folder)
    sys.argv = [str(path), *argv]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


# ---- Groups.


def with_forks(function: Callable[..., int], *args: Any) -> int:
    """Call a function whose processes are forks of its own, so that they import nothing anew."""
    context = multiprocessing.get_context("fork")
    with mock.patch("multiprocessing.get_context", lambda method: context):
        return function(*args)


def has_loopback() -> bool:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError:
        return False
    return True


needs_loopback = pytest.mark.skipif(not has_loopback(), reason="gloo needs a loopback interface")


def spawn(worker: Callable[..., None], folder: Path) -> None:
    """Run ``worker(rank, folder)`` in two gloo processes; one that hangs is an error."""
    options: dict[str, Any] = {"nprocs": WORLD, "join": False, "start_method": "forkserver"}
    context = mp.start_processes(_join, (worker, folder), **options)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{worker.__name__} hangs"
    finally:
        for process in context.processes:
            process.kill()


def _join(rank: int, worker: Callable[..., None], folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "rendezvous"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    try:
        worker(rank, folder)
    finally:
        dist.destroy_process_group()

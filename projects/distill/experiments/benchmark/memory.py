"""Peak memory of a call, and the trace of its operations."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

MIB = 2**20


def write_trace(function: Callable[[], Any], cuda: bool, path: Path) -> None:
    """Write the operations of a call as a trace for chrome://tracing and Perfetto."""
    with profile(use_device="cuda" if cuda else None, profile_memory=True) as profiler:
        function()
    profiler.export_chrome_trace(str(path))


def peak_mebibytes(function: Callable[[], Any], cuda: bool) -> float:
    """Return how many MiB of tensors a call needs at most, besides those that exist before it.

    Memory that libraries take for themselves, such as oneDNN, does not count.
    """
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        write_trace(function, cuda, path)
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((x["ts"], x["args"]["Bytes"]) for x in events if x.get("name") == "[memory]")
    total = peak = 0
    for _, number in changes:
        total += number
        peak = max(peak, total)
    return peak / MIB

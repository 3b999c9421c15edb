"""Time of calls."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(function: Callable[[], Any], cuda: bool) -> float:
    """Return the time of one call in seconds, including its work on a GPU if ``cuda``."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def cpu_milliseconds(function: Callable[[int], Any], repeats: int = 20, warm_up: int = 3) -> float:
    """Return the median CPU time of a call in ms, which does not depend on what else runs.

    Args:
        function: it gets the number of the call.
        repeats: measured calls.
        warm_up: calls before them.
    """
    taken = []
    for k in [*range(warm_up), *range(repeats)]:
        start = time.process_time()
        function(k)
        taken.append(1000 * (time.process_time() - start))
    return statistics.median(taken[warm_up:])

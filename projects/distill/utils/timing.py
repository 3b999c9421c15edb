"""Time of calls."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def timed(function: Callable[[], T], cuda: bool = False) -> tuple[T, float]:
    """Return the result of one call and its seconds, with its work on a GPU if ``cuda``."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def seconds(function: Callable[[], Any], cuda: bool) -> float:
    """Return the seconds of one call, with its work on a GPU if ``cuda``."""
    return timed(function, cuda)[1]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the ``median`` and the interquartile range, ``iqr``, of at least one value."""
    if len(values) < 2:
        return {"median": values[0], "iqr": 0.0}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "iqr": high - low}


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

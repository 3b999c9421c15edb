"""Wall-clock time of calls."""

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

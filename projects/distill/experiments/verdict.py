"""Verdicts about differences that were measured in pairs of runs with the same seed."""

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

LEVEL = 0.05  # chance that any verdict of a table is wrong
MOST_SEEDS = 100


@dataclass(frozen=True)
class Gain:
    """Paired differences of a metric to that of the baseline, one per seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def margin(self) -> float:
        """Half the width of the 95 % interval of the mean, by Student's t; infinite for one."""
        return _margin(self._deviation, len(self.values))

    @property
    def p_value(self) -> float:
        """Probability of such a mean or a larger one if the true one is 0; 1 for a single value."""
        if len(self.values) < 2 or self.mean == 0:
            return 1.0
        if self._deviation == 0:
            return 0.0
        t = self.mean / self._deviation * math.sqrt(len(self.values))
        return float(2 * stats.t.sf(abs(t), len(self.values) - 1))

    @property
    def seeds_to_decide(self) -> int | None:
        """Seeds whose interval would exclude 0 if mean and deviation stay; None: more than 100."""
        if len(self.values) < 2:
            return None
        numbers = range(2, MOST_SEEDS + 1)
        return next((n for n in numbers if _margin(self._deviation, n) < abs(self.mean)), None)

    @property
    def _deviation(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else math.inf

    def __str__(self) -> str:
        if not math.isfinite(self.margin):
            return f"{self.mean:+.1f}"
        low, high = self.mean - self.margin, self.mean + self.margin
        return f"{self.mean:+.1f} [{low:.1f}, {high:.1f}]"

    def raw(self) -> dict[str, Any]:
        """Return all numbers for JSON."""
        return {
            "mean": self.mean,
            "margin": self.margin if math.isfinite(self.margin) else None,
            "p_value": self.p_value,
            "seeds_to_decide": self.seeds_to_decide,
        }


def _margin(deviation: float, number: int) -> float:
    if number < 2:
        return math.inf
    return _quantile(number - 1) * deviation / math.sqrt(number)


@functools.cache
def _quantile(freedom: int) -> float:
    return float(stats.t.ppf(0.975, freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, which may be compared with one level for all rows."""
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(order):
        largest = max(largest, min((len(p_values) - rank) * p_values[k], 1.0))
        adjusted[k] = largest
    return adjusted


def verdicts(gains: Mapping[str, Gain]) -> dict[str, str]:
    """Return a verdict about each method: better, worse, or open.

    The chance that any of these verdicts is wrong is at most 5 % (Holm 1979).

    Args:
        gains: gains of the methods by name.
    """
    adjusted = holm([gain.p_value for gain in gains.values()])
    return {
        name: _verdict(gain, p) for (name, gain), p in zip(gains.items(), adjusted, strict=True)
    }


def _verdict(gain: Gain, p_value: float) -> str:
    if p_value < LEVEL:
        return "better" if gain.mean > 0 else "worse"
    if len(gain.values) < 2:
        return "open: one seed"
    seeds = gain.seeds_to_decide
    if seeds is None:
        return f"open: more than {MOST_SEEDS} seeds would decide"
    if seeds <= len(gain.values):
        return "open among so many methods"
    return f"open: {seeds} seeds would decide"

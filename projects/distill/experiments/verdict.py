"""Verdicts about differences that were measured in pairs of runs with the same seed."""

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
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

    def half_width(self, error: float = LEVEL / 2) -> float:
        """Return half the width of the interval of the mean, by Student's t; infinite for one.

        Args:
            error: chance that the true mean is above the interval, and also that it is below.
        """
        return half_width(self.deviation, len(self.values), error)

    def bounds(self, error: float = LEVEL / 2) -> tuple[float, float]:
        """Return the lower and the upper end of the interval, see :meth:`half_width`."""
        half = self.half_width(error)
        return self.mean - half, self.mean + half

    @property
    def p_value(self) -> float:
        """Probability of such a mean or a larger one if the true one is 0; 1 for a single value."""
        if len(self.values) < 2 or self.mean == 0:
            return 1.0
        if self.deviation == 0:
            return 0.0
        t = self.mean / self.deviation * math.sqrt(len(self.values))
        return float(2 * stats.t.sf(abs(t), len(self.values) - 1))

    @property
    def seeds_to_decide(self) -> int | None:
        """Seeds whose interval would exclude 0 if mean and deviation stay; None: more than 100."""
        if len(self.values) < 2:
            return None
        return fewest_seeds(lambda n: half_width(self.deviation, n, LEVEL / 2) < abs(self.mean))

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else math.inf

    def __str__(self) -> str:
        low, high = self.bounds()
        if not math.isfinite(low):
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} [{low:.1f}, {high:.1f}]"

    def raw(self) -> dict[str, Any]:
        """Return all numbers for JSON."""
        half = self.half_width()
        return {
            "mean": self.mean,
            "margin": half if math.isfinite(half) else None,
            "p_value": self.p_value,
            "seeds_to_decide": self.seeds_to_decide,
        }


def half_width(deviation: Any, number: int, error: float) -> Any:
    """Return half the width of Student's interval of a mean, see :meth:`Gain.half_width`.

    Args:
        deviation: sample standard deviation of the values, or an array of such deviations.
        number: number of the values.
    """
    if number < 2:
        return math.inf
    return quantile(number - 1, error) * deviation / math.sqrt(number)


@functools.cache
def quantile(freedom: int, error: float) -> float:
    """Return the value above which Student's t is with the probability ``error``."""
    return float(stats.t.isf(error, freedom))


def fewest_seeds(decide: Callable[[int], bool]) -> int | None:
    """Return the fewest seeds, from 2 on, that decide; None: more than :data:`MOST_SEEDS`."""
    return next(filter(decide, range(2, MOST_SEEDS + 1)), None)


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

"""Rule that decides, from paired runs, if a distillation pays. It is fixed before the first run.

The distilled student is compared with several others, each in pairs of the same seed. At a look,
after so many seeds, each comparison has the two ends of Student's interval of its mean gain:

- GO: the lower end of every comparison is above the margin.
- NO-GO: the upper end of any comparison is below the margin.
- otherwise the next look decides, and after the last one the verdict is INCONCLUSIVE.

A false GO, while at least one true gain is not above the margin, has a chance of at most
:data:`ERROR`. All comparisons must pass, so they need no correction (Berger 1982,
intersection-union test). The looks share the error equally (Bonferroni). NO-GO needs only one
comparison of two, so a false NO-GO has at most twice this chance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .verdict import Gain, fewest_seeds, half_width

ERROR = 0.025  # chance of a false GO
GO, INCONCLUSIVE, NO_GO = "GO", "INCONCLUSIVE", "NO-GO"
Floats = NDArray[np.float64]
Signs = NDArray[np.int64]  # 1: GO, -1: NO-GO, 0: neither
VERDICTS = {1: GO, 0: INCONCLUSIVE, -1: NO_GO}


class Decision(NamedTuple):
    """Answer of a rule.

    Attributes:
        verdict: GO, NO-GO or INCONCLUSIVE.
        seeds: number of seeds of the look that gave it.
        bounds: lower and upper end of the interval by comparison, at this look.
        fresh_seeds: see :meth:`Rule.fresh_seeds`; None for a verdict other than INCONCLUSIVE.
    """

    verdict: str
    seeds: int
    bounds: dict[str, tuple[float, float]]
    fresh_seeds: int | None


@dataclass(frozen=True)
class Rule:
    """Rule of the verdict.

    Args:
        margin: gain, in the points of the metric, that the true gain must exceed.
        looks: rising numbers of seeds, at least 2 each. The last is the number of all seeds.
    """

    margin: float
    looks: tuple[int, ...]

    @property
    def error(self) -> float:
        """The one-sided error of one look."""
        return ERROR / len(self.looks)

    def at_look(self, gains: Floats) -> Signs:
        """Return the outcome of one look.

        Args:
            gains: (..., C, N) gains of N seeds in C comparisons, for any number of tables.
        """
        mean = gains.mean(-1)
        half = half_width(gains.std(-1, ddof=1), gains.shape[-1], self.error)
        return self._signs(mean - half, mean + half)

    def _signs(self, low: Floats, high: Floats) -> Signs:
        go = (low > self.margin).all(-1)
        return np.asarray(go.astype(np.int64) - (high < self.margin).any(-1))

    def outcomes(self, gains: Floats) -> tuple[Signs, Signs]:
        """Return the outcomes of whole proofs, and the numbers of seeds at which they end.

        Args:
            gains: (..., C, N), see :meth:`at_look`; looks at more than N seeds are still to come.
        """
        found = np.zeros(gains.shape[:-2], np.int64)
        seeds = found.copy()
        for look in self.looks:
            if look <= gains.shape[-1]:
                undecided = found == 0
                seeds = np.where(undecided, look, seeds)
                found = np.where(undecided, self.at_look(gains[..., :look]), found)
        return found, seeds

    def decide(self, gains: Mapping[str, Sequence[float]]) -> Decision | None:
        """Return the verdict of one table, or None if further seeds are needed.

        Args:
            gains: gains by the name of the comparison, in the order of the seeds.
        """
        values = np.array(list(gains.values()), np.float64)
        outcome, seeds = (int(x) for x in self.outcomes(values))
        if not outcome and seeds < self.looks[-1]:
            return None
        used = {name: Gain(tuple(x[:seeds])) for name, x in gains.items()}
        bounds = {name: gain.bounds(self.error) for name, gain in used.items()}
        fresh = None if outcome else self.fresh_seeds(list(used.values()))
        return Decision(VERDICTS[outcome], seeds, bounds, fresh)

    def fresh_seeds(self, gains: Sequence[Gain]) -> int | None:
        """Return the number of new seeds with which another proof, of one look, would decide.

        It is the fewest if means and deviations stay as they are; None: more than 100.
        """
        means = np.array([x.mean for x in gains])
        deviations = np.array([x.deviation for x in gains])

        def decides(number: int) -> bool:
            half = half_width(deviations, number, ERROR)
            return bool(self._signs(means - half, means + half))

        return fewest_seeds(decides)

    def sentence(self, metric: str) -> str:
        """Describe the rule to a reader."""
        share = f", {self.error:.2%} at each look" if len(self.looks) > 1 else ""
        looks = " and ".join(map(str, self.looks))
        return (
            f"GO: the lower end of both intervals of the gain in {metric} is above "
            f"{self.margin:g}. NO-GO: the upper end of one of them is below {self.margin:g}. "
            f"Otherwise the verdict is INCONCLUSIVE. The intervals are Student's, of paired seeds, "
            f"after {looks} seeds. A false GO has a chance of at most {ERROR:.1%} in all{share}."
        )

    def raw(self) -> dict[str, Any]:
        """Return the rule for JSON."""
        return {"margin": self.margin, "looks": list(self.looks), "error": ERROR}

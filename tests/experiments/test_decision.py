"""The rule of a proof: bounds and verdicts by hand, its errors and its power over many tables."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from distill.experiments.decision import ERROR, GO, INCONCLUSIVE, NO_GO, Rule
from distill.experiments.verdict import Gain

TABLES = 10_000
SIMULATION_ERROR = 3 * (ERROR * (1 - ERROR) / TABLES) ** 0.5
FIVE, LOOKS = Rule(0.0, (5,)), Rule(0.0, (3, 5))
# Median deviation of the paired gains in docs/results/compare_faster_rcnn.json.
SPREAD = 1.35


def tables(
    *effects: float, number: int = TABLES, seeds: int = 5, spread: float = SPREAD
) -> NDArray[np.float64]:
    """Return gains (number, comparisons, seeds) with the given means and deviation.

    The comparisons share the distilled student, so their gains are correlated.
    """
    rng = np.random.default_rng(0)
    runs = rng.normal(scale=spread / 2**0.5, size=(number, len(effects) + 1, seeds))
    return runs[:, :1] - runs[:, 1:] + np.array(effects)[:, None]


def share(rule: Rule, gains: NDArray[np.float64], outcome: int) -> float:
    return float((rule.outcomes(gains)[0] == outcome).mean())


# ---- By hand.


def test_the_ends_of_the_interval_are_those_of_the_tables_of_student() -> None:
    decision = FIVE.decide({"alone": [1.0, 2.0, 3.0, 4.0, 5.0]})
    assert decision is not None
    half = 2.776445 * 2.5**0.5 / 5**0.5  # t of 4 degrees of freedom, 97.5 %
    assert decision.bounds == {"alone": pytest.approx((3 - half, 3 + half))}
    decision = LOOKS.decide({"alone": [1.0, 2.0, 3.0, 4.0, 5.0]})
    assert decision is not None
    half = 3.495406 * 2.5**0.5 / 5**0.5  # 98.75 %
    assert decision.bounds == {"alone": pytest.approx((3 - half, 3 + half))}


@pytest.mark.parametrize(
    ("alone", "equal_time", "margin", "verdict"),
    [
        ([3.0, 3.2, 2.8, 3.1, 2.9], [2.0, 2.2, 1.8, 2.1, 1.9], 0.0, GO),
        ([3.0, 3.2, 2.8, 3.1, 2.9], [2.0, 2.2, 1.8, 2.1, 1.9], 1.9, INCONCLUSIVE),
        ([3.0, 3.2, 2.8, 3.1, 2.9], [2.0, 2.2, 1.8, 2.1, 1.9], 2.5, NO_GO),
        ([3.0, 3.2, 2.8, 3.1, 2.9], [0.3, -0.3, 0.2, 0.0, 0.1], 0.0, INCONCLUSIVE),
        ([3.0, 3.2, 2.8, 3.1, 2.9], [-1.1, -1.3, -0.9, -1.0, -1.2], 0.0, NO_GO),
        ([0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], 0.0, INCONCLUSIVE),
    ],
)
def test_verdicts(alone: list[float], equal_time: list[float], margin: float, verdict: str) -> None:
    decision = Rule(margin, (5,)).decide({"alone": alone, "equal time": equal_time})
    assert decision is not None and (decision.verdict, decision.seeds) == (verdict, 5)
    assert (decision.fresh_seeds is None) == (verdict != INCONCLUSIVE or max(alone) == 0)


def test_a_look_ends_the_proof_and_later_seeds_do_not_change_it() -> None:
    clear = [10.0, 10.1, 9.9]
    for more in ([], [-50.0], [-50.0, -50.0]):
        decision = LOOKS.decide({"alone": [*clear, *more], "equal time": [*clear, *more]})
        assert decision is not None and (decision.verdict, decision.seeds) == (GO, 3)
    assert LOOKS.decide({"alone": [1.0, 2.0, -1.0], "equal time": clear}) is None
    assert LOOKS.decide({"alone": [1.0, 2.0, -1.0, 1.0], "equal time": [*clear, 1.0]}) is None


def test_the_number_of_fresh_seeds_decides_and_one_less_does_not() -> None:
    gains = [Gain((1.0, 2.0, 3.0, -0.5)), Gain((4.0, 5.0, 6.0, 2.5))]
    assert Rule(0.0, (4,)).fresh_seeds(gains) == 8  # as Gain.seeds_to_decide of the first
    assert gains[0].seeds_to_decide == 8
    assert LOOKS.fresh_seeds(gains) == 8  # another proof has its own error
    assert Rule(3.4, (4,)).fresh_seeds(gains) == 5  # the upper end decides
    assert FIVE.fresh_seeds([Gain((3.0, -3.0, 3.1, -3.0))]) is None


# ---- Over many tables.


@pytest.mark.parametrize("rule", [FIVE, LOOKS], ids=["5 seeds", "looks at 3 and 5"])
def test_a_false_go_is_as_rare_as_promised(rule: Rule) -> None:
    assert share(rule, tables(0.0, 0.0), 1) <= ERROR + SIMULATION_ERROR
    # The worst case: one gain is beyond doubt, and the other is just at the margin.
    worst = share(rule, tables(100.0, 0.0), 1)
    assert 0.6 * ERROR < worst <= ERROR + SIMULATION_ERROR
    margin = Rule(2.0, rule.looks)
    assert 0.6 * ERROR < share(margin, tables(100.0, 2.0), 1) <= ERROR + SIMULATION_ERROR


def test_without_shares_of_the_error_two_looks_would_promise_too_much() -> None:
    gains = tables(100.0, 0.0)
    first, last = Rule(0.0, (3,)), Rule(0.0, (5,))
    either = (first.at_look(gains[..., :3]) == 1) | (last.at_look(gains) == 1)
    assert either.mean() > ERROR + SIMULATION_ERROR


def test_a_false_no_go_has_at_most_twice_the_chance() -> None:
    for rule in (FIVE, LOOKS):
        wrong = share(rule, tables(0.0, 0.0), -1)
        assert ERROR < wrong <= 2 * (ERROR + SIMULATION_ERROR)


def test_power_at_the_observed_spread() -> None:
    """The chance of GO for equal gains of 1, 2 and 4 AP in both comparisons."""
    powers = {
        rule: [share(rule, tables(effect, effect), 1) for effect in (1.0, 2.0, 4.0)]
        for rule in (FIVE, LOOKS)
    }
    assert powers[FIVE] == pytest.approx([0.10, 0.54, 0.99], abs=0.02)
    assert powers[LOOKS] == pytest.approx([0.05, 0.33, 0.96], abs=0.02)
    early = {x: (LOOKS.outcomes(tables(x, x))[1] == 3).mean() for x in (4.0, 8.0)}
    assert early == {4.0: pytest.approx(0.27, abs=0.02), 8.0: pytest.approx(0.87, abs=0.02)}


@pytest.mark.parametrize("effect", [1.0, 2.0, 4.0])
def test_the_power_of_one_comparison_is_that_of_the_noncentral_t(effect: float) -> None:
    exact = stats.nct.sf(2.776445, 4, effect * 5**0.5 / SPREAD)
    assert share(FIVE, tables(effect), 1) == pytest.approx(exact, abs=0.015)

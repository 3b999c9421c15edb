"""Verdicts: intervals and corrections by hand, and how often they are wrong."""

import numpy as np
import pytest

from distill.experiments.compare_report import MethodTable, Row
from distill.experiments.verdict import Gain, holm, verdicts


def test_the_interval_by_hand() -> None:
    gain = Gain((1.0, 2.0, 3.0))
    assert gain.mean == 2
    assert gain.half_width() == pytest.approx(4.3026527 / 3**0.5)  # t of 2 degrees, 97.5 %
    assert gain.p_value == pytest.approx(0.0741799)  # t = 3.4641
    assert str(gain) == "+2.0 [-0.5, 4.5]"
    assert gain.seeds_to_decide == 4  # 3.1824463 / 2 < 2, but 4.3 / √3 > 2


def test_one_value_decides_nothing() -> None:
    gain = Gain((2.0,))
    assert (gain.p_value, gain.seeds_to_decide, str(gain)) == (1.0, None, "+2.0")
    assert gain.raw()["margin"] is None
    assert verdicts({"IMA": gain}) == {"IMA": "open: one seed"}


def test_values_without_a_spread() -> None:
    assert Gain((0.0, 0.0, 0.0)).p_value == 1 and Gain((2.0, 2.0)).p_value == 0
    assert Gain((0.0, 0.0)).seeds_to_decide is None


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_every_verdict() -> None:
    found = verdicts(
        {
            "better": Gain((3.0, 3.1, 2.9, 3.0)),
            "worse": Gain((-3.0, -3.1, -2.9, -3.0)),
            "few": Gain((1.0, 2.0, 3.0, -0.5)),
            "many": Gain((3.0, -3.0, 3.1, -3.0)),
            "crowded": Gain((1.0, 2.0, 3.0, 1.0)),
        }
    )
    assert found["better"] == "better" and found["worse"] == "worse"
    assert found["few"] == "open: 8 seeds would decide"
    assert found["many"] == "open: more than 100 seeds would decide"
    assert found["crowded"] == "open among so many methods"


def test_at_most_one_of_twenty_tables_has_a_wrong_verdict() -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(100):
        gains = {str(k): Gain(tuple(rng.normal(size=3).tolist())) for k in range(10)}
        wrong += any(not x.startswith("open") for x in verdicts(gains).values())
    assert wrong <= 12  # 5 are expected, with a deviation of 2.2


def test_fresh_seeds_decide_about_what_the_first_ones_flag() -> None:
    """The values that flagged a method do not count again."""
    table = MethodTable("AP", screening=[0, 1, 2], fresh=[3, 4, 5])
    table.baseline.results = {seed: {"AP": 10.0} for seed in range(6)}
    good, bad, lucky = (Row(name) for name in ("good", "bad", "lucky"))
    table.methods = [bad, lucky, good]
    good.results = {seed: {"AP": 12.0 + seed} for seed in range(3)}
    bad.results = {seed: {"AP": 8.0 + seed * 0.01} for seed in range(6)}
    lucky.results = {seed: {"AP": 11.0 + seed * 0.01 - 3 * (seed < 3)} for seed in range(6)}
    assert table.flagged() == [bad, lucky]
    assert [row.name for row in table.rows] == ["baseline", "good", "lucky", "bad"]
    gains = {row.name: table.gain(row) for row in table.methods}
    assert [len(x.values) for x in gains.values() if x] == [3, 3, 3]
    assert gains["lucky"] and gains["lucky"].mean == pytest.approx(1.04)
    assert table.verdicts() == {
        "good": "better",
        "bad": "worse",
        "lucky": "better",
    }
    columns = table.columns()
    assert columns["verdict"] == ["", "better", "better", "worse"]
    assert columns["- baseline [95 %]"][3] == "-2.0 [-2.0, -1.9]"
    raw = table.raw()
    assert raw["lucky"]["flagged"] and raw["lucky"]["verdict"] == "better"
    assert raw["baseline"]["verdict"] is raw["baseline"]["gain"] is None

"""Test the number of fuzzed cases, after the fuzz tests."""

from collections.abc import Callable

import pytest

from .fuzzing import CASES


def test_there_were_enough_cases(record_property: Callable[[str, object], None]) -> None:
    record_property("fuzzed", dict(CASES))
    if not {"annotations", "config", "weights"} <= CASES.keys():
        pytest.skip("not all of the fuzz tests were run")
    assert CASES.total() >= 2000

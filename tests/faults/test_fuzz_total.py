"""Test the number of fuzzed cases, after the fuzz tests."""

import pytest

from .fuzzing import CASES


def test_there_were_enough_cases() -> None:
    if not {"annotations", "config", "weights"} <= CASES.keys():
        pytest.skip("not all of the fuzz tests were run")
    assert CASES.total() >= 2000

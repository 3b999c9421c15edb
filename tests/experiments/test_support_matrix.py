"""The table of what works with what is that of this code."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from support_matrix import NETWORKS, main  # noqa: E402

from distill.heads import DISTILL_HEAD_REGISTRY  # noqa: E402

MATRIX = ROOT / "docs" / "support-matrix.md"


def test_the_matrix_is_not_stale() -> None:
    assert main(["--check"]) == 0, "run `python tools/support_matrix.py`"


def test_it_has_every_pair_and_no_failure() -> None:
    text = MATRIX.read_text()
    assert "FAILS" not in text
    assert all(f"## Student: {name}" in text for name in NETWORKS)
    assert text.count("✓") > 500


def test_every_head_is_in_the_table_of_methods() -> None:
    methods = (ROOT / "docs" / "methods.md").read_text()
    rows = {line.split("`")[1] for line in methods.splitlines() if line.startswith("| `")}
    assert rows == {name for name, _ in DISTILL_HEAD_REGISTRY}

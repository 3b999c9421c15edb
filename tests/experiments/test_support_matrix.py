"""The table of what works with what is that of this code."""

from pathlib import Path

from distill import cli
from distill.experiments.support_matrix import NETWORKS
from distill.heads import DISTILL_HEAD_REGISTRY

ROOT = Path(__file__).parents[2]
MATRIX = ROOT / "docs" / "support-matrix.md"


def test_the_matrix_is_not_stale() -> None:
    arguments = ["--check", "--out", str(MATRIX)]
    assert cli.main(["support-matrix", *arguments]) == 0, "run `distill support-matrix`"


def test_it_has_every_pair_and_no_failure() -> None:
    text = MATRIX.read_text()
    assert "FAILS" not in text
    assert all(f"## Student: {name}" in text for name in NETWORKS)
    assert text.count("✓") > 500


def test_every_head_is_in_the_table_of_methods() -> None:
    methods = (ROOT / "docs" / "methods.md").read_text()
    rows = {line.split("`")[1] for line in methods.splitlines() if line.startswith("| `")}
    assert rows == {name for name, _ in DISTILL_HEAD_REGISTRY}

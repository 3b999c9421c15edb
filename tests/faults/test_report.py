"""Test that the table in docs/explanation/reliability.md equals the raw file."""

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_table() -> None:
    report = json.loads((DOCS / "results" / "reliability.json").read_text())
    rows = [list(row.values()) for row in [*report["faults"], report["total"]]]
    table = "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
    assert table in (DOCS / "explanation" / "reliability.md").read_text(), (
        f"replace the table by\n{table}"
    )
    for _, injected, recovered, lost, hung in rows:
        assert (injected, lost, hung) == (recovered, 0, 0)

"""Every supported version of Python has its pins, and `make` takes the newest one that is there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from make_wheelhouse import normalized, read_pins  # noqa: E402

VERSIONS = ("3.10", "3.11", "3.12", "3.13")
MAKE = shutil.which("make")
FAKE = """#!/bin/sh
[ "$1" = -c ] && echo {version} && exit {status}
/bin/mkdir -p .venv/bin && echo {version} >.venv/bin/python
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_every_requirement_has_one_pin(version: str) -> None:
    pins = read_pins(ROOT / "constraints.txt", version, [])
    wanted = [Requirement(x) for x in re.findall(r'"([\w-]+[<>=][^"]*)"', _requirements())]
    assert len(wanted) > 20
    for requirement in wanted:
        pin = Requirement(pins[normalized(requirement.name)])
        (exact,) = pin.specifier
        assert exact.operator == "==" and exact.version in requirement.specifier


def _requirements() -> str:
    """Return what `make` installs: not the trackers."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    lists = r"(?:REQUIREMENTS|EXPORT) = \[.*?\]|extras_require=\{.*\}"
    return "".join(re.findall(lists, text, re.DOTALL))


def test_pins_of_one_version_only(tmp_path: Path) -> None:
    pins = tmp_path / "constraints.txt"
    newer, older = 'a_b==2; python_version >= "3.11"', 'A-b==1; python_version < "3.11"'
    pins.write_text(f"# pins\n{newer}\n{older}\nc==3  # any\ntorch==4\ntyping==5\n")
    assert read_pins(pins, "3.10", ["torch"]) == {"a-b": "A-b==1", "c": "c==3"}
    assert read_pins(pins, "3.13", ["torch"]) == {"a-b": "a_b==2", "c": "c==3"}


@pytest.mark.skipif(MAKE is None, reason="there is no make")
@pytest.mark.parametrize(
    "there, asked, taken",
    [
        (["3.10", "3.12", "3.11"], [], "3.12"),
        (["3.9", "3.10"], [], "3.10"),
        (["3.13", "3.11"], ["PYTHON=3.11"], "3.11"),
        (["3.13"], ["PYTHON=3.12"], None),
        (["3.9", "3.14"], [], None),
    ],
)
def test_make_takes_the_newest(
    there: list[str], asked: list[str], taken: str | None, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    binaries = tmp_path / "bin"
    for name, version, status in [*((f"python{v}", v, 0) for v in there), ("python3.13", "", 1)]:
        path = binaries / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():  # else there is a command without the version, as pyenv has them
            path.write_text(FAKE.format(version=version, status=status))
            path.chmod(0o755)
    done = subprocess.run(
        [str(MAKE), ".venv/bin/python", *asked],
        cwd=tmp_path,
        env={"PATH": str(binaries)},
        capture_output=True,
        text=True,
    )
    python = tmp_path / ".venv" / "bin" / "python"
    if taken:
        assert done.returncode == 0, done.stderr
        assert python.read_text().strip() == taken
    else:
        assert done.returncode != 0 and "None of these versions of Python was found" in done.stderr
        assert not python.exists()

#!/usr/bin/env python3
"""Collect every wheel that a Linux x86-64 machine without network needs to run this project.

The pins of constraints.txt, detectron2 and this project itself go to ``wheelhouse/<version>/``.
On the other machine, in an environment of that Python version::

    pip install --no-index --no-deps wheelhouse/3.12/*.whl

``--exclude`` takes prefixes of the names of packages that the machine has already. Usage::

    python tools/make_wheelhouse.py --python 3.12 --exclude torch nvidia cuda triton
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT_FILES = ("setup.py", "pyproject.toml", "LICENSE", "configs", "projects")

# On PyPI only as sources; they are pure Python, so a wheel built here serves everywhere.
SDIST_ONLY = ("antlr4-python3-runtime", "fvcore", "iopath")

# A back-port for Python < 3.5 that cityscapesscripts still asks for. On a path before the
# standard library, as after `pip install --target`, it would hide the real module. Without it
# pip's resolver would refuse cityscapesscripts, hence --no-deps above.
NEVER = ("typing",)

# pip takes each tag literally: with manylinux_2_28 alone, wheels for older systems are not found.
PLATFORMS = tuple(
    f"{tag}_x86_64"
    for tag in (*(f"manylinux_2_{k}" for k in range(28, 16, -1)), "manylinux2014", "manylinux1")
)


class WheelhouseError(Exception):
    """A failure whose message is one sentence that says what to change."""


def normalized(name: str) -> str:
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(constraints: Path, python: str, excluded: list[str]) -> dict[str, str]:
    """Return ``name==version`` by package name for a version of Python.

    Packages that are excluded, or that must never be there, are left out.
    """
    prefixes = tuple(normalized(prefix) for prefix in excluded)
    pins = {}
    for line in constraints.read_text(encoding="utf-8").splitlines():
        if not (text := line.partition("#")[0].strip()):
            continue
        pin = Requirement(text)
        name = normalized(pin.name)
        valid = pin.marker is None or pin.marker.evaluate({"python_version": python})
        if valid and name not in NEVER and not name.startswith(prefixes):
            pins[name] = f"{pin.name}{pin.specifier}"
    return pins


def run_pip(*arguments: str) -> None:
    """Runs pip; on failure names the package, which pip gives in its last error."""
    command = [sys.executable, "-m", "pip", *arguments]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode == 0:
        return
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else result.stderr.strip()
    missing = re.search(r"No matching distribution found for (\S+)", reason)
    if "Failed to establish a new connection" in result.stderr:
        raise WheelhouseError("PyPI cannot be reached: check the network and pip's index.")
    if missing:
        raise WheelhouseError(
            f"{missing[1]} has no wheel for this Python version on {PLATFORMS[0]} or older: "
            "change its pin in constraints.txt, or exclude it if the machine has it."
        )
    raise WheelhouseError(f"pip {arguments[0]} failed: {reason}")


def download_wheels(pins: dict[str, str], python: str, target: Path) -> None:
    """Downloads the wheels for another Python version; builds those that PyPI lacks."""
    wheels = [pin for name, pin in pins.items() if name not in SDIST_ONLY]
    sdists = [pin for name, pin in pins.items() if name in SDIST_ONLY]
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    if wheels:
        options = ["--no-deps", "--only-binary=:all:", f"--python-version={python}", *platforms]
        run_pip("download", "--quiet", *options, "--dest", str(target), *wheels)
    if sdists:
        build_wheels(sdists, target)


def build_wheels(sources: list[str], target: Path) -> None:
    """Builds wheels with the pinned setuptools of this environment."""
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target))
    run_pip("wheel", *options, *sources)


def build_project(target: Path) -> None:
    """Builds this project's wheel from a copy, so that no stale build/ gets into it."""
    with tempfile.TemporaryDirectory() as temporary:
        for name in PROJECT_FILES:
            source, copy = ROOT / name, Path(temporary, name)
            if source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.egg-info"))
            else:
                shutil.copy(source, copy)
        build_wheels([temporary], target)


def build_detectron2(target: Path) -> None:
    """Builds detectron2's wheel; the tool that does so reports its own failures."""
    command = [sys.executable, str(ROOT / "tools" / "install_detectron2.py"), "--wheel"]
    if subprocess.run([*command, str(target)], stdout=subprocess.DEVNULL, check=False).returncode:
        raise WheelhouseError("detectron2 has no wheel for the reason above.")


def make_wheelhouse(python: str, excluded: list[str]) -> str:
    """Fills the wheelhouse afresh, or leaves it as it was; returns a sentence about it."""
    pins = read_pins(ROOT / "constraints.txt", python, excluded)
    target = ROOT / "wheelhouse" / python
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        fresh = Path(temporary, python)
        fresh.mkdir()
        download_wheels(pins, python, fresh)
        build_detectron2(fresh)
        build_project(fresh)
        shutil.rmtree(target)  # wheels of former pins would compete
        fresh.rename(target)
    wheels = list(target.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    return f"{target.relative_to(ROOT)}: {len(wheels)} wheels, {size:.0f} MB."


def version(text: str) -> str:
    """Argument type for a Python version such as 3.12."""
    if not re.fullmatch(r"3\.\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a version such as 3.12")
    return text


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description="Collect all wheels for a machine without network")
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    parser.add_argument("--python", type=version, default=own, help="version on the other machine")
    parser.add_argument(
        "--exclude", nargs="*", default=[], metavar="PREFIX", help="prefixes of names"
    )
    args = parser.parse_args(argv)
    try:
        print(make_wheelhouse(args.python, args.exclude))
    except WheelhouseError as error:
        print(f"make_wheelhouse: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Make `import detectron2` work in the environment of the interpreter that runs this script.

An importable detectron2, for example upstream's own build, is kept and used. Otherwise this script
takes the pure-Python copy inside the wheel ``ezannot==1.1.0`` on PyPI. It is Meta's Apache-2.0
code, upstream 0.6, with its import prefix renamed. The prefix is restored, and the result is built
and installed with pip as distribution ``detectron2`` 0.6. The wheel around it is GPL-3.0, and
nothing else of it is used. The compiled ops (``detectron2._C``) are not included.

Usage::

    python tools/install_detectron2.py                      # install, unless there is one
    python tools/install_detectron2.py --from-wheel FILE    # the same, from a downloaded wheel
    python tools/install_detectron2.py --wheel DIR          # build the wheel into DIR instead
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "ezannot==1.1.0"
SHA256 = "eb3db02d9a2fba6fa2934b25738a106087faccceb3629124d4d4b8e65759c0d7"
FOLDER_IN_WHEEL = "EZannot/detectron2/"
RENAMED_PREFIX = "EZannot.detectron2"
EXPECTED_FILES = {".py": 214, ".yaml": 92}
LICENSE = Path(__file__).resolve().parent.parent / "LICENSE"

# panoptic_deeplab is absent: it needs panopticapi, which is not on PyPI.
CHECKED_MODULES = (
    "detectron2",
    "detectron2.modeling",
    "detectron2.model_zoo",
    "detectron2.projects.point_rend",
    "detectron2.projects.deeplab",
)

NOTICE = f"""\
detectron2, Copyright (c) Facebook, Inc. and its affiliates, licensed under the Apache License 2.0.
https://github.com/facebookresearch/detectron2

These files are the copy of detectron2 0.6 in the wheel {REQUIREMENT} on PyPI (sha256 {SHA256}).
One change was made to them: the prefix "{RENAMED_PREFIX}" is "detectron2" again, as upstream.
Compiled extensions are not included.
"""

# Upstream's requirements, without its bound iopath<0.1.10, and with the setuptools that still
# have the pkg_resources which detectron2.model_zoo imports.
SETUP_PY = """\
from setuptools import find_packages, setup

setup(
    name="detectron2",
    version="0.6",
    author="FAIR",
    url="https://github.com/facebookresearch/detectron2",
    description="Object detection and segmentation (pure-Python build without compiled ops)",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    packages=find_packages(include=["detectron2", "detectron2.*"]),
    package_data={"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"]},
    python_requires=">=3.7",
    install_requires=[
        "Pillow>=7.1", "matplotlib", "pycocotools>=2.0.2", "termcolor>=1.1", "yacs>=0.1.8",
        "tabulate", "cloudpickle", "tqdm>4.29.0", "tensorboard", "fvcore>=0.1.5,<0.1.6",
        "iopath>=0.1.7", "omegaconf>=2.1,<2.4", "hydra-core>=1.1", "black", "packaging",
        "setuptools<82",
    ],
)
"""


class InstallError(Exception):
    """A failure whose message is one sentence that says what to change."""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter in a neutral folder, where no stray `detectron2/` can be imported."""
    with tempfile.TemporaryDirectory() as cwd:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def reason(result: subprocess.CompletedProcess[str]) -> str:
    """Why a child process failed: the last error in its output that is a sentence.

    pip ends with hints and with words such as `error: metadata-generation-failed`.
    """
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*error: \S+ ", line, re.IGNORECASE)]
    return re.sub(r"^(error|ERROR): ", "", (errors or lines or ["no output"])[-1])


def is_installed() -> bool:
    """Return True if a detectron2 can be found, even a broken one."""
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('detectron2') is None)"
    return run_python("-c", code).returncode == 0


def check_import(advice: str) -> str:
    """Imports detectron2 in a fresh process; returns its version and folder."""
    code = f"import {', '.join(CHECKED_MODULES)}; d = detectron2; "
    result = run_python("-W", "ignore", "-c", code + "print(d.__version__, 'in', d.__path__[0])")
    if result.returncode != 0:
        raise InstallError(f"detectron2 cannot be imported ({reason(result)}); {advice}.")
    return result.stdout.strip().splitlines()[-1]


def check_target(allow_system: bool) -> None:
    """Refuses to install where it would surprise, or where it cannot."""
    if sys.prefix == sys.base_prefix and not allow_system:
        raise InstallError(
            f"{sys.executable} is not in a virtual environment: run this script with the python "
            "of one, for example .venv/bin/python, or pass --allow-system."
        )
    target = sysconfig.get_path("purelib")
    if not os.access(target, os.W_OK):
        raise InstallError(f"{target} is not writable: use an environment that you own.")


def download(folder: Path) -> Path:
    """Downloads the wheel that contains detectron2 into `folder`."""
    options = ("--no-deps", "--only-binary", ":all:", "--dest", str(folder))
    result = run_python("-m", "pip", "download", *options, REQUIREMENT)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise InstallError(
            f"pip could not download {REQUIREMENT} ({reason(result)}): check the network "
            "and pip's index, or download that wheel elsewhere and pass --from-wheel FILE."
        )
    return wheels[0]


def check_hash(wheel: Path) -> None:
    """Accepts only the very wheel whose contents were reviewed."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise InstallError(
            f"{wheel.name} has sha256 {digest} instead of {SHA256}: "
            f"get the wheel of {REQUIREMENT} from https://pypi.org/project/ezannot/1.1.0/#files."
        )


def unpack(wheel: Path, folder: Path) -> Path:
    """Unpacks detectron2, and nothing else of the wheel, to `folder`/detectron2."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith(FOLDER_IN_WHEEL)]
            archive.extractall(folder, names)
    except zipfile.BadZipFile as error:
        raise InstallError(f"{wheel.name} is not a wheel ({error}): download it again.") from error
    if not names:
        raise InstallError(f"{wheel.name} has no folder {FOLDER_IN_WHEEL}: use {REQUIREMENT}.")
    package = folder / "detectron2"
    shutil.move(folder / FOLDER_IN_WHEEL, package)
    return package


def restore_prefix(package: Path) -> None:
    """Renames `EZannot.detectron2` back to `detectron2` in every file, as upstream has it."""
    counts = dict.fromkeys(EXPECTED_FILES, 0)
    for path in sorted(p for p in package.rglob("*") if p.is_file()):
        text = path.read_text(encoding="utf-8").replace(RENAMED_PREFIX, "detectron2")
        if path.suffix not in counts or "ezannot" in text.lower():
            name = path.relative_to(package).as_posix()
            raise InstallError(f"detectron2/{name} is not as expected: use {REQUIREMENT}.")
        path.write_text(text, encoding="utf-8")
        counts[path.suffix] += 1
    if counts != EXPECTED_FILES:
        raise InstallError(
            f"The wheel's detectron2 has {counts} files instead of {EXPECTED_FILES}: "
            f"use {REQUIREMENT}."
        )


def build(source: Path, target: Path) -> Path:
    """Builds the wheel of `source` into `target`, with the setuptools that is installed."""
    (source / "setup.py").write_text(SETUP_PY, encoding="utf-8")
    (source / "NOTICE").write_text(NOTICE, encoding="utf-8")
    shutil.copy(LICENSE, source / "LICENSE")
    target.mkdir(parents=True, exist_ok=True)
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(target))
    result = run_python("-m", "pip", "wheel", *options, str(source))
    wheels = list(target.glob("detectron2-0.6-*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise InstallError(
            f"The wheel of detectron2 could not be built ({reason(result)}): "
            "run `python -m pip install -c constraints.txt setuptools` first."
        )
    return wheels[0]


def build_wheel(downloaded: Path | None, target: Path) -> Path:
    """From the wheel on PyPI, or from `downloaded`, to a wheel of detectron2 in `target`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = downloaded or download(folder)
        check_hash(wheel)
        source = folder / "source"
        source.mkdir()
        restore_prefix(unpack(wheel, source))
        return build(source, target)


def install(downloaded: Path | None, allow_system: bool) -> str:
    """Installs detectron2 unless there is one; returns a sentence about what is there now."""
    if is_installed():
        found = check_import(advice="install what it lacks, or uninstall it")
        return f"detectron2 {found} is kept."
    check_target(allow_system)
    with tempfile.TemporaryDirectory() as temporary:
        wheel = build_wheel(downloaded, Path(temporary))
        result = run_python("-m", "pip", "install", "--no-deps", "--no-index", str(wheel))
    if result.returncode != 0:
        raise InstallError(f"pip could not install detectron2: {reason(result)}.")
    found = check_import(advice="run `python -m pip install -c constraints.txt -e .`")
    return f"detectron2 {found} is installed."


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description="Install detectron2, unless there is one.")
    parser.add_argument("--from-wheel", metavar="FILE", type=Path, help=f"wheel of {REQUIREMENT}")
    parser.add_argument("--wheel", metavar="DIR", type=Path, help="build the wheel into DIR only")
    parser.add_argument("--allow-system", action="store_true", help="no virtual environment needed")
    args = parser.parse_args(argv)
    downloaded = args.from_wheel.resolve() if args.from_wheel else None
    try:
        if args.wheel:
            print(f"{build_wheel(downloaded, args.wheel.resolve())} is built.")
        else:
            print(install(downloaded, args.allow_system))
    except (InstallError, OSError) as error:  # an OSError names the file and what is wrong with it
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Command, commit and versions to store with a result."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path

import detectron2
import torch
import torchvision

from .. import __version__

PACKAGE = Path(__file__).resolve().parents[1]


def command() -> str:
    """Return the command line of this process."""
    return shlex.join(["distill", *sys.argv[1:]])


def commit() -> str | None:
    """Return the commit of this package, with "+" if files differ from it; None outside git."""
    git = ["git", "-C", str(PACKAGE)]
    try:
        # This fails if the package is installed inside another project's repository.
        subprocess.check_output(
            [*git, "ls-files", "--error-unmatch", __file__], stderr=subprocess.DEVNULL
        )
        head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
        dirty = subprocess.check_output([*git, "status", "--porcelain"], text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if dirty else "")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that determine a result."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
        "distill": __version__,
    }

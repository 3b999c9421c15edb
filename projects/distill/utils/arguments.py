"""Command-line arguments of several commands."""

import argparse
import os
import re
from collections.abc import Callable
from typing import NoReturn

from ..errors import ConfigError


class CommandParser(argparse.ArgumentParser):
    """``ArgumentParser`` that raises a ConfigError if the arguments are wrong."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`.")


def add_config_arguments(
    parser: argparse.ArgumentParser, required: bool = True, several: bool = False
) -> None:
    """Add detectron2's ``--config-file FILE`` and ``KEY VALUE ...``.

    Args:
        required: the file must be given.
        several: the option may be repeated; its value is a list.
    """
    parser.add_argument(
        "--config-file",
        required=required,
        action="append" if several else "store",
        default=[] if several else "",
        metavar="FILE",
        help="a yaml file, or the name of a config of this package",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="overrides of the config, after all options",
    )


def at_least(least: int) -> Callable[[str], int]:
    """Return the ``type`` of an option whose value is a whole number of at least ``least``."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {least}")
        return int(text)

    return parse


def png(text: str) -> str:
    """Return the path of a PNG file to write, whose folder must exist."""
    if not text.lower().endswith(".png") or not os.path.isdir(os.path.dirname(text) or "."):
        raise argparse.ArgumentTypeError(f"'{text}' is no .png file in an existing folder")
    return text


def size(text: str) -> tuple[int, int]:
    """Parse ``"256x128"``, or ``"128"`` for a square, as two numbers of pixels from 1."""
    match = re.fullmatch(r"([1-9]\d{0,8})(?:x([1-9]\d{0,8}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 128 or 256x128")
    return int(match[1]), int(match[2] or match[1])

"""List every fault in the data sets of a config, all at once.

    distill check-data --config-file F [--no-images] [--json] [--workers N] [KEY VALUE ...]

It looks at the annotations of all DATASETS.TRAIN and DATASETS.TEST, and decodes every image. Fatal
faults would stop a training or spoil it; remarks are what training copes with.

Exit code: 0 without fatal faults, 1 with some, 2 if the config itself is wrong.
"""

import argparse
import contextlib
import json
import os
import sys
from collections import defaultdict
from typing import Any

from detectron2.config import CfgNode
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.checks.images import inspect_pictures, missing_files
from ..data.checks.issues import Fault
from ..data.datasets import find_faults
from ..engine import setup_config
from ..utils.arguments import add_config_arguments, at_least
from ..utils.progress import Progress
from ..utils.text import printable

SHOWN = 3  # faults of each kind in the table

Faults = dict[str, list[Fault]]
"""Faults by data set."""


def check(cfg: CfgNode, images: bool, workers: int, progress: Progress) -> Faults:
    """Find the faults of every data set of the config.

    Args:
        cfg: names the data sets.
        images: decode the images; otherwise they only have to exist.
        workers: number of processes, or 0 to use only this one.
        progress: shows the data sets.
    """
    report = {}
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        with contextlib.redirect_stdout(sys.stderr):  # where libraries print what they load
            faults, pictures = find_faults(cfg, name)
        found = inspect_pictures(pictures, workers) if images else map(missing_files, pictures)
        for more in progress.track(found, total=len(pictures), description=name):
            faults += more
        report[name] = faults
    return report


def print_report(report: Faults) -> None:
    """Print a table of the kinds, and below it the first faults of each, to be copied."""
    table = Table(box=box.SIMPLE)
    for column in ("data set", "fault", "", "number"):
        table.add_column(column, justify="right" if column == "number" else "left")
    examples = []
    for name, faults in report.items():
        groups = defaultdict(list)
        for fault in faults:
            groups[not fault.fatal, fault.kind].append(fault)
        for (remark, kind), group in sorted(groups.items()):
            table.add_row(Text(name), kind, "remark" if remark else "fatal", str(len(group)))
            lines = [f"  {x.where}: {x.detail}" for x in group[:SHOWN]]
            more = [f"  and {len(group) - SHOWN} more"] if len(group) > SHOWN else []
            examples += [f"{name}: {kind}", *lines, *more]
    if examples:
        Console(width=None if sys.stdout.isatty() else 120).print(table)
        print(*map(printable, examples), sep="\n")


def as_json(report: Faults) -> list[dict[str, Any]]:
    return [{"data_set": k, **x._asdict()} for k, faults in report.items() for x in faults]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--images", action=argparse.BooleanOptionalAction, default=True, help="decode every image"
    )
    parser.add_argument("--json", action="store_true", help="print all faults as JSON")
    parser.add_argument(
        "--workers",
        type=at_least(0),
        default=os.cpu_count() or 1,
        help="processes that decode; 0: only this one",
    )


def run(args: argparse.Namespace) -> int:
    cfg = setup_config(args.config_file, args.opts)
    with Progress(args.json, transient=True) as progress:
        report = check(cfg, args.images, args.workers, progress)
    faults = [fault for group in report.values() for fault in group]
    fatal = sum(fault.fatal for fault in faults)
    if args.json:
        print(json.dumps(as_json(report), indent=1))
    else:
        print_report(report)
        print(f"{fatal} fatal faults, {len(faults) - fatal} remarks in {', '.join(report)}")
    return 1 if fatal else 0

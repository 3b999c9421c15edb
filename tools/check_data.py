"""Every fault in the data sets of a config, all at once.

    python tools/check_data.py --config-file F [--no-images] [--json] [--workers N] [KEY VALUE ...]

Looks at the annotations of all DATASETS.TRAIN and DATASETS.TEST, and decodes every picture. Fatal
faults would stop a training or spoil it; remarks are what training copes with.

Exit code: 0 without fatal faults, 1 with some, 2 if the config itself is wrong.
"""

import argparse
import contextlib
import json
import os
import sys
from collections import defaultdict
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from distill.data.checks.images import inspect_pictures, missing_files
from distill.data.checks.issues import Fault
from distill.data.datasets import find_faults
from distill.engine import setup_config
from distill.errors import DistillError

SHOWN = 3  # faults of each kind in the table

Report = dict[str, list[Fault]]  # by data set


def check(cfg: CfgNode, images: bool, workers: int) -> Report:
    """The faults of every data set of the config.

    Args:
        images: decode the pictures; otherwise they only have to be there.
        workers: processes; 0: this one.
    """
    stderr = Console(stderr=True)
    bar = partial(track, console=stderr, transient=True, disable=not stderr.is_terminal)
    report = {}
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        with contextlib.redirect_stdout(sys.stderr):  # where libraries print what they load
            faults, pictures = find_faults(cfg, name)
        found = inspect_pictures(pictures, workers) if images else map(missing_files, pictures)
        for more in bar(found, name, total=len(pictures)):
            faults += more
        report[name] = faults
    return report


def print_report(report: Report) -> None:
    """A table of the kinds, and below it the first faults of each, in lines that can be copied."""
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


def printable(text: str) -> str:
    """The text without what no terminal shows: file names may hold half of a character."""
    return text.encode("utf-8", "backslashreplace").decode()


def as_json(report: Report) -> list[dict[str, Any]]:
    return [{"data_set": k, **x._asdict()} for k, faults in report.items() for x in faults]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument(
        "--images", action=argparse.BooleanOptionalAction, default=True, help="decode every picture"
    )
    parser.add_argument("--json", action="store_true", help="all faults on stdout, for machines")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes; 0: this one alone"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of the config")
    args = parser.parse_args(argv)
    if args.workers < 0:
        parser.error(f"--workers is {args.workers}; it must be at least 0")
    try:
        report = check(setup_config(args.config_file, args.opts), args.images, args.workers)
    except DistillError as e:
        print("error:", " ".join(str(e).split()), file=sys.stderr)
        return 2
    faults = [fault for group in report.values() for fault in group]
    fatal = sum(fault.fatal for fault in faults)
    if args.json:
        print(json.dumps(as_json(report), indent=1))
    else:
        print_report(report)
        print(f"{fatal} fatal faults, {len(faults) - fatal} remarks in {', '.join(report)}")
    return 1 if fatal else 0


if __name__ == "__main__":
    sys.exit(main())

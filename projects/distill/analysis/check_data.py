"""List every issue in the data sets of a config, all at once.

    distill check-data --config-file F [--no-images] [--json] [--workers N] [KEY VALUE ...]

It checks the annotations of all DATASETS.TRAIN and DATASETS.TEST, and decodes every image, those of
DATASETS.UNLABELED, too. Fatal issues would stop or spoil a training; a training handles the
remarks.

The exit code is 0 without fatal issues, 1 with fatal issues, and 2 if the config is wrong.
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

from ..data.checks.images import inspect_images, missing_files
from ..data.checks.issues import Issue
from ..data.datasets import find_issues
from ..data.unlabeled import unlabeled_images
from ..engine import setup_config
from ..errors import DataError
from ..utils.arguments import add_config_arguments, at_least
from ..utils.progress import Progress
from ..utils.text import printable

SHOWN = 3  # number of issues of each kind below the table

IssuesByDataset = dict[str, list[Issue]]


def check(cfg: CfgNode, decode: bool, workers: int, progress: Progress) -> IssuesByDataset:
    """Find the issues of every data set of the config.

    Args:
        cfg: the whole config.
        decode: decode the images; otherwise they only have to exist.
        workers: number of processes that decode; 0: this process.
        progress: shows the progress per data set.
    """
    found = {}
    labeled = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    for name in dict.fromkeys((*labeled, *cfg.DATASETS.UNLABELED)):
        with contextlib.redirect_stdout(sys.stderr):  # libraries print what they load
            issues, images = find_issues(cfg, name) if name in labeled else _unlabeled(name)
        by_image = inspect_images(images, workers) if decode else map(missing_files, images)
        for more in progress.track(by_image, total=len(images), description=name):
            issues += more
        found[name] = issues
    return found


def _unlabeled(name: str) -> tuple[list[Issue], list[dict[str, Any]]]:
    try:
        return [], unlabeled_images(name)
    except DataError as e:
        return [Issue("unreadable data set", name, str(e).rstrip("."), True)], []


def print_table(found: IssuesByDataset) -> None:
    """Print a table of the kinds, and below it the first issues of each kind as plain lines."""
    table = Table(box=box.SIMPLE)
    for column in ("data set", "issue", "", "number"):
        table.add_column(column, justify="right" if column == "number" else "left")
    examples = []
    for name, issues in found.items():
        groups = defaultdict(list)
        for issue in issues:
            groups[not issue.fatal, issue.kind].append(issue)
        for (remark, kind), group in sorted(groups.items()):
            table.add_row(Text(name), kind, "remark" if remark else "fatal", str(len(group)))
            lines = [f"  {x.where}: {x.detail}" for x in group[:SHOWN]]
            more = [f"  and {len(group) - SHOWN} more"] if len(group) > SHOWN else []
            examples += [f"{name}: {kind}", *lines, *more]
    if examples:
        Console(width=None if sys.stdout.isatty() else 120).print(table)
        print(*map(printable, examples), sep="\n")


def as_json(found: IssuesByDataset) -> list[dict[str, Any]]:
    return [{"data_set": k, **x._asdict()} for k, issues in found.items() for x in issues]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--images", action=argparse.BooleanOptionalAction, default=True, help="decode every image"
    )
    parser.add_argument("--json", action="store_true", help="print all issues as JSON")
    parser.add_argument(
        "--workers",
        type=at_least(0),
        default=os.cpu_count() or 1,
        help="processes that decode; 0: only this one",
    )


def run(args: argparse.Namespace) -> int:
    cfg = setup_config(args.config_file, args.opts)
    with Progress(args.json, transient=True) as progress:
        found = check(cfg, args.images, args.workers, progress)
    issues = [issue for group in found.values() for issue in group]
    fatal = sum(issue.fatal for issue in issues)
    if args.json:
        print(json.dumps(as_json(found), indent=1))
    else:
        print_table(found)
        print(f"{fatal} fatal issues, {len(issues) - fatal} remarks in {', '.join(found)}")
    return 1 if fatal else 0

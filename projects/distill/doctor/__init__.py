"""Check a distillation on two batches before it trains for days.

    distill doctor --config-file F [--teacher-ap N] [--json] [KEY VALUE ...]
    distill doctor --config-file F --list-outputs | --list-heads

It builds what the trainer builds, takes two batches of the real data, and reports; nothing of the
run is touched. Errors: exit code 2 and a sentence each; warnings: exit code 0.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode

from ..engine import setup_config
from ..errors import DistillError
from ..utils.arguments import add_config_arguments, at_least
from ..utils.progress import Progress
from ..utils.text import print_error
from .examine import Say, examine, examine_heads, examine_taps
from .render import render
from .report import Report

__all__ = ["Report", "examine", "examine_heads", "examine_taps", "run_doctor"]


def run_doctor(
    cfg: CfgNode,
    *,
    teacher_ap: int = 0,
    as_json: bool = False,
    list_outputs: bool = False,
    list_heads: bool = False,
) -> int:
    """Examine a training in this one process and print the report.

    Args:
        cfg: of the training.
        teacher_ap: pictures of the first test set, for the teacher's AP; 0: none.
        as_json: print one JSON object instead of text.
        list_outputs, list_heads: examine the taps or the registered heads alone.

    Returns:
        The exit code: 0, or 2 if the training would be worthless; stderr says why.

    Raises:
        DistillError: what would stop the training before its first step.
    """
    with Progress(as_json, transient=True) as progress, quiet():

        def say(text: str) -> None:
            for task in progress.task_ids:
                progress.update(task, completed=1)
            progress.add_task(text, total=1)

        report = _examine(cfg, teacher_ap, list_outputs, list_heads, say)
    if as_json:
        print(json.dumps(plain(dataclasses.asdict(report)), indent=1))
    else:
        render(report)
    for sentence in report.errors:
        print_error(sentence)
    return 2 if report.errors else 0


def _examine(
    cfg: CfgNode, teacher_ap: int, list_outputs: bool, list_heads: bool, say: Say
) -> Report:
    if list_heads:
        return examine_heads(cfg, say=say)
    if list_outputs:
        return examine_taps(cfg, say=say)
    return examine(cfg, teacher_pictures=teacher_ap, say=say)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The report says what matters: no log, no warnings, nothing of libraries on stdout."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def plain(value: Any) -> Any:
    """``value`` for JSON, which has no number that is not finite: null stands for those."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--teacher-ap",
        type=at_least(0),
        default=0,
        metavar="N",
        help="also measure the teacher on the first N images of DATASETS.TEST[0]",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    lists = parser.add_mutually_exclusive_group()
    lists.add_argument(
        "--list-outputs", action="store_true", help="only the recorded outputs and their pairs"
    )
    lists.add_argument("--list-heads", action="store_true", help="only the heads that work here")


def run(args: argparse.Namespace) -> int:
    try:
        with quiet():
            cfg = setup_config(args.config_file, args.opts)
        return run_doctor(
            cfg,
            teacher_ap=args.teacher_ap,
            as_json=args.json,
            list_outputs=args.list_outputs,
            list_heads=args.list_heads,
        )
    except DistillError as e:
        if args.json:
            print(json.dumps(dataclasses.asdict(Report(errors=[str(e)])), indent=1))
        raise

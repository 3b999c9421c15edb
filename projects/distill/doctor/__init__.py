"""Check a distillation on two batches before it trains for days.

    distill doctor --config-file F [--teacher-ap N] [--draw-unlabeled PNG] [--json] [KEY VALUE ...]
    distill doctor --config-file F --list-outputs | --list-heads

The doctor builds the networks as the trainer does, examines two batches of the real data, and
prints a report. It does not change OUTPUT_DIR. The exit code is 2 if there are errors, with one
sentence per error on stderr. With warnings only it is 0.
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
from ..errors import ConfigError, DistillError
from ..utils.arguments import add_config_arguments, at_least, png
from ..utils.progress import Progress
from ..utils.text import print_error
from .examine import examine, examine_heads, examine_outputs
from .render import render
from .report import DoctorReport

__all__ = ["DoctorReport", "examine", "examine_heads", "examine_outputs", "run_doctor"]


def run_doctor(
    cfg: CfgNode,
    *,
    teacher_ap: int = 0,
    drawing: str | None = None,
    as_json: bool = False,
    list_outputs: bool = False,
    list_heads: bool = False,
) -> int:
    """Examine a training in this process and print the report.

    Args:
        cfg: config of the training.
        teacher_ap: number of images of the first test set on which the teacher's AP is measured.
        drawing: PNG file to write with unlabelled images and their objects; None: no file.
        as_json: print one JSON object instead of text.
        list_outputs, list_heads: examine only the recorded outputs, or only the registered heads.

    Returns:
        The exit code: 0, or 2 if the training would be useless. stderr says why.

    Raises:
        DistillError: the training would fail before its first step.
    """
    with Progress(as_json, transient=True) as progress, quiet():

        def say(text: str) -> None:
            for task in progress.task_ids:
                progress.update(task, completed=1)
            progress.add_task(text, total=1)

        if list_heads:
            report = examine_heads(cfg, say=say)
        elif list_outputs:
            report = examine_outputs(cfg, say=say)
        else:
            report = examine(cfg, teacher_images=teacher_ap, drawing=drawing, say=say)
    if as_json:
        print(json.dumps(plain(dataclasses.asdict(report)), indent=1))
    else:
        render(report)
    for sentence in report.errors:
        print_error(sentence)
    return 2 if report.errors else 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress logs, warnings and the stdout of libraries in this context."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def plain(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON does not have, by None."""
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
    parser.add_argument(
        "--draw-unlabeled",
        type=png,
        metavar="PNG",
        help="also draw 16 images of DATASETS.UNLABELED with the teacher's objects",
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
        if args.draw_unlabeled and not cfg.DATASETS.UNLABELED:
            raise ConfigError(
                "DATASETS.UNLABELED is empty; name images, or leave out --draw-unlabeled."
            )
        return run_doctor(
            cfg,
            teacher_ap=args.teacher_ap,
            drawing=args.draw_unlabeled,
            as_json=args.json,
            list_outputs=args.list_outputs,
            list_heads=args.list_heads,
        )
    except DistillError as e:
        if args.json:
            print(json.dumps(dataclasses.asdict(DoctorReport(errors=[str(e)])), indent=1))
        raise

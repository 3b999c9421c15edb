"""Measure what distillation costs: seconds and memory of steps, losses, data and evaluation.

    distill benchmark --config-file F [--config-file G] [--heads FitNet MKD | all] [KEY VALUE ...]

Networks and images are random: only their cost is measured. ``--parts`` names what is measured:

    steps       The plain student's step, the teacher's answer and the distilled step, for each
                head by itself and for all together. The ratio is distilled / (plain + teacher).
                If the weights set themselves, also the step with the balance.
    heads       Each head's losses with their backward to the features, beside the forward of the
                student's backbone; the largest tensor; the MiB that autograd keeps.
    training    A real training on DATASETS.TRAIN: data, step, and hooks with their share.
    data        An image of DATASETS.TRAIN: decoding, mapper, loader, and detectron2's own loader.
    evaluation  An image of DATASETS.TEST: loading, network and evaluator.

Times are medians; with ``--json`` also their interquartile ranges. Heads are measured after their
first phases.

With ``--losses`` no config is needed: losses on random P3 to P7 of 256 channels are timed with
their backward, beside a plain mean squared error.

With ``--gpu-check`` no config is needed, either. A Faster R-CNN with ResNet-50 learns from one with
ResNet-101: in half precision, with a compiled teacher, from a cache. The command counts how often
the host waits for the GPU. It takes a few minutes; ``--size 64x64 --batch 1`` tries it on a CPU.

``--check FILE`` compares all ratios with those of a file of ``--json``. The exit code is 1 if one
is larger by more than ``--tolerance``. ``--trace FILE`` writes the operations of the distilled step
for Perfetto.
"""

import argparse
import functools
import json
import platform
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from rich.console import Console
from rich.table import Column, Table

from ...data.datasets import number_of_classes
from ...engine import setup_config
from ...errors import ConfigError
from ...heads import DISTILL_HEAD_REGISTRY, first_phases
from ...section import check_choice
from ...utils.arguments import add_config_arguments, at_least, size
from ...utils.progress import Progress
from ...utils.provenance import command, commit
from ..compare import split_overrides
from .data import measure_data, measure_evaluation
from .gpu_check import GPUCheck
from .heads import measure_heads
from .losses import measure_losses
from .memory import write_trace
from .networks import Networks, synthetic_batch
from .steps import measure_steps, step
from .training import measure_training

PARTS = ("steps", "heads", "training", "data", "evaluation")
EVERY_HEAD = "all"
LOSSES, GPU = "losses", "gpu"

Rows = dict[str, dict[str, Any]]
"""Costs of what is measured, by its name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser, required=False, several=True)
    parser.add_argument(
        "--heads",
        nargs="+",
        metavar="HEAD",
        default=[],
        help="heads to measure, or 'all' that work; default: those of the config",
    )
    parser.add_argument("--parts", nargs="+", metavar="PART", default=["steps"], help="see above")
    parser.add_argument(
        "--size",
        type=size,
        metavar="HEIGHTxWIDTH",
        help="pixels of an image; default: 320x512, of --losses and --gpu-check 800x1333",
    )
    parser.add_argument(
        "--batch", type=at_least(1), help="images of a step; default: 2, of --gpu-check 8"
    )
    parser.add_argument("--objects", type=at_least(0), default=8, help="boxes of an image")
    parser.add_argument("--repeats", type=at_least(1), default=20, help="rounds, steps or images")
    parser.add_argument("--losses", action="store_true", help="time losses on random maps")
    parser.add_argument("--gpu-check", action="store_true", help="check all that needs a GPU")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="json file to write")
    parser.add_argument("--check", type=Path, metavar="FILE", help="ratios that must hold")
    parser.add_argument(
        "--tolerance", type=float, default=0.25, help="share by which --check allows more"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    split_overrides(args, "heads", "parts")
    known = _read_ratios(args.check) if args.check else {}
    args.size = args.size or ((800, 1333) if args.losses or args.gpu_check else (320, 512))
    args.batch = args.batch or (8 if args.gpu_check else 2)
    with Progress(args.json) as progress, redirect_stdout(sys.stderr if args.json else sys.stdout):
        measured = _measured(args, progress)  # pycocotools prints
    if args.json:
        print(json.dumps({**_facts(), "measured": measured}, indent=1))
    else:
        print(f"images of random pixels: {args.batch} x {args.size[0]}x{args.size[1]}")
        for title, rows in _flat(measured):
            _print_table(title, rows)
    return _check(ratios(measured), known, args.tolerance) if args.check else 0


def _measured(args: argparse.Namespace, progress: Progress) -> dict[str, dict[str, Rows]]:
    """Return what is measured by config and part.

    Raises:
        ConfigError: there is no config to measure, or an argument is wrong.
    """
    for part in args.parts:
        check_choice("--parts", part, PARTS)
    if args.losses:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        rows = measure_losses(args.size, args.batch, args.repeats, device, progress)
        return {LOSSES: {LOSSES: rows}}
    if args.gpu_check:
        check = GPUCheck(args.opts, args.size, args.batch, args.repeats, progress)
        return {GPU: check.run()}
    if not args.config_file:
        raise ConfigError("name what to measure: --config-file FILE, --losses or --gpu-check.")
    return {file: _of_config(file, args, progress) for file in args.config_file}


def _of_config(file: str, args: argparse.Namespace, progress: Progress) -> dict[str, Rows]:
    """Return the rows of each part of a config."""
    every = args.heads == [EVERY_HEAD]
    for name in () if every else args.heads:
        check_choice("--heads", name, [name for name, _ in DISTILL_HEAD_REGISTRY])
    cfg = setup_config(file, args.opts)
    cfg.defrost()
    if args.heads and not every:
        cfg.MODEL.DISTILL.HEADS = tuple(args.heads)
    found: dict[str, Rows] = {}
    if {"steps", "heads"} & set(args.parts) or args.trace:
        found |= _of_networks(Networks(cfg, every), args, progress)
    on_images = {
        "training": measure_training,
        "data": measure_data,
        "evaluation": measure_evaluation,
    }
    for part in (x for x in on_images if x in args.parts):
        found[part] = on_images[part](cfg, args.repeats, progress)
    return found


def _of_networks(
    networks: Networks, args: argparse.Namespace, progress: Progress
) -> dict[str, Rows]:
    """Return the rows of the parts that need networks, and write the trace."""
    classes = number_of_classes(networks.cfg)[1] or 1
    height, width = args.size
    inputs = synthetic_batch(args.batch, height, width, classes, args.objects, seed=0)
    parts = {"steps": measure_steps, "heads": measure_heads}
    found = {}
    with EventStorage(max(first_phases(networks.cfg).values(), default=0)):
        for part in (x for x in parts if x in args.parts):
            found[part] = parts[part](networks, inputs, args.repeats, progress)
        if args.trace:
            model = networks.model(list(networks.heads), balanced=True)
            cuda = networks.cfg.MODEL.DEVICE.startswith("cuda")
            step(model, inputs)
            write_trace(functools.partial(step, model, inputs), cuda, args.trace)
    return found


def _facts() -> dict[str, Any]:
    """Return the machine and the versions that belong to the numbers."""
    facts = {"commit": commit(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {"machine": platform.machine(), "command": command()}


def _flat(measured: Mapping[str, Mapping[str, Rows]]) -> list[tuple[str, Rows]]:
    """Return the rows of each table with its title."""
    return [
        (part if part == name else f"{name}: {part}", rows)
        for name, parts in measured.items()
        for part, rows in parts.items()
    ]


def _print_table(title: str, rows: Rows) -> None:
    print(f"\n{title}")
    table = Table(Column(no_wrap=True))
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    for column in columns:
        table.add_column(column)
    for name, row in rows.items():
        table.add_row(name, *(_cell(row.get(key)) for key in columns))
    Console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value['median'] if isinstance(value, dict) else value:.3g}"


# ---- Comparison with a table


def ratios(measured: Mapping[str, Mapping[str, Rows]]) -> dict[tuple[str, str], float]:
    """Return the median ratios by the title of their table and their row."""
    return {
        (title, name): row["ratio"]["median"]
        for title, rows in _flat(measured)
        for name, row in rows.items()
        if "ratio" in row
    }


def _read_ratios(path: Path) -> dict[tuple[str, str], float]:
    try:
        known = ratios(json.loads(path.read_text(encoding="utf-8"))["measured"])
    except OSError as e:
        raise ConfigError(f"--check cannot read '{path}': {e.strerror}.") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(f"--check: '{path}' is no file of `distill benchmark --json`.") from e
    if not known:
        raise ConfigError(f"'{path}' has no ratios; measure steps, heads or losses.")
    return known


def _check(
    found: Mapping[tuple[str, str], float],
    known: Mapping[tuple[str, str], float],
    tolerance: float,
) -> int:
    """Print the ratios that are larger than a table says, and return the exit code.

    Raises:
        ConfigError: a row of the table was not measured.
    """
    missing = [": ".join(x) for x in known if x not in found]
    if missing:
        raise ConfigError(f"--check: {missing[0]} was not measured; give the table's command.")
    worse = {x: value for x, value in known.items() if found[x] > value * (1 + tolerance)}
    for key, value in worse.items():
        print(f"{': '.join(key)}: the ratio is {found[key]:.2f}, and the table says {value:.2f}")
    if not worse:
        print(f"all {len(known)} ratios are at most {tolerance:.0%} above the table")
    return int(bool(worse))

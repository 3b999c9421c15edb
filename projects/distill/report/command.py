"""Write a report about trainings: curves, results, errors, images, cost and settings.

    distill report output/distilled
    distill report output/baseline output/distilled --out comparison.html

A RUN is the OUTPUT_DIR of a training, which may still run. The first of several is the baseline.
The report is one HTML file that needs no other. No network runs. The images have the teacher's
detections if the training has written a report itself, with the key REPORT.
"""

import argparse
from pathlib import Path

from ..config import load_config
from ..config.detectron2_rules import is_writable
from ..data.registration import register_files, register_own_sets
from ..errors import ConfigError, DistillError
from ..evaluation.coco_format import AnnotatedSet, open_set
from ..utils.arguments import at_least
from .install import check_installed
from .runs import CONFIGS, Run, read_run, run_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="OUTPUT_DIR of a training"
    )
    parser.add_argument(
        "--out", type=Path, help="file to write; default: report.html in the folder of the last RUN"
    )
    parser.add_argument(
        "--annotations", default="", help="file of the test set in COCO's format, if it has moved"
    )
    parser.add_argument("--images", default="", help="folder of its images")
    parser.add_argument(
        "--num-images", type=at_least(0), default=4, help="images to show for each reason"
    )
    parser.add_argument(
        "--analyze",
        type=at_least(1),
        default=5000,
        metavar="N",
        help="test images to analyze, evenly spread (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    check_installed()
    from .page import NAME, write_report

    out = args.out or args.runs[-1] / NAME
    _check(args, out)
    runs = [read_run(path, name) for path, name in zip(args.runs, run_names(args.runs))]
    data, problem = _test_set(args, runs)
    write_report(out, runs, data, shown=args.num_images, most=args.analyze, problem=problem)
    print(f"wrote {out}")
    return 0


def _check(args: argparse.Namespace, out: Path) -> None:
    """Raise ConfigError if an option cannot work."""
    if bool(args.annotations) != bool(args.images):
        raise ConfigError("Give both --annotations and --images, or neither.")
    if len({path.resolve() for path in args.runs}) < len(args.runs):
        raise ConfigError("A RUN is given twice; name different folders.")
    if out.suffix != ".html" or out.is_dir():
        raise ConfigError(f"--out '{out}' must be a file that ends in .html.")
    if not is_writable(str(out.parent)):
        raise ConfigError(f"--out: '{out}' cannot be written.")


def _test_set(args: argparse.Namespace, runs: list[Run]) -> tuple[AnnotatedSet | None, str]:
    """Open the test set of the options or of the last run; return it, or the reason without one.

    Raises:
        DistillError: the test set of the options cannot be opened.
    """
    if args.annotations:
        return open_set(*register_files(args.annotations, args.images)), ""
    path = args.runs[-1] / CONFIGS[0]
    if not path.is_file():
        return None, f"{runs[-1].name} has no {CONFIGS[0]}; give --annotations and --images."
    try:
        cfg = load_config(str(path))
        if len(cfg.DATASETS.TEST) != 1:
            return None, "Only the detections of a single test set are kept."
        register_own_sets(cfg, cfg.DATASETS.TEST)
        return open_set(cfg, cfg.DATASETS.TEST[0]), ""
    except DistillError as e:
        return None, str(e)

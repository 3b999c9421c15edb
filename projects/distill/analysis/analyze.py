"""Compare the detections of several models on one data set: errors, recall, cost, images.

    distill analyze --dataset coco_2017_val --out report.html
        --model baseline output/baseline/inference/coco_instances_results.json
        --model distilled output/distilled --model teacher output/teacher

A model is a file of predictions in COCO's format, which evaluation writes, or the OUTPUT_DIR of a
training. In the latter case, its network runs on the data set here, and its cost is measured.
The report is one HTML file that needs no other, and its numbers are in a JSON file beside it.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from numpy.typing import NDArray
from pycocotools.coco import COCO

from ..config import get_distill_cfg
from ..config.detectron2_rules import is_writable
from ..data.checks.yolo_folder import SPLITS
from ..data.registration import FORMATS, register_files
from ..errors import ConfigError, DistillError
from ..evaluation.coco_errors import (
    CURVES,
    Judged,
    coco_evaluation,
    coco_metrics,
    error_curves,
    judge,
    mean_of_classes,
)
from ..evaluation.coco_format import load_results, open_set, read_results
from ..report.panels import JudgedModel, compared_image, most_different
from ..utils.arguments import at_least, size
from ..utils.io import write_json, write_text
from ..utils.progress import Progress
from ..utils.provenance import command, versions
from ..utils.text import nearest
from .figures import draw_curves
from .models import WEIGHTS, OwnSets, detect, read_config
from .page import page


@dataclass(frozen=True)
class Data:
    """A data set with its annotations.

    Attributes:
        name: its name in detectron2's catalogue.
        own: its entry in a config, if it needs one.
        truth: its annotations.
        image_root: folder of the images.
    """

    name: str
    own: OwnSets
    truth: COCO
    image_root: str


@dataclass(frozen=True)
class Analysis:
    """Results of a model.

    Attributes:
        name, source: as the user gives them.
        shown: the detections of at least ``--min-score``, by their ids.
        metrics: AP and AR, 0 ... 1.
        curves: precision (7, R, K), see :func:`error_curves`.
        judged: detections and missed objects by the id of each image.
        efficiency: costs of the network, or None for a file of predictions.
    """

    name: str
    source: str
    shown: dict[int, dict[str, Any]]
    metrics: dict[str, float]
    curves: NDArray[np.float64]
    judged: dict[Any, Judged]
    efficiency: dict[str, Any] | None


def open_data(args: argparse.Namespace) -> Data:
    """Open the data set that the command line names.

    Raises:
        ConfigError, DataError: there is no such data set, or it cannot be evaluated.
    """
    if args.annotations:
        cfg, name = register_files(args.annotations, args.images, args.split)
    elif args.dataset in DatasetCatalog.list():
        cfg, name = get_distill_cfg(), args.dataset
    else:
        raise ConfigError(
            f"--dataset '{args.dataset}' is not registered; give --annotations, or one of: "
            f"{nearest(args.dataset, DatasetCatalog.list())}."
        )
    opened = open_set(cfg, name)
    own = {key: cfg.DATASETS[key] for key in FORMATS if cfg.DATASETS[key]}
    return Data(name, own, opened.truth, opened.image_root)


def analyze_model(
    name: str, path: Path, source: Any, data: Data, args: argparse.Namespace, progress: Progress
) -> Analysis:
    """Compare a model with the data set.

    Args:
        name, path: those that the user gives.
        source: the model's config, or its detections.
        data: the data set.
        args: see :func:`add_arguments`.
        progress: shows the stages.
    """
    results, cost = source, None
    if isinstance(source, CfgNode):
        weights = str(path / WEIGHTS)
        results, cost = detect(source, weights, data.name, args.size, progress, f"{name}: detect")
    detections = load_results(data.truth, results, f"'{path}'")
    task = progress.add_task(f"{name}: analyze", total=2)
    evaluation = coco_evaluation(data.truth, detections, args.max_detections)
    progress.advance(task)
    curves, judged = error_curves(evaluation), judge(evaluation, args.min_score)
    progress.advance(task)
    shown = {i: x for i, x in detections.anns.items() if x["score"] >= args.min_score}
    metrics = coco_metrics(evaluation)
    return Analysis(name, str(path), shown, metrics, curves, judged, cost)


def as_report(
    analyses: Sequence[Analysis], images: Sequence[Any], data: Data, args: argparse.Namespace
) -> dict[str, Any]:
    """Return the content of the JSON file."""
    objects = [x for x in data.truth.anns.values() if not x["iscrowd"]]
    classes = [data.truth.cats[i] for i in sorted(data.truth.cats)]
    rule = (
        "The images with the largest difference between the highest and the lowest F1 of the "
        f"models are shown. F1 is at IoU 0.5 with detections of score {args.min_score:g} or more. "
        "Among equal images, those with more objects come first, then those of lower id."
    )
    return {
        "data": {
            "name": args.dataset or args.annotations,
            "images": len(data.truth.imgs),
            "objects": len(objects),
            "classes": [x["name"] for x in classes],
            "supercategories": sorted({str(x.get("supercategory") or "") for x in classes} - {""}),
        },
        "max_detections": args.max_detections,
        "min_score": args.min_score,
        "models": {x.name: model_report(x) for x in analyses},
        "images_chosen_by": rule,
        "images": [
            {
                "file_name": data.truth.imgs[image]["file_name"],
                "id": data.truth.imgs[image]["id"],
                "f1": {x.name: x.judged[image].f1 for x in analyses},
            }
            for image in images
        ],
        "command": command(),
        "versions": versions(),
    }


def model_report(analysis: Analysis) -> dict[str, Any]:
    areas = analysis.curves.mean(1)  # (7, K)
    return {
        "source": analysis.source,
        "metrics": {k: percent(x) for k, x in analysis.metrics.items()},
        "errors": dict(zip(CURVES, map(percent, mean_of_classes(areas)))),
        "errors_of_classes": [dict(zip(CURVES, map(percent, x))) for x in areas.T],
        "precision": dict(zip(CURVES, mean_of_classes(analysis.curves).round(4).tolist())),
        "efficiency": analysis.efficiency,
    }


def percent(value: float) -> float | None:
    return None if math.isnan(value) else 100 * float(value)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what cannot work before the first network runs.

    Raises:
        ConfigError: with the option to change.
    """
    names = [name for name, _ in args.model]
    if not names:
        raise ConfigError("There is no model; give --model NAME PATH at least once.")
    if double := [x for x in names if names.count(x) > 1]:
        raise ConfigError(f"--model '{double[0]}' is given twice; choose another name.")
    others = [x for x in (args.images, args.split) if x]
    if bool(args.dataset) == bool(args.annotations) or len(others) != bool(args.annotations):
        raise ConfigError(
            "Give either --dataset, or --annotations with --images (COCO's format) or --split "
            "(YOLO's format)."
        )
    for name, path in args.model:
        if not Path(path).exists():
            raise ConfigError(f"--model {name}: there is no file or folder '{path}'.")
    if args.out.suffix != ".html" or args.out.is_dir():
        raise ConfigError(f"--out '{args.out}' must be a file that ends in .html.")
    if not is_writable(str(args.out.parent)):
        raise ConfigError(f"--out: '{args.out}' cannot be written.")
    numbers = args.out.with_suffix(".json").resolve()
    if numbers in {Path(x).resolve() for x in (args.annotations, *(y for _, y in args.model))}:
        raise ConfigError(f"--out: '{numbers}' would be overwritten; choose another name.")


@contextmanager
def naming(model: str) -> Iterator[None]:
    try:
        yield
    except DistillError as e:
        raise ConfigError(f"--model {model}: {e}") from e


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise ConfigError(f"--out: '{path}' cannot be written: {e.strerror}.") from e


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", default="", help="name of a registered data set")
    parser.add_argument(
        "--annotations",
        default="",
        help="file of another data set: in COCO's format, or a data.yaml in YOLO's",
    )
    parser.add_argument("--images", default="", help="folder of its images, in COCO's format")
    parser.add_argument("--split", choices=SPLITS, default="", help="its split, in YOLO's format")
    parser.add_argument(
        "--model",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "PATH"),
        help="predictions or the OUTPUT_DIR of a training; repeatable",
    )
    parser.add_argument("--out", type=Path, default=Path("output/analysis/report.html"))
    parser.add_argument(
        "--max-detections",
        type=at_least(10),
        default=100,
        help="detections of a class in an image; COCO's are 100",
    )
    parser.add_argument("--num-images", type=at_least(0), default=8, help="images to show")
    parser.add_argument("--min-score", type=float, default=0.5, help="score of the boxes to show")
    parser.add_argument(
        "--size",
        type=size,
        metavar="WIDTHxHEIGHT",
        help="pixels of the image whose cost is measured; default: as the model's config says",
    )


def run(args: argparse.Namespace) -> int:
    check_args(args)
    data = open_data(args)
    paths = {name: Path(path) for name, path in args.model}
    sources, analyses = {}, []
    for name, path in paths.items():  # all, before the first network runs
        with naming(name):
            trained = path.is_dir() and read_config(path, data.name, data.own)
            sources[name] = trained or read_results(str(path))
    with Progress() as progress:
        for name, path in paths.items():
            with naming(name):
                model = analyze_model(name, path, sources.pop(name), data, args, progress)
            analyses.append(model)
        chosen = most_different([x.judged for x in analyses], args.num_images)
        content = as_report(analyses, chosen, data, args)
        numbers = args.out.with_suffix(".json")
        with writing(numbers):
            write_json(numbers, content)
        drawn = progress.track(chosen, description="draw images")
        judged = [JudgedModel(x.name, x.shown, x.judged) for x in analyses]
        images = [compared_image(data.truth, data.image_root, x, judged) for x in drawn]
    curves = draw_curves({x.name: mean_of_classes(x.curves) for x in analyses})
    with writing(args.out):
        write_text(args.out, page(content, curves, images))
    print(f"wrote {args.out} and {numbers}")
    return 0

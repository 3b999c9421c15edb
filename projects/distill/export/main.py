"""Export a student to ONNX or TorchScript, and compare the file with its network.

    distill export output/student --format onnx [--out student.onnx] [--size 640x640]
        [--preprocessing outside] [--postprocessing outside] [--features] [--int8] [--images 8]
        [--evaluate] [--opts KEY VALUE ...]

The folder is the OUTPUT_DIR of a training. Before the file is kept, it runs on images of the test
set, or of --image-folder. Its outputs must be those of the network, and its detections must be
those of the network's own inference, one to one. A report is written beside the file.

Images are resized and padded outside of the file. With --preprocessing inside, it normalizes them.
With --postprocessing inside, it returns detections, otherwise the outputs of the layers.

--int8 also writes student_int8.onnx, whose convolutions and linear layers compute with 8-bit
integers, except the last ones. Its ranges are those of a training with SOLVER.QAT, otherwise of
images of the training set.
"""

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, Instances
from rich.console import Console
from rich.table import Table
from torch import nn

from ..checkpoint.load import read_part
from ..engine import Trainer, load_student
from ..errors import ConfigError
from ..modeling.quantization import METHODS, PART
from ..utils.arguments import at_least, size
from ..utils.io import write_json
from ..utils.progress import Progress
from ..utils.provenance import command
from ..utils.text import clause
from ..utils.timing import cpu_milliseconds
from .graphs import build_graph, exportable
from .int8 import Calibration, export_int8
from .int8_report import SURE
from .parity import Parity, compare, network_pixels, reference
from .predict import folder_images
from .runner import ExportError, Prediction, Predictor, network_input, read_image
from .student import student_cfg, test_cfg
from .writer import (
    FORMATS,
    NEAREST,
    OPSET,
    OPSETS,
    Exported,
    Options,
    export_info,
    keep_outputs,
    load,
    write,
)

T = TypeVar("T")

WHERE = ("inside", "outside")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="OUTPUT_DIR of a training")
    parser.add_argument("--format", choices=FORMATS, default="onnx")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: student.* in FOLDER")
    parser.add_argument(
        "--size",
        type=size,
        metavar="WIDTHxHEIGHT",
        help="fixed size of the input in pixels; default: any size",
    )
    for name, work in (("preprocessing", "normalization"), ("postprocessing", "NMS and masks")):
        text = f"{work} inside or outside of the file; default: inside"
        parser.add_argument(f"--{name}", choices=WHERE, default="inside", help=text)
    parser.add_argument(
        "--features",
        action="store_true",
        help="also return the maps of the backbone, by which the file can teach",
    )
    parser.add_argument(
        "--opset",
        type=int,
        choices=OPSETS,
        default=OPSET,
        help=f"version of ONNX's operators; default: {OPSET}",
    )
    parser.add_argument("--int8", action="store_true", help="also write an ONNX file of integers")
    parser.add_argument(
        "--calibration-images",
        type=at_least(1),
        default=100,
        help="number of training images that give the ranges of --int8; default: 100",
    )
    parser.add_argument(
        "--calibration-folder", type=Path, metavar="DIR", help="images instead of the training set"
    )
    parser.add_argument(
        "--calibration-method",
        choices=METHODS,
        default=METHODS[0],
        help="mean of the images' least and largest values, the extremes of all, or the mean of "
        f"percentiles; default: {METHODS[0]}",
    )
    parser.add_argument(
        "--images", type=at_least(1), default=8, help="number of compared images; default: 8"
    )
    parser.add_argument(
        "--image-folder", type=Path, metavar="DIR", help="images to compare, if not the test set"
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="evaluate the network and the file on the test set"
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="overrides of the config that names the test set, after all other options",
    )


def options_of(args: argparse.Namespace) -> Options:
    """Return the content of the file that the arguments ask for."""
    return Options(
        args.format,
        args.size and args.size[::-1],
        args.preprocessing == "inside",
        args.postprocessing == "inside",
        args.features,
        args.opset,
    )


def run(args: argparse.Namespace) -> int:
    options = options_of(args)
    path = args.out or args.folder / f"student{FORMATS[options.form]}"
    if path.suffix != FORMATS[options.form]:
        raise ConfigError(f"--out '{path}' must end with {FORMATS[options.form]}.")
    if args.evaluate and not options.final:
        raise ConfigError("--evaluate needs detections; use --postprocessing inside.")
    if args.int8 and options.form != "onnx":
        raise ConfigError("--int8 needs --format onnx, whose files onnxruntime runs with integers.")
    if args.int8 and options.features:
        raise ConfigError("--int8 is for devices, and --features is for teachers; export twice.")
    with Progress() as progress:
        cfg = student_cfg(args.folder)
        model = load_student(cfg, cfg.MODEL.WEIGHTS).eval()
        files, calibration = compared_files(args), calibration_of(args, cfg)
        parity = export(cfg, model, path, files, options, progress)
        report = {"command": command(), **described(path), "parity": asdict(parity)}
        paths = {"file": path}
        if args.int8:
            paths["int8"] = path.with_name(f"{path.stem}_int8.onnx")
            own = export_int8(cfg, model, paths["int8"], files, options, calibration, progress)
            report["int8"] = {**described(paths["int8"]), "report": asdict(own)}
            report["ms"] = measured(model, paths, files)
        if args.evaluate:
            test = test_cfg(args.folder, args.opts)
            networks = {"network": model, **{k: exported_model(x) for k, x in paths.items()}}
            report["metrics"] = {k: evaluate(test, x, progress, k) for k, x in networks.items()}
    write_json(path.with_suffix(".json"), report)
    show(path, report)
    return 0


def described(path: Path) -> dict[str, Any]:
    """Return the metadata and the size of a file."""
    return {"info": load(path).info, "bytes": os.path.getsize(path)}


# ---- Images.


def compared_files(args: argparse.Namespace) -> list[str]:
    """Return evenly spaced images of ``--image-folder``, or of the first test set.

    Raises:
        DistillError: if there are no images.
    """
    if args.image_folder is None:
        files = set_files(test_cfg(args.folder, args.opts))
    else:
        files = [str(x) for x in folder_images(args.image_folder)]
    return evenly_spaced(files, args.images)


def calibration_of(args: argparse.Namespace, cfg: CfgNode) -> Calibration | None:
    """Return the images that give ranges; None if the student has learned its ranges.

    Raises:
        DistillError: if there are no images.
    """
    if not args.int8 or read_part(cfg.MODEL.WEIGHTS, PART) is not None:
        return None
    if args.calibration_folder is None:
        train = test_cfg(args.folder, args.opts).DATASETS.TRAIN
        if not train:
            raise ConfigError("DATASETS.TRAIN is empty; name images by --calibration-folder.")
        files = set_files(test_cfg(args.folder, [*args.opts, "DATASETS.TEST", tuple(train)]))
    else:
        files = [str(x) for x in folder_images(args.calibration_folder)]
    return Calibration(evenly_spaced(files, args.calibration_images), args.calibration_method)


def set_files(cfg: CfgNode) -> list[str]:
    """Return the image files of the first set of ``DATASETS.TEST``."""
    return [x["file_name"] for x in DatasetCatalog.get(cfg.DATASETS.TEST[0])]


def evenly_spaced(files: Sequence[T], number: int) -> list[T]:
    step = max(len(files) / number, 1.0)
    return [files[int(k * step)] for k in range(min(number, len(files)))]


# ---- The file.


def export(
    cfg: CfgNode,
    model: nn.Module,
    path: Path,
    files: Sequence[str],
    options: Options,
    progress: Progress,
) -> Parity:
    """Write a file that is kept only if it agrees with its network.

    Args:
        cfg: config of the student.
        model: the student.
        path: the file.
        files: images to compare.
        options: content of the file.
        progress: display of the stages.

    Raises:
        ConfigError: if the network cannot be exported.
        ParityError: if the file differs from its network.
    """
    form, final = options.form, options.final
    build = partial(build_graph, normalizes=options.normalizes, with_features=options.features)
    copy = exportable(model)
    graph = build(copy)
    chosen = build(copy, with_raw=not final, with_final=final)
    info = export_info(cfg, chosen, options.size)
    path.parent.mkdir(parents=True, exist_ok=True)
    task = progress.add_task(f"export to {form}", total=2)
    # In the same folder, so that the file can be renamed.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        full, kept = (Path(folder, f"{x}{FORMATS[form]}") for x in ("full", "kept"))
        write(graph, info, full, form, options.opset)
        progress.advance(task)
        keep_outputs(chosen, full, kept, form)
        progress.advance(task)
        task = progress.add_task("compare with the network", total=len(files))
        images = (read_image(x) for x in progress.track(files, task_id=task))
        stock = build(model, with_final=False)
        try:
            parity = compare(model, stock, load(full), load(kept), images)
        except ExportError as e:  # an operator that this version of onnxruntime lacks
            raise ConfigError(f"{clause(e)}; use {NEAREST}.") from e
        parity.check()
        os.replace(kept, path)
    return parity


# ---- Time.


def measured(model: nn.Module, paths: Mapping[str, Path], files: Sequence[str]) -> dict[str, float]:
    """Return the CPU time per image in ms of a network, and of its files in one thread.

    Images are resized already. The network's time includes the pasting of masks.
    """
    exported = {name: load(path, threads=1) for name, path in paths.items()}
    info = exported["file"].info
    pixels = [network_pixels(read_image(x), info) for x in files]
    images = [network_input(x, info) for x in pixels]
    sizes = [(x.shape[1], x.shape[2]) for x in pixels]

    def network(k: int) -> None:
        reference(model, pixels[k % len(files)], sizes[k % len(files)], info)

    def file(k: int, run: Exported) -> None:
        run(images[k % len(files)], sizes[k % len(files)])

    times = {name: cpu_milliseconds(partial(file, run=run)) for name, run in exported.items()}
    return {"network": cpu_milliseconds(network), **times}


# ---- Evaluation.


class ExportedModel(nn.Module):
    """An exported file with the contract of a detectron2 network in evaluation.

    Images are read from their files and resized by the runner, so all of it is evaluated.

    Args:
        predictor: the file.
    """

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.predictor = predictor
        self.eval()

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [as_output(self.predictor(read_image(x["file_name"]))) for x in batched_inputs]


def as_output(prediction: Prediction) -> dict[str, Any]:
    """Convert a prediction to the output of a detectron2 network for one image."""
    instances = Instances(prediction.size)
    instances.pred_boxes = Boxes(torch.from_numpy(prediction.boxes))
    instances.scores = torch.from_numpy(prediction.scores)
    instances.pred_classes = torch.from_numpy(prediction.classes)
    if prediction.masks is not None:
        instances.pred_masks = torch.from_numpy(prediction.masks)
    output: dict[str, Any] = {"instances": instances}
    if prediction.sem_seg is not None:
        output["sem_seg"] = torch.from_numpy(prediction.sem_seg)
    if prediction.segments is not None:
        segments = torch.from_numpy(prediction.segments)
        output["panoptic_seg"] = segments, list(prediction.segments_info)
    return output


def exported_model(path: Path) -> ExportedModel:
    """Return the network of a file, for an evaluator."""
    return ExportedModel(Predictor(*load(path)))


def evaluate(cfg: CfgNode, network: nn.Module, progress: Progress, title: str) -> dict[str, float]:
    """Return the metrics of a network by names such as "bbox/AP", with the test set if several.

    Args:
        cfg: the config, see :func:`test_cfg`.
        network: a detectron2 network in evaluation mode, or an :class:`ExportedModel`.
        progress, title: display of the stage.
    """
    found = {}
    for name in cfg.DATASETS.TEST:
        loader = Trainer.build_test_loader(cfg, name)
        task = progress.add_task(f"evaluate the {title} on {name}", total=len(loader))
        advance = {"after_inference": partial(progress.advance, task)}
        with tempfile.TemporaryDirectory() as out:
            evaluator = Trainer.build_evaluator(cfg, name, out)
            found[name] = inference_on_dataset(network, loader, evaluator, advance)
    (first, *others) = found.values()
    return flatten_results_dict(found if others else first)


def show(path: Path, report: dict[str, Any]) -> None:
    """Print the report of an export."""
    parity, console = report["parity"], Console()
    console.print(
        f"{path}: {report['bytes'] / 2**20:.1f} MiB. On {parity['images']} images the outputs of "
        f"its layers differ by at most {parity['raw']:.0e}.",
        markup=False,
    )
    if parity["detections"]:
        console.print(
            f"{parity['detections']} detections are the same: boxes within {parity['box']:.0e} "
            f"pixels, scores within {parity['score']:.0e}, IoU of masks {parity['mask_iou']:.4f}. "
            f"{parity['excused']} near a threshold are in one of the two only."
        )
    if "sem_seg" in report["info"].get("outputs", ()):
        console.print(f"At least {parity['pixels']:.2%} of the pixels have the same class.")
    if "int8" in report:
        show_int8(report["int8"]["report"], console)
    if "metrics" in report or "ms" in report:
        console.print(comparison(report))


def show_int8(report: dict[str, Any], console: Console) -> None:
    """Print how an INT8 file differs from its network."""
    console.print(
        f"INT8: {report['weights']} weights are integers; ranges: {report['ranges']}. The outputs "
        f"of layers deviate by at most {report['deviation']:.1%}."
    )
    if report["detections"]:
        console.print(
            f"{report['found']} of {report['detections']} detections with a score of at least "
            f"{SURE} are found; their scores differ by at most {report['score']:.2f}."
        )
    if report["pixels"] < 1:
        console.print(f"At least {report['pixels']:.2%} of the pixels have the same class.")


def comparison(report: dict[str, Any]) -> Table:
    """Return the metrics, sizes and times of a network and its files as a table."""
    sizes = {"file": report["bytes"]}
    if "int8" in report:
        sizes["int8"] = report["int8"]["bytes"]
    columns = ("network", *sizes)
    metrics = report.get("metrics", {"network": {}})
    rows: dict[str, dict[str, float]] = {
        name: {k: found[name] for k, found in metrics.items() if name in found}
        for name in metrics["network"]
    }
    if "ms" in report:
        rows["MiB"] = {name: x / 2**20 for name, x in sizes.items()}
        rows["ms of CPU per image"] = report["ms"]
    table = Table("", *columns)
    for name, values in rows.items():
        table.add_row(name, *(f"{values[k]:.3f}" if k in values else "" for k in columns))
    return table

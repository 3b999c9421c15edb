"""Export a student to ONNX or TorchScript, and compare the file with its network.

    distill export output/student --format onnx [--out student.onnx] [--size 640x640]
        [--preprocessing outside] [--postprocessing outside] [--features] [--images 8] [--evaluate]
        [--opts KEY VALUE ...]

The folder is the OUTPUT_DIR of a training. Before the file is kept, it runs on images of the test
set, or of --image-folder. Its outputs must be those of the network, and its detections must be
those of the network's own inference, one to one. A report is written beside the file.

Images are resized and padded outside of the file. With --preprocessing inside, it normalizes them.
With --postprocessing inside, it returns detections, otherwise the outputs of the layers.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, Instances
from rich.console import Console
from rich.table import Table
from torch import nn

from ..engine import Trainer, load_student
from ..errors import ConfigError
from ..utils.arguments import at_least, size
from ..utils.io import write_json
from ..utils.progress import Progress
from ..utils.provenance import command
from ..utils.text import clause
from .graphs import build_graph, exportable
from .parity import Parity, compare
from .predict import folder_images
from .runner import ExportError, Prediction, Predictor, Size, read_image
from .student import student_cfg, test_cfg
from .writer import (
    FORMATS,
    NEAREST,
    OPSET,
    OPSETS,
    export_info,
    keep_outputs,
    load,
    write,
)

WHERE = ("inside", "outside")


class Options(NamedTuple):
    """Content of a file.

    Attributes:
        form: a key of :data:`FORMATS`.
        size: height and width of the input in pixels, or None if they may vary.
        normalizes: True if the file normalizes pixels.
        final: True if the file selects detections; False if it returns the outputs of its layers.
        features: True if the file also returns the maps of the backbone.
        opset: version of ONNX's operators.
    """

    form: str = "onnx"
    size: Size | None = None
    normalizes: bool = True
    final: bool = True
    features: bool = False
    opset: int = OPSET

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Options":
        return cls(
            args.format,
            args.size and args.size[::-1],
            args.preprocessing == "inside",
            args.postprocessing == "inside",
            args.features,
            args.opset,
        )


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


def run(args: argparse.Namespace) -> int:
    options = Options.from_args(args)
    path = args.out or args.folder / f"student{FORMATS[options.form]}"
    if path.suffix != FORMATS[options.form]:
        raise ConfigError(f"--out '{path}' must end with {FORMATS[options.form]}.")
    if args.evaluate and not options.final:
        raise ConfigError("--evaluate needs detections; use --postprocessing inside.")
    with Progress() as progress:
        cfg = student_cfg(args.folder)
        model = load_student(cfg, cfg.MODEL.WEIGHTS).eval()
        parity = export(cfg, model, path, image_files(args), options, progress)
        report = {
            "command": command(),
            "info": load(path).info,
            "bytes": os.path.getsize(path),
            "parity": asdict(parity),
        }
        if args.evaluate:
            test = test_cfg(args.folder, args.opts)
            networks = {"network": model, "file": exported_model(path)}
            report["metrics"] = {k: evaluate(test, x, progress, k) for k, x in networks.items()}
    write_json(path.with_suffix(".json"), report)
    show(path, report)
    return 0


def image_files(args: argparse.Namespace) -> list[str]:
    """Return evenly spaced images of ``--image-folder``, or of the first test set.

    Raises:
        DistillError: if there are no images.
    """
    if args.image_folder is None:
        name = test_cfg(args.folder, args.opts).DATASETS.TEST[0]
        files = [x["file_name"] for x in DatasetCatalog.get(name)]
    else:
        files = [str(x) for x in folder_images(args.image_folder)]
    step = max(len(files) / args.images, 1.0)
    return [files[int(k * step)] for k in range(min(args.images, len(files)))]


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
    if "metrics" not in report:
        return
    table = Table("metric", "network", "file")
    both = report["metrics"]
    for name, value in both["network"].items():
        table.add_row(name, *(f"{x:.3f}" for x in (value, both["file"].get(name, float("nan")))))
    console.print(table)

#!/usr/bin/env python3
"""Export a small network of each family, compare the files with the networks, and measure both.

    python tools/export_table.py --shapes output/demo/shapes-1-85362e10 --out output/export
        --student RetinaNet output/demo/stages/baseline-0-...

The INT8 files have the ranges of 100 training images, or those that a student has learned.
Networks are those of the shapes configs. A --student is the folder of a trained one, whose AP is
measured with that of its files. Other networks have random weights, and no AP. A row that fails
keeps its reason. Finished rows are kept. Times are those of the CPU with one thread.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode

from distill.checkpoint.load import read_part
from distill.engine import load_student
from distill.errors import DistillError
from distill.experiments import support_matrix
from distill.experiments.support_matrix import NETWORKS
from distill.export.int8 import Calibration, export_int8
from distill.export.main import ExportedModel, evaluate, evenly_spaced, export
from distill.export.parity import network_pixels
from distill.export.predict import folder_images
from distill.export.runner import Array, Predictor, network_input, read_image
from distill.export.student import student_cfg, test_cfg
from distill.export.writer import FORMATS, Options, load, network_info
from distill.modeling.quantization import METHODS, PART
from distill.utils.io import write_json
from distill.utils.progress import Progress
from distill.utils.provenance import commit, versions
from distill.utils.timing import cpu_milliseconds

THREADS = 1  # so that the CPU time of a process does not depend on what else runs
REPEATS = 20
IMAGES = 4  # compared by the export
CALIBRATION = 100  # images that give the ranges of an INT8 file
METRICS = ("bbox/AP", "segm/AP")
SPREAD = 0.5  # smallest standard deviation of the outputs of a layer
LARGEST = 100.0  # factor of the weights of a layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=Path, required=True, help="folder of the shapes data")
    parser.add_argument("--out", type=Path, default=Path("output/export"))
    parser.add_argument("--result", type=Path, default=Path("docs/results/export.json"))
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--student", nargs=2, action="append", default=[], metavar=("NAME", "DIR"))
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    result = json.loads(args.result.read_text()) if args.result.is_file() else {"rows": {}}
    typed = shlex.join(["python", "tools/export_table.py", *sys.argv[1:]])
    described = {"command": typed, "commit": commit(), "versions": versions()}
    result = {**described, "threads": THREADS, "rows": result["rows"]}
    students = {name: Path(folder) for name, folder in args.student}
    train, files = (folder_images(args.shapes / "images" / x) for x in ("train", "val"))
    with Progress() as progress:
        for name in args.only:
            if name not in result["rows"]:
                test = test_cfg(students[name], test_set(args.shapes)) if name in students else None
                cfg, model = student(students[name]) if name in students else random_network(name)
                row = Row(cfg, model, files, evenly_spaced(train, CALIBRATION), test, progress)
                result["rows"][name] = row.measured(args.out / name.replace(" ", "_"))
                write_json(args.result, result)


def test_set(shapes: Path) -> list[Any]:
    """Return the KEY VALUE overrides that name the shapes as the test set."""
    annotations, images = shapes / "annotations" / "instances_val.json", shapes / "images" / "val"
    triples = (("shapes_val", str(annotations), str(images)),)
    return ["DATASETS.COCO_FORMAT", triples, "DATASETS.TEST", ("shapes_val",)]


def student(folder: Path) -> tuple[CfgNode, Any]:
    cfg = student_cfg(folder)
    return cfg, load_student(cfg, cfg.MODEL.WEIGHTS).eval()


def random_network(name: str) -> tuple[CfgNode, Any]:
    """Return a network with random weights that detects something."""
    cfg = support_matrix.config(name)
    cfg.MODEL.DEVICE, cfg.DATASETS.TEST = "cpu", ()
    model: Any = support_matrix.network(name, "teacher").eval()
    for layer in model.modules():
        if getattr(layer, "bias", None) is not None and layer.weight.dim() > 1:
            layer.register_forward_hook(spread)
    with torch.no_grad():
        model([{"image": 255 * torch.rand(3, 128, 128)}])
    for layer in model.modules():
        layer._forward_hooks.clear()
    if hasattr(model, "test_score_thresh"):
        model.test_score_thresh = 0.0  # it is sure of nothing
    return cfg, model


@torch.no_grad()
def spread(layer: Any, inputs: Any, outputs: torch.Tensor) -> torch.Tensor:
    """Scale the weights of a layer near zero, so that its outputs differ by about 1."""
    if outputs.numel() > 1 and outputs.std() < SPREAD:
        layer.weight *= (1 / outputs.std()).clamp(max=LARGEST)  # more would amplify rounding errors
        return layer.forward(*inputs)
    return outputs


class Row(NamedTuple):
    """The row of a family.

    Attributes:
        cfg: config of the network.
        model: the network.
        files: images, of which the first are compared and timed.
        train: images that give the ranges of an INT8 file.
        test: config with the test set, or None for a network without AP.
        progress: display of the stages.
    """

    cfg: CfgNode
    model: Any
    files: list[Path]
    train: list[Path]
    test: CfgNode | None
    progress: Progress

    def measured(self, folder: Path) -> dict[str, Any]:
        """Return the measurements of the network and of its files in all formats."""
        info = network_info(self.cfg, self.model, None)
        images = [network_pixels(read_image(x), info) for x in self.files[:REPEATS]]
        row: dict[str, Any] = {"network": self._metrics(self.model, "network")}
        entries = [[{"image": torch.from_numpy(x)}] for x in images]
        with torch.no_grad():
            row["network"]["ms"] = cpu_milliseconds(lambda k: self.model(entries[k]), REPEATS)
        files = {form: folder / f"student{suffix}" for form, suffix in FORMATS.items()}
        for form, path in {**files, "int8": folder / "student_int8.onnx"}.items():
            try:
                row[form] = self._exported(form, path, images)
            except DistillError as e:
                row[form] = {"failure": str(e)}
        return row

    def _exported(self, form: str, path: Path, images: list[Array]) -> dict[str, Any]:
        compared = [str(x) for x in self.files[:IMAGES]]
        content = Options("onnx" if form == "int8" else form)
        given = self.cfg, self.model, path, compared, content
        start = time.process_time()
        if form == "int8":
            report: Any = export_int8(*given, self._calibration(), self.progress)
        else:
            report = export(*given, self.progress)
        taken = time.process_time() - start
        exported = load(path, THREADS)
        padded = [network_input(x, exported.info) for x in images]
        sizes = [(x.shape[1], x.shape[2]) for x in images]
        file = ExportedModel(Predictor(*exported))
        return {
            "bytes": path.stat().st_size,
            "seconds": taken,
            "ms": cpu_milliseconds(lambda k: exported(padded[k], sizes[k]), REPEATS),
            "report" if form == "int8" else "parity": vars(report),
            **self._metrics(file, form),
        }

    def _calibration(self) -> Calibration | None:
        """Return the images that give ranges, or None for a student that has learned them."""
        if read_part(self.cfg.MODEL.WEIGHTS, PART) is not None:
            return None
        return Calibration([str(x) for x in self.train], METHODS[0])

    def _metrics(self, network: Any, title: str) -> dict[str, Any]:
        if self.test is None:
            return {}
        found = evaluate(self.test, network, self.progress, title)
        return {k: found[k] for k in METRICS if k in found}


if __name__ == "__main__":
    main()

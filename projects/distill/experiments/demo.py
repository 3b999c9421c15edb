"""Distill a detector on rendered images, from nothing to a table, on a CPU.

    distill demo --seeds 3 --control

Every seed trains a teacher, a student without distillation, and the same student distilled. With
``--control``, the student is also distilled from an untrained teacher. Finished stages are reused,
and an interrupted one resumes.
"""

import argparse
import dataclasses
import functools
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.analysis import FlopCountAnalysis
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from ..engine import Trainer, setup_config
from ..utils.arguments import at_least
from ..utils.io import write_json
from ..utils.progress import Progress
from ..utils.provenance import command, commit, versions
from ..utils.timing import seconds
from . import demo_figure
from .paired import random_teacher
from .runner import Result, Runner, Stage, finite
from .shapes import SCENE, SCENES, Shapes
from .summary import differences, mean_std, replicates

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
COST = {"parameters": "M params", "gflops": "GFLOPs", "ms_per_image": "ms/image"}
TIMED_IMAGES = 50
TABLE_WIDTH = 120  # characters; what a narrower terminal wraps is still whole
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
TEACHER = "Shapes-Detection/faster_rcnn_R_18_FPN_64.yaml"
STUDENT = "Shapes-Detection/faster_rcnn_R_10_FPN_32.yaml"
DISTILLED = "Shapes-Detection/IMA-ROIKD/faster_rcnn_R_18_FPN_64-faster_rcnn_R_10_FPN_32.yaml"


class Demo(Runner):
    """Runs configs of this package on the shapes.

    Args:
        out: folder of everything that the demo writes.
        progress: shows what runs.
        data_seed, layout: see :class:`Shapes`.
    """

    def __init__(self, out: Path, data_seed: int, progress: Progress, layout: str = "coco"):
        super().__init__(out, progress)
        self.shapes = Shapes(out, data_seed, layout)

    @property
    def data(self) -> Path:
        return self.shapes.folder

    def render(self) -> None:
        self.shapes.render(self.progress)

    def stage(self, name: str, seed: int, config: str, *opts: Any) -> Stage:
        """Describe a run.

        Args:
            config: name of a config, such as ``Shapes-Detection/faster_rcnn_R_10_FPN_32.yaml``.
            opts: KEY VALUE overrides.
        """
        opts = (*self.shapes.opts(), "OUTPUT_DIR", str(self.out), *opts)
        return self.describe(name, seed, setup_config(config, opts))

    def measure(self, stage: Stage, model: nn.Module) -> Result:
        (name,) = stage.cfg.DATASETS.TEST
        results = self.test(stage, model)[name]
        return {**scores(results), **cost(model, Trainer.build_test_loader(stage.cfg, name))}


def scores(results: dict[str, dict[str, float]]) -> Result:
    """Return mIoU, or COCO's metrics of boxes and, as "mask AP" and so on, of masks."""
    if "sem_seg" in results:
        return {"mIoU": results["sem_seg"]["mIoU_present"]}
    kinds = {"": "bbox", "mask ": "segm"}
    return {
        f"{prefix}{metric}": finite(metric, results[kind][metric])
        for prefix, kind in kinds.items()
        if kind in results
        for metric in METRICS
    }


@torch.no_grad()
def cost(model: nn.Module, loader: Any) -> dict[str, float]:
    """Return millions of parameters, GFLOPs (multiply-adds, fvcore) and median ms per image."""
    inputs = [batch for batch, _ in zip(loader, range(TIMED_IMAGES))]
    cuda = next(model.parameters()).is_cuda
    times = [seconds(functools.partial(model, batch), cuda) for batch in inputs]
    return {
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "gflops": FlopCountAnalysis(model, inputs[0]).total() / 1e9,
        "ms_per_image": statistics.median(times) * 1e3,
    }


def stages_of_seed(demo: Demo, seed: int, control: bool) -> list[Stage]:
    teacher = demo.stage("teacher", seed, TEACHER)
    stages = [teacher, demo.stage("baseline", seed, STUDENT)]
    key = "MODEL.DISTILL.TEACHER.WEIGHTS"
    opts = ("MODEL.DISTILL.TEACHER.CONFIG_FILE", TEACHER)
    distilled = (*opts, key, str(teacher.weights))
    stages.append(demo.stage("distilled", seed, DISTILLED, *distilled))
    if control:
        path = demo.out / "stages" / f"random-{teacher.folder.name}.pth"
        random_teacher(path, stages[-1].cfg, seed + 1_000)
        stages.append(demo.stage("control", seed, DISTILLED, *opts, key, str(path)))
    return stages


def summarize(demo: Demo, stages: list[Stage], seeds: list[int]) -> dict[str, Any]:
    """Run all stages and collect ``results.json``."""
    results: dict[str, Any] = {}
    for stage in stages:
        metrics = demo.run(stage)
        collected = results.setdefault(stage.name, {k: [] for k in metrics})
        for key, value in metrics.items():
            collected[key].append(value)
    solver = stages[1].cfg.SOLVER
    results["settings"] = {
        "scenes": {**SCENES, **dataclasses.asdict(SCENE)},
        "data_seed": demo.shapes.data_seed,
        "heads": list(stages[2].cfg.MODEL.DISTILL.HEADS),
        "learning_rate": solver.BASE_LR,
        "iterations": {s.name: s.cfg.SOLVER.MAX_ITER for s in stages},
        "batch": solver.IMS_PER_BATCH,
        "command": command(),
        "threads": torch.get_num_threads(),
    }
    return {**results, "seeds": seeds, "commit": commit(), "versions": versions()}


def print_table(results: dict[str, Any]) -> None:
    console = Console(width=TABLE_WIDTH)
    table = Table(title="Shapes, COCO evaluation, box AP", box=box.SIMPLE)
    for column in ("", *METRICS, *COST.values()):
        table.add_column(column, justify="right" if column else "left")
    for name in ("teacher", "baseline", "control", "distilled"):
        if name in results:
            row = results[name]
            cells = [mean_std(row[k]) for k in METRICS]
            cells += [mean_std([statistics.mean(row[k])], 2) for k in COST]
            table.add_row(name, *cells)
    console.print(table)
    for other in ("baseline", "control"):
        if other in results:
            gains = differences(results["distilled"]["AP"], results[other]["AP"])
            console.print(f"distilled - {other}: {mean_std(gains)} AP")


def tune(demo: Demo, seeds: list[int]) -> dict[str, Any]:
    """Train the baseline with several learning rates and return its AP."""
    table = {
        str(lr): [
            demo.run(demo.stage("tuning", seed, STUDENT, "SOLVER.BASE_LR", lr))["AP"]
            for seed in seeds
        ]
        for lr in LEARNING_RATES
    }
    for lr, values in table.items():
        print(f"baseline at learning rate {lr}: {mean_std(values)} AP")
    return {"AP": table, "seeds": seeds, "data_seed": demo.shapes.data_seed, "commit": commit()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=at_least(1), default=1, help="number of replicates")
    parser.add_argument("--control", action="store_true", help="add the untrained teacher")
    parser.add_argument("--out", type=Path, default=Path("output/demo"))
    parser.add_argument(
        "--tune", action="store_true", help="instead: the baseline's learning rate, on other seeds"
    )


def run(args: argparse.Namespace) -> int:
    out = args.out.resolve()
    os.makedirs(out, exist_ok=True)
    data_seed, seeds = replicates(args.tune, args.seeds)
    with Progress() as progress:
        demo = Demo(out, data_seed, progress)
        demo.render()
        if args.tune:
            write_json(out / "tuning.json", tune(demo, seeds))
            return 0
        stages = [s for seed in seeds for s in stages_of_seed(demo, seed, args.control)]
        results = summarize(demo, stages, seeds)
    write_json(out / "results.json", results)
    print_table(results)
    demo_figure.draw(results, stages, out / "summary.png")
    print(f"wrote {out / 'results.json'} and {out / 'summary.png'}")
    return 0

"""Distil a detector on rendered pictures, from nothing to a table, on a CPU.

    python tools/demo.py --seeds 3 --control

Every seed is a full replicate: a teacher, a student alone, the same student distilled, and, with
``--control``, the same student under a randomly initialised teacher. Finished stages are reused,
an interrupted one resumes.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import HookBase
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.env import seed_all_rng
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import distill
from distill.config import student_config
from distill.data.cityscapes import register_cityscapes_semantic
from distill.data.shapes import SCENES_VERSION, SceneConfig
from distill.data.shapes_io import LAYOUTS
from distill.engine import Trainer, setup_config
from distill.errors import DistillError
from distill.weights import load_strictly

import demo_figure  # isort: skip  beside this file

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
COST = {"parameters": "M params", "gflops": "GFLOPs", "ms_per_image": "ms/image"}
SCENES = {"train": 1500, "val": 300}
# Simple enough to be learned in minutes: large, upright, calmly textured objects.
SCENE = SceneConfig(
    max_objects=4,
    min_size=0.25,
    max_distractors=2,
    noise=3.0,
    max_rotation=15.0,
    texture_contrast=0.4,
)
TIMED_IMAGES = 50
TABLE_WIDTH = 120  # characters; what a narrower terminal wraps is still whole
LEARNING_RATES = (3e-4, 1e-3, 3e-3)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run: a config, overrides, and the folder that they and the code determine."""

    name: str
    seed: int
    cfg: CfgNode
    folder: Path

    @property
    def weights(self) -> Path:
        return self.folder / "model_final.pth"

    @property
    def title(self) -> str:
        return f"{self.name} (seed {self.seed})"


class Demo:
    """Runs stages into ``out`` and remembers their results.

    Args:
        out: folder of everything that the demo writes.
        data_seed: of the rendered scenes; tuning uses another one than reporting.
        layout: of the data on disk: coco, for detection, or cityscapes, for semantic segmentation.
    """

    def __init__(self, out: Path, data_seed: int, progress: Progress, layout: str = "coco"):
        self.out = out
        self.data_seed = data_seed
        self.layout = layout
        scenes = hashlib.sha256(f"{SCENES}{SCENE}{SCENES_VERSION}".encode()).hexdigest()[:8]
        kind = "shapes" if layout == "coco" else layout
        self.data = out / f"{kind}-{data_seed}-{scenes}"
        self.progress = progress
        self.code = code_digest()

    def render(self) -> None:
        """Write the shapes data set; a finished split is kept."""
        for split, count in SCENES.items():
            task = self.progress.add_task(f"render {split}", total=count)
            LAYOUTS[self.layout](
                self.data,
                split,
                count,
                self.data_seed,
                SCENE,
                progress=functools.partial(self.progress.advance, task),
            )
            self.progress.update(task, completed=count)

    def stage(self, name: str, seed: int, config: str, *opts: Any) -> Stage:
        """Describe a run; its folder is keyed by a hash of config, data and code."""
        cfg = setup_config(
            str(ROOT / "configs" / "quick" / config),
            [*self._sets(), "SEED", seed, "OUTPUT_DIR", ".", *opts],
        ).clone()
        described = cfg.dump().replace(str(self.out), "OUT")
        digest = hashlib.sha256(f"{described}{self.code}".encode()).hexdigest()[:12]
        cfg.defrost()
        folder = self.out / "stages" / f"{name}-{seed}-{digest}"
        cfg.OUTPUT_DIR = str(folder)
        return Stage(name, seed, cfg, folder)

    def _sets(self) -> list[Any]:
        """KEY VALUE overrides that name the rendered data."""
        train, test = (f"demo_{self.data.name}_{split}" for split in SCENES)
        named = ["DATASETS.TRAIN", (train,), "DATASETS.TEST", (test,)]
        if self.layout == "cityscapes":
            for name, split in zip((train, test), SCENES):
                register_cityscapes_semantic(name, str(self.data), split)
            return named
        sets = [
            (
                name,
                str(self.data / "annotations" / f"instances_{split}.json"),
                str(self.data / "images" / split),
            )
            for name, split in zip((train, test), SCENES)
        ]
        return [*named, "DATASETS.COCO_FORMAT", sets]

    def run(self, stage: Stage) -> dict[str, float | None]:
        """Train and evaluate a stage, or read what an earlier run has measured."""
        result = stage.folder / "result.json"
        if result.is_file():
            task = self.progress.add_task(f"{stage.title}: reused", total=1)
            self.progress.advance(task)
            return json.loads(result.read_text())
        stage.folder.mkdir(parents=True, exist_ok=True)
        with quiet(stage.folder / "log.txt"):
            if not stage.weights.is_file():
                self._train(stage)
            metrics = self._evaluate(stage)
        temporary = result.with_suffix(".tmp")
        temporary.write_text(json.dumps(metrics, indent=1))
        temporary.replace(result)
        return metrics

    def _train(self, stage: Stage) -> None:
        cfg = stage.cfg.clone()
        cfg.DATASETS.TEST = ()
        seed_all_rng(stage.seed)
        task = self.progress.add_task(f"{stage.title}: train", total=cfg.SOLVER.MAX_ITER)
        trainer = Trainer(cfg, extra_hooks=[Bar(self.progress, task)])
        trainer.resume_or_load(resume=True)
        trainer.train()

    def _evaluate(self, stage: Stage) -> dict[str, float | None]:
        cfg = student_config(stage.cfg)
        model = build_model(cfg).eval()
        load_strictly(model, str(stage.weights), "the stage's checkpoint")
        name = cfg.DATASETS.TEST[0]
        loader = build_detection_test_loader(cfg, name)
        task = self.progress.add_task(f"{stage.title}: evaluate", total=len(loader))
        watched = WatchedLoader(loader, self.progress, task)
        results = inference_on_dataset(model, watched, Trainer.build_evaluator(cfg, name))
        return {**scores(results), **cost(model, loader)}


def scores(results: dict[str, dict[str, float]]) -> dict[str, float | None]:
    """The metrics of an evaluation: COCO's of boxes, those of masks as "mask AP", ..., or mIoU."""
    if "sem_seg" in results:
        return {"mIoU": results["sem_seg"]["mIoU_present"]}
    masks = finite(results["segm"]) if "segm" in results else {}
    return {**finite(results["bbox"]), **{f"mask {k}": v for k, v in masks.items()}}


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """COCO metrics without NaN, which is no JSON: AP is 0 for a model that detects nothing, AP of
    a size that no object has is None."""
    undefined = {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    return {k: v if math.isfinite(v := metrics[k]) else undefined.get(k) for k in METRICS}


class Bar(HookBase):
    """Advances a progress bar with the trainer."""

    def __init__(self, progress: Progress, task: Any):
        self.progress, self.task = progress, task

    def before_train(self) -> None:
        self.progress.update(self.task, completed=self.trainer.start_iter)

    def after_step(self) -> None:
        self.progress.advance(self.task)


class WatchedLoader:
    """A data loader that advances a progress bar."""

    def __init__(self, loader: Any, progress: Progress, task: Any):
        self.loader, self.progress, self.task = loader, progress, task

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        return iter(self.progress.track(self.loader, task_id=self.task))


@contextlib.contextmanager
def quiet(log: Path) -> Any:
    """Send detectron2's and pycocotools' output to a file; the bars stay."""
    handler = logging.FileHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    loggers = [logging.getLogger(n) for n in ("detectron2", "distill", "fvcore")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        with open(log, "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


@torch.no_grad()
def cost(model: nn.Module, loader: Any) -> dict[str, float]:
    """Millions of parameters, GFLOPs (multiply-adds, fvcore) and median ms of one picture."""
    inputs = [batch for batch, _ in zip(loader, range(TIMED_IMAGES))]
    seconds = []
    for batch in inputs:
        start = time.perf_counter()
        model(batch)
        seconds.append(time.perf_counter() - start)
    return {
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "gflops": FlopCountAnalysis(model, inputs[0]).total() / 1e9,
        "ms_per_image": sorted(seconds)[len(seconds) // 2] * 1e3,
    }


def code_digest() -> str:
    """Hash of the package's source, this file and the libraries' versions."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(json.dumps(versions()).encode())
    for path in sorted(Path(distill.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def random_teacher(demo: Demo, teacher: Stage) -> Path:
    """A checkpoint of the teacher's network that was never trained."""
    path = demo.out / "stages" / f"random-{teacher.folder.name}.pth"
    if not path.is_file():
        seed_all_rng(teacher.seed + 1_000)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        torch.save({"model": build_model(teacher.cfg).state_dict()}, temporary)
        temporary.replace(path)
    return path


def stages_of_seed(demo: Demo, seed: int, control: bool) -> list[Stage]:
    teacher = demo.stage("teacher", seed, "demo_teacher.yaml")
    stages = [teacher, demo.stage("baseline", seed, "demo_student.yaml")]
    key = "MODEL.DISTILL.TEACHER.WEIGHTS"
    config = str(ROOT / "configs" / "quick" / "demo_teacher.yaml")
    opts = ("MODEL.DISTILL.TEACHER.CONFIG_FILE", config)
    distilled = (*opts, key, str(teacher.weights))
    stages.append(demo.stage("distilled", seed, "demo_distilled.yaml", *distilled))
    if control:
        untrained = (*opts, key, str(random_teacher(demo, teacher)))
        stages.append(demo.stage("control", seed, "demo_distilled.yaml", *untrained))
    return stages


def report(demo: Demo, stages: list[Stage], seeds: list[int]) -> dict[str, Any]:
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
        "data_seed": demo.data_seed,
        "heads": list(stages[2].cfg.MODEL.DISTILL.HEADS),
        "learning_rate": solver.BASE_LR,
        "iterations": {s.name: s.cfg.SOLVER.MAX_ITER for s in stages},
        "batch": solver.IMS_PER_BATCH,
        "command": " ".join(["python", *sys.argv]),
        "threads": torch.get_num_threads(),
    }
    return {**results, "seeds": seeds, "commit": commit(), "versions": versions()}


def commit() -> str | None:
    """The checked-out commit, "+" if files differ from it; None outside git."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
        dirty = subprocess.check_output([*git, "status", "--porcelain"], text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if dirty else "")


def versions() -> dict[str, str]:
    import detectron2
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
        "distill": distill.__version__,
    }


def mean_std(values: Sequence[float | None], digits: int = 1) -> str:
    """Mean ± sample standard deviation, the only value, or "-" if a value is undefined."""
    if None in values:
        return "-"
    x = torch.tensor(values, dtype=torch.float64)
    mean = f"{x.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {x.std():.{digits}f}"


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
            pairs = zip(results["distilled"]["AP"], results[other]["AP"])
            gains = [None if None in pair else pair[0] - pair[1] for pair in pairs]
            console.print(f"distilled - {other}: {mean_std(gains)} AP")


def tune(demo: Demo, seeds: list[int], console: Console) -> dict[str, Any]:
    """The baseline's own best learning rate."""
    table = {
        str(lr): [
            demo.run(demo.stage("tuning", seed, "demo_student.yaml", "SOLVER.BASE_LR", lr))["AP"]
            for seed in seeds
        ]
        for lr in LEARNING_RATES
    }
    for lr, values in table.items():
        console.print(f"baseline at learning rate {lr}: {mean_std(values)} AP")
    return {"AP": table, "seeds": seeds, "data_seed": demo.data_seed, "commit": commit()}


def replicates(tune: bool, number: int) -> tuple[int, list[int]]:
    """Seed of the scenes and of each replicate: tuning sees others than what is reported."""
    data_seed, first = (0, 100) if tune else (1, 0)
    return data_seed, list(range(first, first + number))


def progress_bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1, help="number of replicates")
    parser.add_argument("--control", action="store_true", help="add the untrained teacher")
    parser.add_argument("--out", type=Path, default=Path("output/demo"))
    parser.add_argument(
        "--tune", action="store_true", help="instead: the baseline's learning rate, on other seeds"
    )
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    console = Console(file=sys.stdout)
    out = args.out.resolve()
    os.makedirs(out, exist_ok=True)
    data_seed, seeds = replicates(args.tune, args.seeds)
    with progress_bars(console) as progress:
        demo = Demo(out, data_seed, progress)
        demo.render()
        if args.tune:
            write_json(out / "tuning.json", tune(demo, seeds, console))
            return 0
        stages = [s for seed in seeds for s in stages_of_seed(demo, seed, args.control)]
        results = report(demo, stages, seeds)
    write_json(out / "results.json", results)
    print_table(results)
    demo_figure.draw(results, stages, out / "summary.png")
    console.print(f"wrote {out / 'results.json'} and {out / 'summary.png'}")
    return 0


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DistillError as e:
        sys.exit(f"error: {e}")

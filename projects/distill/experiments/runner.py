"""Training runs that are kept, for the demo, the ablations and the comparison of methods.

Config, code and data of a run determine its folder. So a finished run is reused, an interrupted
one continues from its checkpoint, and any other run starts anew.
"""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import logging
import math
import os
import statistics
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation import inference_on_dataset
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils.env import seed_all_rng
from rich.progress import TaskID
from torch import nn

from ..config import one_per_teacher, teacher_config
from ..config.detectron2_rules import leaves
from ..engine import Trainer, load_student
from ..evaluation.sliding_window import with_sliding_window
from ..utils.io import file_hash, write_json, write_text
from ..utils.progress import Progress
from ..utils.provenance import PACKAGE, versions

SECONDS, MEMORY, THREADS = COST = "seconds_per_step", "peak_memory_mb", "threads"
Result = dict[str, float | None]
"""Measurements of a run by name; None where a metric is undefined."""


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


# A cache changes no bit of a training; only its DTYPE may.
PLACES = ("MODEL.DISTILL.TEACHER.CACHE.DIR", "MODEL.DISTILL.TEACHER.CACHE.MAX_GB")


class Runner:
    """Runs stages into ``out`` and remembers their results.

    Args:
        out: folder of everything that a command writes.
        progress: shows what runs.
    """

    def __init__(self, out: Path, progress: Progress):
        self.out = out
        self.progress = progress
        self.code = code_digest()

    def describe(self, name: str, seed: int, cfg: CfgNode) -> Stage:
        """Describe a run, whose folder is named by a hash of config, code and the files it names.

        Data sets that detectron2 registers itself are hashed only by their names.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SEED, cfg.OUTPUT_DIR = seed, "."
        known = [x for x in leaves(cfg) if x[0] not in PLACES]
        described = repr(known)  # 25 times as fast as the yaml
        files = self._files(cfg)
        for one in one_per_teacher(cfg):
            if one.cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE:
                teacher = teacher_config(one.cfg)
                described += repr(list(leaves(teacher)))
                files += self._files(teacher)
        described = described.replace(str(self.out), "OUT") + files
        digest = hashlib.sha256(f"{described}{self.code}".encode()).hexdigest()[:12]
        folder = self.out / "stages" / f"{name}-{seed}-{digest}"
        cfg.OUTPUT_DIR = str(folder)
        return Stage(name, seed, cfg, folder)

    def _files(self, cfg: CfgNode) -> str:
        """Return hashes of the files that a config names, except those of other stages."""
        named = (x for _, value in leaves(cfg) for x in texts(value))
        parts = (part for x in named for part in (x, x.partition(":")[0]))  # file.py:function
        found = {x for x in parts if os.path.isfile(x)}
        own = str(self.out / "stages") + os.sep
        return "".join(f" {content_hash(x)}" for x in sorted(found) if not x.startswith(own))

    def run(self, stage: Stage) -> Result:
        """Train and evaluate a stage, or read the measurements of an earlier run."""
        result = stage.folder / "result.json"
        if result.is_file():
            self.progress.add_task(f"{stage.title}: reused", completed=1, total=1)
            return json.loads(result.read_text())
        stage.folder.mkdir(parents=True, exist_ok=True)
        write_text(stage.folder / "config.yaml", stage.cfg.dump())  # as detectron2's start does
        with quiet(stage.folder / "log.txt"):
            if not stage.weights.is_file():
                self._train(stage)
            model = load_student(stage.cfg, str(stage.weights)).eval()
            metrics = self.measure(stage, model)
        write_json(result, metrics)
        return metrics

    def _train(self, stage: Stage) -> None:
        cfg = without_evaluation(stage.cfg)
        gc.collect()  # frees an earlier run
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seed_all_rng(stage.seed)
        trainer = Trainer(cfg, extra_hooks=[ProgressHook(self.progress, f"{stage.title}: train")])
        trainer.resume_or_load(resume=True)
        trainer.train()

    def measure(self, stage: Stage, model: nn.Module) -> Result:
        """Return every metric of a run's evaluation, and its cost.

        Args:
            model: the trained student, without teacher and heads, in evaluation mode.
        """
        return {**flat(self.test(stage, model)), **training_cost(stage)}

    def test(self, stage: Stage, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Evaluate each of ``DATASETS.TEST``; return the results of detectron2's evaluators.

        With ``TEST.AUG`` there are also tasks with the suffix ``_TTA``.
        """
        cfg = stage.cfg
        networks = {"": with_sliding_window(cfg, model)}
        if cfg.TEST.AUG.ENABLED:
            networks["_TTA"] = GeneralizedRCNNWithTTA(cfg, model)
        results: dict[str, dict[str, Any]] = {name: {} for name in cfg.DATASETS.TEST}
        for name, found in results.items():
            for suffix, network in networks.items():
                loader = Trainer.build_test_loader(cfg, name)
                task = self.progress.add_task(f"{stage.title}: evaluate", total=len(loader))
                evaluator = Trainer.build_evaluator(
                    cfg, name, os.path.join(cfg.OUTPUT_DIR, f"inference{suffix}")
                )
                watched = WatchedLoader(loader, self.progress, task)
                metrics = inference_on_dataset(network, watched, evaluator)
                found.update({f"{kind}{suffix}": x for kind, x in metrics.items()})
        return results


def without_evaluation(cfg: CfgNode) -> CfgNode:
    """Return ``cfg`` without an evaluation in the training: the runner evaluates."""
    cfg = cfg.clone()
    cfg.DATASETS.TEST = ()
    cfg.TEST.BEST_METRIC, cfg.TEST.EXPECTED_RESULTS, cfg.SOLVER.PATIENCE = "", [], 0
    return cfg


def training_cost(stage: Stage) -> Result:
    """Read the median seconds of a step and the GPU's peak memory in MiB from a training's log.

    The memory is None on a CPU, where one process holds more than one training. Seconds of
    different numbers of threads are not compared.
    """
    # A value that not every step has, such as the accuracy of objects, may have its own row.
    rows = [json.loads(x) for x in (stage.folder / "metrics.json").read_text().splitlines()]
    seconds = [row["time"] for row in rows if "time" in row]
    cuda = stage.cfg.MODEL.DEVICE.startswith("cuda")
    return {
        SECONDS: statistics.median(seconds) if seconds else None,
        MEMORY: max(row["memory_mb"] for row in rows if "memory_mb" in row) if cuda else None,
        THREADS: torch.get_num_threads(),
    }


def flat(results: dict[str, dict[str, Any]]) -> Result:
    """Name metrics as the trainer logs them, such as "bbox/AP", with the test set if several."""
    (first, *others) = results.values()
    metrics = flatten_results_dict(results if others else first)
    return {k: finite(k.rpartition("/")[2], float(v)) for k, v in metrics.items()}


def finite(metric: str, value: float) -> float | None:
    """Replace NaN, which JSON lacks.

    COCO's AP is 0 for a model that detects nothing; AP of a size that no object has is None.
    """
    undefined = {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    return value if math.isfinite(value) else undefined.get(metric)


# ---- The display.


class ProgressHook(HookBase):
    """Shows the progress of a training."""

    def __init__(self, progress: Progress, title: str):
        self.progress, self.title = progress, title

    def before_train(self) -> None:
        done, total = self.trainer.start_iter, self.trainer.max_iter
        self.task = self.progress.add_task(self.title, completed=done, total=total)

    def after_step(self) -> None:
        self.progress.advance(self.task)


class WatchedLoader:
    """A data loader that shows the progress of its reading."""

    def __init__(self, loader: Any, progress: Progress, task: TaskID):
        self.loader, self.progress, self.task = loader, progress, task

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        return iter(self.progress.track(self.loader, task_id=self.task))


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Send the output of libraries and tracebacks to a file; the progress stays visible."""
    handler = logging.FileHandler(log)
    # As detectron2's log.txt, in which `distill report` finds the warnings.
    handler.setFormatter(
        logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S")
    )
    loggers = [logging.getLogger(n) for n in ("detectron2", "distill", "fvcore")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    # It warns of a call in detectron2.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    try:
        with open(log, "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
            try:
                yield
            except Exception:
                traceback.print_exc()
                raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


# ---- Dependencies of a run.


def code_digest() -> str:
    """Hash of the package's source, except the rooms that train nothing, and of the libraries."""
    digest = hashlib.sha256(json.dumps(versions()).encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        if room not in ("analysis", "cli.py", "doctor", "export", "report"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value of a config."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | dict):
        for x in value.values() if isinstance(value, dict) else value:
            yield from texts(x)


def content_hash(path: str) -> str:
    """Hash a file, which is read again only if it has changed."""
    state = os.stat(path)
    return _content_hash(path, state.st_mtime_ns, state.st_size)


@functools.cache
def _content_hash(path: str, *state: int) -> str:
    return file_hash(path)

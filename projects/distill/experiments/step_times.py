"""Seconds of training steps, measured in turn so that all share the machine's slow moments.

A step is that of a real training: it loads a batch, and ends with the optimizer.
"""

import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from ..engine import Trainer
from ..heads import first_phases
from ..utils.progress import Progress
from ..utils.timing import seconds
from .runner import quiet, without_evaluation

WARM_UP, TIMED = 3, 20  # steps


def step_seconds(cfgs: Mapping[str, CfgNode], log: Path, progress: Progress) -> dict[str, float]:
    """Return the median seconds of a step by training.

    All networks are in memory at once. Heads are measured after their first phases.

    Args:
        cfgs: configs of the trainings by name, with their seeds.
        log: file of what the libraries say.
        progress: shows the measurement.
    """
    with tempfile.TemporaryDirectory() as folder, quiet(log), ExitStack() as stack:
        trainers: dict[str, Trainer] = {}
        for name, cfg in cfgs.items():
            trainers[name] = _trainer(cfg, Path(folder) / str(len(trainers)))
            stack.callback(trainers[name]._trainer.close)
        storages = {name: EventStorage(trainer.iter) for name, trainer in trainers.items()}
        times: dict[str, list[float]] = {name: [] for name in cfgs}
        for _ in progress.track(range(WARM_UP + TIMED), description="measure steps"):
            for name, trainer in trainers.items():
                with storages[name]:
                    cuda = trainer.cfg.MODEL.DEVICE.startswith("cuda")
                    times[name].append(seconds(trainer.run_step, cuda))
    return {name: statistics.median(x[WARM_UP:]) for name, x in times.items()}


def _trainer(cfg: CfgNode, folder: Path) -> Trainer:
    """Return a trainer that is about to take the first step at which all heads have their cost."""
    cfg = without_evaluation(cfg)
    cfg.OUTPUT_DIR = str(folder)
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    late = max(first_phases(cfg).values(), default=0)
    trainer.iter = min(late, cfg.SOLVER.MAX_ITER - 1)
    return trainer

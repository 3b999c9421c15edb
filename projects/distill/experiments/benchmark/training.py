"""Seconds of a real training's steps: data, step and hooks."""

import tempfile
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from ...engine import Trainer
from ...utils.progress import Progress
from ...utils.timing import spread, timed
from ..runner import without_evaluation

WARM_UP = 3  # steps


def measure_training(cfg: CfgNode, number: int, progress: Progress) -> dict[str, dict[str, Any]]:
    """Return the spread of the ``seconds`` of each part of a training on the config's images.

    ``data`` is the wait for a batch, and ``step`` the rest of a step with its optimizer. ``hooks``
    are all hooks before and after it: schedules, averages, checks of the losses, logs. Their
    ``share`` of the steps is that of all seconds, because some hooks work in some steps only.
    Evaluations and checkpoints do not count.

    Args:
        number: steps, after a few that warm up.
    """
    cfg = without_evaluation(cfg)
    cuda = cfg.MODEL.DEVICE.startswith("cuda")
    times: dict[str, list[float]] = {"data": [], "step": [], "hooks": []}
    with tempfile.TemporaryDirectory() as folder:
        cfg.OUTPUT_DIR, cfg.SOLVER.CHECKPOINT_PERIOD = folder, WARM_UP + number + 1
        cfg.SOLVER.MAX_ITER = max(cfg.SOLVER.MAX_ITER, WARM_UP + number + 1)
        seed_all_rng(cfg.SEED)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        with EventStorage(0) as trainer.storage:
            trainer.before_train()
            for _ in progress.track(range(WARM_UP + number), description="training"):
                _, before = timed(trainer.before_step, cuda)
                _, whole = timed(trainer.run_step, cuda)
                data = trainer.storage.history("data_time").latest()
                _, after = timed(trainer.after_step, cuda)
                for part, value in zip(times.values(), (data, whole - data, before + after)):
                    part.append(value)
                trainer.iter += 1
        trainer._trainer.close()
    times = {part: x[WARM_UP:] for part, x in times.items()}
    rows: dict[str, dict[str, Any]] = {part: {"seconds": spread(x)} for part, x in times.items()}
    rows["hooks"]["share"] = sum(times["hooks"]) / sum(times["step"])
    return rows

"""Detections of finished runs: their errors by kind, and the bootstrap over the test images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from detectron2.config import CfgNode

from ..evaluation.coco_errors import CURVES, coco_evaluation, error_curves
from ..evaluation.coco_format import AnnotatedSet, load_results, open_set, read_results
from ..utils.progress import Progress
from .bootstrap import (
    IOUS,
    ClassMatches,
    ImageBootstrap,
    bootstrap_gains,
    class_matches,
    resamples,
)
from .runner import Stage

FILE = Path("inference", "coco_instances_results.json")  # written by detectron2's evaluator
RECALLS = np.linspace(0, 1, 101, dtype=np.float64)  # COCO's
TASK = "bbox/"


class Detections(NamedTuple):
    """Detected boxes of a run, compared with the annotations.

    Attributes:
        errors: area in percent below each of the :data:`CURVES`.
        matches: matches by class for the bootstrap.
    """

    errors: dict[str, float]
    matches: list[ClassMatches]


def problem(cfg: CfgNode, metric: str, stages: Sequence[Stage]) -> str:
    """Return one sentence that says why the detections cannot be analyzed; "" if they can."""
    if metric.removeprefix(TASK) not in IOUS or not metric.startswith(TASK):
        names = ", ".join(f"{TASK}{x}" for x in IOUS)
        return f"The metric is {metric}; only {names} are accumulated over resampled images."
    if len(cfg.DATASETS.TEST) > 1:
        return "There are several test sets, and only the detections of the last one are kept."
    missing = [stage.title for stage in stages if not (stage.folder / FILE).is_file()]
    return f"{missing[0]} has no file {FILE} in COCO's format." if missing else ""


def read_detections(
    cfg: CfgNode, metric: str, stages: Mapping[str, Sequence[Stage]], progress: Progress
) -> dict[str, list[Detections]]:
    """Return the detections of each run by arm, in the order of the seeds."""
    (name,) = cfg.DATASETS.TEST
    data = open_set(cfg, name)
    total = sum(map(len, stages.values()))
    task = progress.add_task("analyze detections", total=total)
    found: dict[str, list[Detections]] = {name: [] for name in stages}
    for arm, runs in stages.items():
        for stage in runs:
            found[arm].append(_of_run(data, stage.folder / FILE, metric))
            progress.advance(task)
    return found


def _of_run(data: AnnotatedSet, path: Path, metric: str) -> Detections:
    results = load_results(data.truth, read_results(str(path)), f"'{path}'")
    evaluation = coco_evaluation(data.truth, results, data.max_detections)
    areas = 100 * np.nanmean(error_curves(evaluation).mean(1), axis=1)
    matches = class_matches(evaluation, metric.removeprefix(TASK))
    return Detections(dict(zip(CURVES, areas.tolist())), matches)


def image_bootstrap(
    found: Mapping[str, Sequence[Detections]],
    reference: str,
    number: int,
    progress: Progress,
) -> dict[str, ImageBootstrap]:
    """Return the bootstrap of the gain of ``reference`` over each other arm.

    Args:
        number: number of resamples. Their seed is fixed, so the result can be repeated.
    """
    runs = {name: [x.matches for x in arm] for name, arm in found.items()}
    images = len(runs[reference][0][0].objects)
    drawn = progress.track(
        resamples(images, number, seed=0), total=number, description="resample images"
    )
    return bootstrap_gains(runs, reference, RECALLS, drawn)

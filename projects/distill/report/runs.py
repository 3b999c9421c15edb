"""Content of a run's ``OUTPUT_DIR``: its metrics, config and log."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

from ..errors import ConfigError, DataError
from ..utils.text import clause
from .log import Log, read_log

# The metric of a task. The first that an evaluation has counts: an instance segmenter has AP of
# boxes, too.
MAIN_METRICS = ("panoptic_seg/PQ", "segm/AP", "bbox/AP", "sem_seg/mIoU", "sem_seg/mIoU_present")
# Words for the tasks of evaluators.
TASKS = {
    "panoptic_seg": "panoptic",
    "segm": "mask",
    "bbox": "box",
    "keypoints": "keypoint",
    "sem_seg": "semantic",
    "kitti": "KITTI",
}
# Overall metrics in the order of their importance; others follow.
ORDER = (
    *("PQ", "SQ", "RQ", "AP", "AP50", "AP75", "APs", "APm", "APl", "mIoU", "mIoU_present", "IoU"),
    *("fwIoU", "mACC", "pACC", "AR", "AR50", "AR75", "ARs", "ARm", "ARl"),
)
CONFIGS = ("config.yaml", "student.yaml")  # the first has all keys of the training
RESULT = "result.json"  # metrics of a run of `distill compare`, which evaluates after the training
TEACHER = "report_teacher.json"  # the teacher's detections, see TeacherDetections
RATIO, FACTOR, COSINE = "kd_ratio/", "kd_factor/", "kd_cosine/"
Row = dict[str, float]


class Metric(NamedTuple):
    """Name of a metric in parts.

    Attributes:
        task: such as "bbox"; with several test sets, the set's name stands before it.
        name: such as "AP", or "AP-person" for one class.
    """

    task: str
    name: str

    @property
    def full(self) -> str:
        return f"{self.task}/{self.name}"

    @property
    def task_title(self) -> str:
        """The task in words, such as "box"."""
        before, _, task = self.task.rpartition("/")
        return f"{before} {TASKS.get(task, task)}".strip()

    @property
    def title(self) -> str:
        """The name in words, such as "box AP"."""
        return f"{self.task_title} {self.name}"

    @property
    def of_class(self) -> bool:
        return "-" in self.name


class Cost(NamedTuple):
    """Cost of a training; None where it is not logged.

    Attributes:
        seconds: median seconds of an iteration.
        images: median images per second.
        data_share: median share of the time that is spent waiting for data.
        memory: peak memory in MiB: of the GPU, or of the process.
    """

    seconds: float | None
    images: float | None
    data_share: float | None
    memory: float | None


@dataclass(frozen=True)
class Run:
    """A run, finished or not.

    Attributes:
        name: title of the run.
        folder: its OUTPUT_DIR.
        rows: rows of its ``metrics.json`` by iteration, rising; only finite values.
        config: values of its config by dotted name; empty if it left none.
        log: content of its log.
    """

    name: str
    folder: Path
    rows: Mapping[int, Row]
    config: Mapping[str, Any]
    log: Log

    def series(self, key: str) -> dict[int, float]:
        """Return the values of a scalar by iteration."""
        return {k: row[key] for k, row in self.rows.items() if key in row}

    @cached_property
    def keys(self) -> list[str]:
        """Names of all scalars, in alphabetical order."""
        return sorted({key for row in self.rows.values() for key in row})

    @cached_property
    def heads(self) -> list[str]:
        """Names of the distillation heads, in small letters."""
        return sorted({x.split("/")[1] for x in self.keys if x.startswith(RATIO)})

    def losses(self, head: str | None = None) -> list[str]:
        """Return the names of the losses of a head, or of the task if it is None."""
        owner = {x: x.split("/")[0].removeprefix("loss_") for x in self.keys if x[:5] == "loss_"}
        return [x for x, own in owner.items() if (own if own in self.heads else None) == head]

    @cached_property
    def metrics(self) -> list[Metric]:
        """Names of the metrics of its evaluations, the most important first."""
        found = [x for x in map(parsed_metric, self.keys) if x]
        places = {name: k for k, name in enumerate(ORDER)}
        return sorted(found, key=lambda x: (x.task, places.get(x.name, len(places))))

    @property
    def last(self) -> int:
        """Last logged iteration, -1 if there is no row."""
        return max(self.rows, default=-1)

    @property
    def max_iter(self) -> int | None:
        """Length of the training, None if it is unknown."""
        number = self.config.get("SOLVER.MAX_ITER")
        return number if isinstance(number, int) else None

    @cached_property
    def cost(self) -> Cost:
        seconds, images, data_share = (
            median(values) if (values := self.series(key).values()) else None
            for key in ("time", "images_per_second", "data_share")
        )
        memory = max(self.series("memory_mb").values(), default=None)
        return Cost(seconds, images, data_share, memory)


def parsed_metric(key: str) -> Metric | None:
    """Return the parts of a metric's name, or None for another scalar."""
    parts = key.split("/")
    for k, part in enumerate(parts[:-1]):
        if part.removesuffix("_TTA") in TASKS:
            return Metric("/".join(parts[: k + 1]), "/".join(parts[k + 1 :]))
    return None


def main_metric(runs: Sequence[Run]) -> Metric | None:
    """Return the metric to judge runs by: ``TEST.BEST_METRIC``, or that of the task.

    The last run that has such a metric decides. None if there is no such run.
    """
    for run in reversed(runs):
        for wanted in (run.config.get("TEST.BEST_METRIC") or "-", *MAIN_METRICS):
            for metric in run.metrics:
                if f"/{metric.full}".endswith(f"/{wanted}"):
                    return metric
    return None


def read_run(folder: Path, name: str, newest: tuple[int, Row] | None = None) -> Run:
    """Read a run.

    Args:
        folder: its OUTPUT_DIR.
        name: title of the run.
        newest: an iteration and its scalars that ``metrics.json`` may not have yet.

    Raises:
        ConfigError: there is no run in the folder.
        DataError: a file of it cannot be read.
    """
    path = folder / "metrics.json"
    if not path.is_file() and not newest:
        raise ConfigError(f"'{folder}' has no metrics.json; name the OUTPUT_DIR of a training.")
    rows = _read_rows(path)
    if newest:
        rows[newest[0]] = {**rows.get(newest[0], {}), **_finite(newest[1])}
    result = folder / RESULT
    if result.is_file() and rows:
        rows[max(rows)] = {**_finite(_read_json(result)), **rows[max(rows)]}
    return Run(
        name, folder, dict(sorted(rows.items())), _read_config(folder), read_log(folder / "log.txt")
    )


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell the folders apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _read_rows(path: Path) -> dict[int, Row]:
    """Return the rows by iteration.

    Rows after the iteration at which a training has started again are of an earlier one. The last
    row may be incomplete, because the training is writing it.
    """
    rows: dict[int, Row] = {}
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            iteration = int(row["iteration"])
        except (ValueError, TypeError, KeyError) as e:
            if number == len(lines):
                break
            raise DataError(f"'{path}', line {number}, is no row of metrics: {clause(e)}.") from e
        if iteration < max(rows, default=-1):
            rows = {k: x for k, x in rows.items() if k < iteration}
        rows[iteration] = {**rows.get(iteration, {}), **_finite(row)}
    return rows


def _finite(row: Any) -> Row:
    return {
        str(key): float(x)
        for key, x in row.items()
        if isinstance(x, int | float) and math.isfinite(x)
    }


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"'{path}' cannot be read: {clause(e)}.") from e


def _read_config(folder: Path) -> dict[str, Any]:
    path = next((folder / x for x in CONFIGS if (folder / x).is_file()), None)
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise DataError(f"'{path}' cannot be read: {clause(e)}.") from e
    return dict(_leaves(content)) if isinstance(content, dict) else {}


def _leaves(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

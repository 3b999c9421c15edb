"""Trackers of experiments: Weights & Biases, MLflow and Trackio, by ``TRACKERS``.

Each is configured by its own environment variables, such as ``WANDB_MODE`` and
``MLFLOW_TRACKING_URI``. Its package is imported when the first scalars are written.
"""

import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage
from numpy.typing import NDArray

from ..config.detectron2_rules import leaves
from ..errors import ConfigError
from ..utils.io import write_text
from ..utils.text import clause
from .telemetry import take_new

logger = logging.getLogger(__name__)

PROJECT = "distill"  # where an environment variable names no other one
LONGEST_PARAM = 500  # characters, which every version of MLflow stores

Values = Mapping[str, Any]
Pixels = NDArray[np.uint8]
"""(H, W, 3) RGB."""


class TrackerRun:
    """Run of a tracker.

    Args:
        name: name to show, the last part of ``OUTPUT_DIR``.
        folder: ``OUTPUT_DIR``.
        config: values of the config by dotted name.
        id: id of the run to continue, or "" for a new one.

    Attributes:
        package: name of the package, to import and to install.
        id: id by which a resumed training continues the run.
    """

    package: str
    id: str

    def __init__(self, name: str, folder: str, config: Values, id: str = ""):
        raise NotImplementedError

    def log(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Send the scalars of an iteration."""
        raise NotImplementedError

    def log_image(self, iteration: int, name: str, image: Pixels) -> None:
        """Send an image."""
        raise NotImplementedError

    def finish(self) -> None:
        """End the run, after all is sent."""
        raise NotImplementedError


class WandbRun(TrackerRun):
    """Run of Weights & Biases, whose files are in ``OUTPUT_DIR/wandb``."""

    package = "wandb"

    def __init__(self, name: str, folder: str, config: Values, id: str = ""):
        import wandb

        self.wandb: ModuleType = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            dir=folder,
            config=dict(config),
            id=id or None,
            resume="allow",
        )
        self.id = self.run.id
        # Its own steps must rise, but a resumed training repeats the last iterations.
        self.run.define_metric("iteration")
        self.run.define_metric("*", step_metric="iteration")

    def log(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self.run.log({"iteration": iteration, **scalars})

    def log_image(self, iteration: int, name: str, image: Pixels) -> None:
        self.run.log({"iteration": iteration, name: self.wandb.Image(image)})

    def finish(self) -> None:
        self.run.finish()


class MLflowRun(TrackerRun):
    """Run of MLflow."""

    package = "mlflow"

    def __init__(self, name: str, folder: str, config: Values, id: str = ""):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # 7 would take minutes
        import mlflow

        self.mlflow: ModuleType = mlflow
        self.id = mlflow.start_run(run_id=id or None, run_name=name).info.run_id
        if not id:  # parameters of a run never change
            mlflow.log_params({k: str(x)[:LONGEST_PARAM] for k, x in config.items()})

    def log(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self.mlflow.log_metrics({_plain(k): x for k, x in scalars.items()}, step=iteration)

    def log_image(self, iteration: int, name: str, image: Pixels) -> None:
        self.mlflow.log_image(image, key=_plain(name), step=iteration)

    def finish(self) -> None:
        self.mlflow.end_run()


def _plain(name: str) -> str:
    """Replace characters that MLflow does not allow, which names of classes may have."""
    return re.sub(r"[^\w\-. /]", "_", name)


class TrackioRun(TrackerRun):
    """Run of Trackio, which identifies it by its name."""

    package = "trackio"

    def __init__(self, name: str, folder: str, config: Values, id: str = ""):
        import trackio

        self.trackio: ModuleType = trackio
        self.id = id or f"{name}-{secrets.token_hex(3)}"  # two trainings may have the same seed
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self.id,
            config=dict(config),
            resume="allow",
            embed=False,
        )

    def log(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self.trackio.log(dict(scalars), step=iteration)

    def log_image(self, iteration: int, name: str, image: Pixels) -> None:
        self.trackio.log({name: self.trackio.Image(image)}, step=iteration)

    def finish(self) -> None:
        self.trackio.finish()


RUNS: dict[str, type[TrackerRun]] = {"wandb": WandbRun, "mlflow": MLflowRun, "trackio": TrackioRun}


def check_installed(cfg: CfgNode) -> None:
    """Raise an error before the training if the package of a tracker is missing.

    Raises:
        ConfigError: it says what to install.
    """
    for name in cfg.TRACKERS:
        package = RUNS[name].package
        if find_spec(package) is None:
            raise ConfigError(
                f"TRACKERS has '{name}', but its package is not installed; run `pip install "
                f"{package}`, or leave it out."
            )


class TrackerWriter(EventWriter):
    """Writer of scalars and images to a tracker.

    An error of the tracker, such as one of the network, is a warning. Nothing more is sent then,
    and the training goes on. This writer must come before detectron2's for TensorBoard, which
    removes images from the event storage.

    Args:
        name: one of :data:`RUNS`.
        cfg: the whole config, which the run has as its parameters.
        resumed: function that returns True if the training continues an earlier one.
        window_size: iterations of the median of scalars, as in detectron2's writers.
    """

    def __init__(self, name: str, cfg: CfgNode, resumed: Callable[[], bool], window_size: int = 20):
        self.name = name
        self.cfg = cfg
        self.resumed = resumed
        self.window_size = window_size
        self.failed = False
        self._run: TrackerRun | None = None
        self._written: dict[str, int] = {}

    def write(self) -> None:
        if self.failed:
            return
        storage = get_event_storage()
        scalars = storage.latest_with_smoothing_hint(self.window_size)
        new = take_new(scalars, self._written)
        with self._harmless():
            self._run = self._run or self._start()
            for iteration in sorted(set(new.values())):
                row = {k: scalars[k][0] for k, at in new.items() if at == iteration}
                self._run.log(iteration, row)
            for name, image, iteration in storage._vis_data:
                self._run.log_image(iteration, name, _pixels(image))

    def close(self) -> None:
        if self._run and not self.failed:
            with self._harmless():
                self._run.finish()

    def _start(self) -> TrackerRun:
        folder = self.cfg.OUTPUT_DIR
        path = os.path.join(folder, f"{self.name}_run_id.txt")
        id = ""
        if self.resumed() and os.path.isfile(path):
            with open(path, encoding="utf-8") as f:
                id = f.read().strip()
        name = os.path.basename(os.path.abspath(folder))
        values = {k: list(x) if isinstance(x, tuple) else x for k, x in leaves(self.cfg)}
        run = RUNS[self.name](name, folder, values, id)
        write_text(path, f"{run.id}\n")
        return run

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Turn the first error into a warning."""
        try:
            yield
        except Exception as e:  # packages of others may raise anything
            self.failed = True
            logger.warning(
                "TRACKERS: %s failed, so nothing more is sent to it and the training goes on; "
                "%s: %s",
                *(self.name, type(e).__name__, clause(e)),
            )


def _pixels(image: Any) -> Pixels:
    """Return (H, W, 3) pixels of an image in the event storage, which is (3, H, W)."""
    pixels = np.asarray(image).transpose(1, 2, 0)
    if pixels.dtype != np.uint8:  # numbers from 0 to 1
        pixels = (pixels * 255).round().clip(0, 255).astype(np.uint8)
    return pixels

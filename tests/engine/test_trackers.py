"""Test the writers for experiment trackers, with a fake and in the trackers' offline modes."""

import logging
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.config import validate_config
from distill.engine import trackers
from distill.engine.trackers import MLflowRun, TrackerRun, TrackerWriter, check_installed
from distill.errors import ConfigError
from distill.launch.main import main
from tests.support.networks import tiny_cfg, write_config
from tests.support.trainings import differences, train, trainable_cfg

Shapes = tuple[str, str, str]
IMAGE = np.full((3, 4, 5), 9, np.uint8)


class FakeRun(TrackerRun):
    """Keeps what it gets; may fail in a method."""

    package = "json"
    runs: ClassVar[list["FakeRun"]] = []
    failing = ""

    def __init__(self, name: str, folder: str, config: Mapping[str, Any], id: str = ""):
        self.runs.append(self)
        self.name, self.config, self.given = name, config, id
        self.id = id or f"run {len(self.runs)}"
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[int, str, Any]] = []
        self.finished = False
        self._do("start")

    def _do(self, what: str) -> None:
        if what == self.failing:
            raise ConnectionError(f"no network to {what}")

    def log(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._do("log")
        self.rows.append((iteration, dict(scalars)))

    def log_image(self, iteration: int, name: str, image: Any) -> None:
        self._do("log_image")
        self.images.append((iteration, name, image))

    def finish(self) -> None:
        self._do("finish")
        self.finished = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeRun]:
    monkeypatch.setattr(FakeRun, "runs", [])
    monkeypatch.setattr(FakeRun, "failing", "")
    monkeypatch.setitem(trackers.RUNS, "wandb", FakeRun)
    return FakeRun


def config(folder: Path, *names: str) -> CfgNode:
    return tiny_cfg("faster", "OUTPUT_DIR", str(folder), "TRACKERS", names)


def write(writer: TrackerWriter, start: int = 0) -> None:
    """Write three iterations, with an image and an evaluation in the last one."""
    with EventStorage(start) as storage:
        for k in range(3):
            storage.put_scalar("loss", float(k))
            if k == 2:
                writer.write()
                storage.put_scalar("bbox/AP-a b", 5.0, smoothing_hint=False)
                storage.put_image("predictions/own", IMAGE)
            storage.step()
        writer.write()
        storage.clear_images()
        writer.write()
        writer.close()


def test_scalars_images_and_config(fake: type[FakeRun], tmp_path: Path) -> None:
    """Each scalar comes once, also one that is later than the row of its iteration."""
    writer = TrackerWriter("wandb", config(tmp_path / "night", "wandb"), lambda: False)
    assert not fake.runs  # a dry run starts no run
    write(writer)
    (run,) = fake.runs
    assert run.rows == [(2, {"loss": 1.0}), (2, {"bbox/AP-a b": 5.0})] and run.finished
    ((iteration, name, image),) = run.images
    assert (iteration, name) == (2, "predictions/own")
    assert image.shape == (4, 5, 3) and (image == 9).all()
    assert (
        run.name == "night"
        and run.config["SOLVER.MAX_ITER"]
        and run.config["TRACKERS"] == ["wandb"]
    )


def test_pixels_may_be_fractions() -> None:
    image = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1).expand(3, 2, 2)
    assert trackers._pixels(image)[0, 0].tolist() == [0, 128, 255]


def test_a_resumed_training_continues_its_run(fake: type[FakeRun], tmp_path: Path) -> None:
    for resumed in (True, False, True, True):
        write(TrackerWriter("wandb", config(tmp_path, "wandb"), lambda: resumed))  # noqa: B023
    assert [x.given for x in fake.runs] == ["", "", "run 2", "run 2"]


@pytest.mark.parametrize("what", ["start", "log", "log_image", "finish"])
def test_a_tracker_that_fails(
    what: str, fake: type[FakeRun], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake.failing = what
    with caplog.at_level(logging.WARNING):
        write(TrackerWriter("wandb", config(tmp_path, "wandb"), lambda: False))
    (line,) = [x.getMessage() for x in caplog.records]
    assert line.startswith("TRACKERS: wandb failed") and f"no network to {what}" in line
    assert len(fake.runs) == 1


def test_names_and_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cfg = config(tmp_path, "wandbe")
    with pytest.raises(ConfigError, match="TRACKERS: unknown value 'wandbe'; did you mean wandb"):
        validate_config(cfg, training=False)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"TRACKERS has 'mlflow', but its .* `pip install mlflow`"
    ):
        check_installed(config(tmp_path, "mlflow"))
    check_installed(config(tmp_path))


@pytest.mark.e2e
def test_a_missing_package_ends_a_training_at_its_start(
    shapes: Shapes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    cfg = trainable_cfg("faster", shapes, tmp_path / "out", "TRACKERS", ("trackio",))
    assert main(["--config-file", str(write_config(cfg, tmp_path / "config.yaml"))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: TRACKERS has 'trackio'") and "pip install trackio" in line


@pytest.mark.slow
@pytest.mark.e2e
def test_a_training_with_a_tracker(fake: type[FakeRun], shapes: Shapes, tmp_path: Path) -> None:
    """The student has the same bits as without trackers and images."""
    states = []
    short = ("SOLVER.MAX_ITER", 2, "DATASETS.TEST", (shapes[0],), "TEST.EVAL_PERIOD", 1, "SEED", 3)
    for name, opts in {
        "plain": ("TEST.VIS_IMAGES", 0),
        "tracked": ("TEST.VIS_IMAGES", 2, "TRACKERS", ("wandb",)),
    }.items():
        cfg = trainable_cfg("faster", shapes, tmp_path / name, *short, *opts)
        states.append(train(cfg)["model"])
    assert not differences(*states)
    (run,) = fake.runs
    scalars = {name for _, row in run.rows for name in row}
    assert {"total_loss", "lr", "bbox/AP"} <= scalars and run.finished
    assert [(at, name) for at, name, _ in run.images] == [
        (k, f"predictions/{shapes[0]}") for k in (0, 1)
    ]
    for name, drawn in (("plain", []), ("tracked", [f"predictions/{shapes[0]}"])):
        events = EventAccumulator(str(tmp_path / name))
        events.Reload()
        assert events.Tags()["images"] == drawn


# ---- The trackers themselves, without network.


def run_twice(name: str, folder: Path) -> str:
    """Write as a training and as its resumption; return the id of the run."""
    for start in (0, 3):
        writer = TrackerWriter(name, config(folder / "night", name), lambda: start > 0)  # noqa: B023
        write(writer, start)
        assert not writer.failed
    return (folder / "night" / f"{name}_run_id.txt").read_text().strip()


@pytest.mark.slow
@pytest.mark.e2e
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    id = run_twice("wandb", tmp_path)
    runs = [*(tmp_path / "night" / "wandb").glob(f"offline-run-*-{id}")]
    assert len(runs) == 2 and all([*x.rglob("*.png")] for x in runs)


@pytest.mark.slow
@pytest.mark.e2e
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the small package has no data base
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    id = run_twice("mlflow", tmp_path)
    client = mlflow.MlflowClient()
    run = client.get_run(id)
    assert run.info.status == "FINISHED" and run.info.run_name == "night"
    assert run.data.params["MODEL.DEVICE"] == "cpu"
    assert [x.step for x in client.get_metric_history(id, "loss")] == [2, 5]
    assert run.data.metrics["bbox/AP-a b"] == 5
    assert len([x for x in client.list_artifacts(id, "images") if x.path.endswith(".png")]) == 2
    assert not [*Path(".").glob("mlruns")]


@pytest.mark.slow
@pytest.mark.e2e
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read by the import
    pytest.importorskip("trackio")
    id = run_twice("trackio", tmp_path)
    with sqlite3.connect(tmp_path / "trackio" / "distill.db") as base:
        rows = base.execute("SELECT step, metrics FROM metrics WHERE run_name = ?", (id,))
        found = rows.fetchall()
    assert sorted({step for step, _ in found}) == [2, 5]
    assert sum("loss" in str(row) for _, row in found) == 2
    assert len([*(tmp_path / "trackio" / "media").rglob("*.png")]) == 2


def test_mlflow_names() -> None:
    assert trackers._plain("bbox/AP-a (b): é") == "bbox/AP-a _b__ é"
    assert MLflowRun.package == "mlflow"

"""Fixtures of every test, and the checks of its marks.

A test that starts a Python process or runs a trainer is marked ``e2e``, which is enforced. A test
that takes more than a second of CPU is marked ``slow``, and a missing mark is reported.
"""

import logging
import multiprocessing.process
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

# torch and detectron2 are imported where they are used. The first process of pytest-xdist only
# hands out the tests; it would load them before it starts the others.
if TYPE_CHECKING:
    from detectron2.utils.events import EventStorage

    from tests.support.trainings import Shapes, Shared

SLOW = 1.0  # seconds of CPU
FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    from detectron2.engine import TrainerBase

    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("e2e") is None:
            forbid(patch, subprocess.Popen, "__init__", lambda *x: sys.executable in str(x[:1]))
            forbid(patch, multiprocessing.process.BaseProcess, "start")
            forbid(patch, TrainerBase, "train")
        return (yield)


def forbid(
    patch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    when: Callable[..., bool] = lambda *args: True,
) -> None:
    """Let a test fail that calls a method with such arguments."""
    method = getattr(owner, name)

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if when(*args):
            pytest.fail(f"{owner.__name__}.{name} is called: mark the test `e2e`", pytrace=False)
        return method(self, *args, **kwargs)

    patch.setattr(owner, name, checked)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    start = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        item.user_properties.append(("cpu seconds", sum(os.times()[:4]) - start))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.getreports("passed"):
        seconds = dict(report.user_properties).get("cpu seconds", 0)
        quick = report.when == "call" and not report.keywords.keys() & {"e2e", "slow"}
        if quick and seconds > SLOW:
            terminalreporter.line(f"{seconds:.1f} s of CPU, mark it `slow`: {report.nodeid}")


@pytest.fixture
def tmp_path(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Empty pytest's folder after a test that passes: checkpoints are large.

    The empty folder stays, because pytest would use its name again. detectron2 remembers names of
    data sets and log files for the whole process, so a later test would meet those of an earlier.
    """
    yield tmp_path
    if not request.node.stash.get(FAILED, False):
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir(exist_ok=True)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> "Shared":
    """Returns the folder of a name, which the first worker that asks for it fills.

    The others wait for its lock, instead of training the same once more.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # all workers share it

    def folder(name: str, fill: Callable[[Path], object]) -> Path:
        path, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                path.mkdir(exist_ok=True)
                fill(path)
                done.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def shapes(shared: "Shared") -> "Shapes":
    """A ``DATASETS.COCO_FORMAT`` triple: six scenes of 64 px with eight classes."""
    from distill.data.shapes import SceneConfig, write_coco

    scenes = SceneConfig(height=64, width=64, min_size=0.25)
    root = shared("shapes", lambda folder: write_coco(folder, "train", 6, config=scenes))
    annotations = root / "annotations" / "instances_train.json"
    return ("shapes_tiny", str(annotations), str(root / "images" / "train"))


@pytest.fixture
def storage() -> Iterator["EventStorage"]:
    """detectron2's networks log to the event storage while they train."""
    from detectron2.utils.events import EventStorage

    with EventStorage() as events:
        yield events


@pytest.fixture
def catalogues() -> Iterator[None]:
    """Remove the data sets that a test registers."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(autouse=True)
def _log_handlers() -> Iterator[None]:
    """Trainers add handlers on the stdout of their test, which the next test no longer has."""
    yield
    for name in ("detectron2", "fvcore", "distill"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


@pytest.fixture(autouse=True)
def _threads() -> None:
    import torch

    torch.set_num_threads(1)  # two threads of busy cores wait for each other up to 100 x longer

"""Test that a full disk ends a run with one sentence, and that --resume continues later."""

import random
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .child import Place, fill, limit_files
from .ledger import Ledger
from .runs import Reference, Training, places_by_stage, small_disk

SEED = 0
DISK = 16  # MiB; a run needs a third of it


def can_mount(folder: Path) -> bool:
    try:
        with small_disk(folder / "trial", 1):
            return True
    except (AssertionError, OSError):
        return False


class Disk(NamedTuple):
    """Training on a small disk."""

    training: Training
    reference: Reference

    def case(
        self, folder: Path, *opts: Any, free: int = DISK << 20, place: Place | None = None
    ) -> None:
        """Fill the disk, free it, and resume the run.

        Args:
            folder: folder of the case.
            opts: KEY VALUE overrides.
            free: free bytes at the start.
            place: step before which the rest of the disk is filled.
        """
        output = folder / "disk" / "output"
        with small_disk(output.parent, DISK) as (holder, disk):
            fill(disk, free)
            act = partial(fill, output.parent)
            child = self.training.start(
                output, *opts, place=place, act=act, disk=holder, log=folder / "full"
            )
            assert "no space left" in child.sentence().lower()
            if (disk / "output").exists():
                self.reference.check_intact(disk / "output")
            (disk / "ballast").unlink()
            self.training.finish(output, *opts, resume=True, disk=holder, log=folder / "resumed")
            self.reference.check_recovered(disk / "output")


@pytest.fixture
def disk(training: Training, reference: Reference, tmp_path: Path) -> Disk:
    if not can_mount(tmp_path):
        pytest.skip("there are no user namespaces here, in which to mount a small disk")
    return Disk(training, reference)


def test_little_room(disk: Disk, ledger: Ledger, tmp_path: Path) -> None:
    """The disk becomes full at different times, from the first file to the last checkpoint."""
    generator = random.Random(SEED)
    rooms = sorted(generator.randrange(disk.reference.bytes) for _ in range(12))
    cases = {f"{x} bytes": partial(disk.case, free=x) for x in [0, 4096, 8192, *rooms]}
    ledger.inject("full disk: little room from the start", cases, tmp_path)


def test_steps_of_writing(disk: Disk, ledger: Ledger, tmp_path: Path) -> None:
    """The disk is full from a new file on, or in the middle of a checkpoint."""
    cases = {
        f"{stage} {name}": partial(disk.case, place=place)
        for stage, places in places_by_stage(disk.reference.steps).items()
        for name, place in places.items()
        if place[0] == "open" or (place[0] == "write" and stage == "inside torch.save")
    }
    ledger.inject("full disk: at a step of writing a checkpoint", cases, tmp_path)


def test_metrics(disk: Disk, ledger: Ledger, tmp_path: Path) -> None:
    """Without periodic checkpoints, the disk is full for metrics.json or TensorBoard."""
    opts = ("SOLVER.CHECKPOINT_PERIOD", 100, "TEST.EVAL_PERIOD", 0)
    rare = disk._replace(reference=Reference(disk.training, tmp_path / "reference", *opts))
    cases = {
        f"row {k}": lambda folder, k=k: rare.case(folder, *opts, place=("fsync", "metrics.json", k))
        for k in range(5)
    }
    ledger.inject("full disk: while metrics are written", cases, tmp_path)


def test_limited_files(
    training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    """The size of files is limited, as by a quota; this needs no small disk."""

    def case(name: str, folder: Path) -> None:
        output = folder / "output"
        act = partial(limit_files, 200_000)
        child = training.start(output, place=("open", f"{name}.pth.tmp", 0), act=act)
        assert "File too large" in child.sentence()
        reference.check_intact(output)
        training.finish(output, resume=True)
        reference.check_recovered(output)

    names = ("model_0000001", "model_best", "model_0000007", "model_final")
    cases = {name: partial(case, name) for name in names}
    ledger.inject("file size limit while a checkpoint is written", cases, tmp_path)

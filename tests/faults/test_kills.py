"""Test SIGKILL at random moments, at every step of writing a checkpoint, and repeatedly."""

import random
import re
import time
from functools import partial
from pathlib import Path

import pytest

from .child import Place, kill, kill_a_worker
from .ledger import Ledger
from .runs import (
    CHECKPOINT_PERIOD,
    ITERATIONS,
    STAGES,
    Child,
    Reference,
    Training,
    metrics,
    places_by_stage,
    survivors,
)

SEED = 0
WORKERS = {0: 12, 2: 6, 3: 6}  # kills at random moments, by number of data workers
KILLED = -9


def kill_after(child: Child, seconds: float) -> bool:
    """Kill a process after some seconds, and return False if it had ended before."""
    child.process.join(seconds)
    child.process.kill()
    return child.wait() == KILLED


@pytest.mark.parametrize("workers", WORKERS)
def test_random_moments(
    workers: int, training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    opts = ("DATALOADER.NUM_WORKERS", workers)
    started = time.monotonic()
    training.finish(tmp_path / "measured", *opts)
    duration = time.monotonic() - started

    def case(moment: float, folder: Path) -> None:
        output = folder / "output"
        while not kill_after(training.start(output, *opts), moment * duration):
            moment *= 0.7  # the run was faster than the measured one
            output = folder / f"output{moment}"
        if output.exists():
            reference.check_intact(output)
        training.finish(output, *opts, resume=True)
        reference.check_recovered(output)

    generator = random.Random(f"{SEED} {workers}")
    moments = [generator.random() for _ in range(WORKERS[workers])]
    cases = {f"{moment:.3f}": partial(case, moment) for moment in moments}
    ledger.inject(f"SIGKILL at a random moment, {workers} data workers", cases, tmp_path)


def test_again_and_again(
    training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    """One run is killed soon after each of its checkpoints, until a part of it reaches the end."""

    def case(workers: int, folder: Path) -> int:
        generator, output, kills = random.Random(f"{SEED} again {workers}"), folder / "output", 0
        opts, checkpoint = ("DATALOADER.NUM_WORKERS", workers), 1
        while True:
            child = training.start(output, *opts, resume=kills > 0)
            child.wait_until(output / f"model_{checkpoint:07d}.pth")
            if not kill_after(child, generator.uniform(0, 0.1) * reference.seconds):
                break
            kills += 1
            reference.check_intact(output)
            done = [int(x.stem.removeprefix("model_")) for x in output.glob("model_0*.pth")]
            checkpoint = max(done) + CHECKPOINT_PERIOD
        reference.check_recovered(output)
        return kills

    cases = {f"{workers} workers": partial(case, workers) for workers in WORKERS}
    row = ledger.inject("SIGKILL after each checkpoint, until the run ends", cases, tmp_path)
    assert row.injected >= 2 * len(WORKERS)


# ---- Every step of writing.


@pytest.mark.parametrize("stage", [stage for _, stage in STAGES])
def test_every_step_of_writing(
    stage: str, training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    def case(place: Place, folder: Path) -> None:
        output = folder / "output"
        assert training.start(output, place=place, act=kill).wait() == KILLED
        reference.check_intact(output)
        training.finish(output, resume=True)
        reference.check_recovered(output)

    cases = {
        name: partial(case, place)
        for name, place in places_by_stage(reference.steps)[stage].items()
    }
    assert cases
    ledger.inject(f"SIGKILL {stage}", cases, tmp_path)


# ---- Data workers.


def test_data_workers(
    training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    def case(place: Place, folder: Path) -> None:
        output, opts = folder / "output", ("DATALOADER.NUM_WORKERS", 2)
        sentence = training.start(output, *opts, place=place, act=kill_a_worker).sentence()
        assert re.match(r"error: a data worker (?:\(pid \d+\) )?was killed.*--resume\.$", sentence)
        reference.check_intact(output)
        # The training may notice the death a step later.
        written, _ = metrics(output)
        assert len(written - reference.metrics[0]) <= 1 and max(written, default=0) < ITERATIONS
        training.finish(output, *opts, resume=True)
        reference.check_recovered(output, written)

    found = places_by_stage(reference.steps)
    stages = ("inside torch.save", "while metrics.json is written")
    cases = {k: partial(case, v) for stage in stages for k, v in found[stage].items()}
    ledger.inject("SIGKILL of a data worker", dict(list(cases.items())[:8]), tmp_path)


def test_nothing_survives_a_kill(training: Training, tmp_path: Path) -> None:
    """Data workers end when their training is gone, which they check every 5 seconds."""
    opts = ("DATALOADER.NUM_WORKERS", 2)
    places = [("fork", "output", k) for k in range(4)]  # workers of training and evaluation
    places.append(("open", "model_0000005.pth.tmp", 0))
    children = [
        training.start(tmp_path / str(k) / "output", *opts, place=place, act=kill)
        for k, place in enumerate(places)
    ]
    for child in children:
        assert child.wait() == KILLED
    deadline = time.monotonic() + 30
    while left := survivors([child.pid for child in children]):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)

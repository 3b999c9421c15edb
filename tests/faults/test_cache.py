"""Test that no fault of the cache of a teacher's maps changes a bit of a training, or loses it."""

import random
from functools import partial
from pathlib import Path

import pytest

from .child import fill
from .ledger import Ledger
from .runs import Child, Reference, Training, small_disk
from .test_disk import can_mount
from .test_kills import KILLED, kill_after

SEED = 0
KILLS = 6
FREE = 2**16  # bytes, for a part of the maps
DIR = "MODEL.DISTILL.TEACHER.CACHE.DIR"
MAPS = "*/*.safetensors"


def test_kills_while_maps_are_written(
    training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    """The killed run is resumed, and another student reads what both left."""

    def case(moment: float, folder: Path) -> None:
        maps, output = folder / "maps", folder / "output"
        while not kill_after(training.start(output, DIR, maps), moment * reference.seconds):
            moment *= 0.7
            output = folder / f"output{moment}"
        training.finish(output, DIR, maps, resume=True)
        reference.check_recovered(output)
        training.finish(folder / "other", DIR, maps)
        reference.check_recovered(folder / "other")

    generator = random.Random(SEED)
    moments = [generator.uniform(0.2, 1) for _ in range(KILLS)]
    cases = {f"{moment:.3f}": partial(case, moment) for moment in moments}
    ledger.inject("SIGKILL while a teacher's maps are cached", cases, tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    """Change a bit of a value, which leaves the file readable."""
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_damaged_maps(
    training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    def case(damage: str, folder: Path) -> None:
        maps = folder / "maps"
        training.finish(folder / "first", DIR, maps)
        files = sorted(maps.glob(MAPS))
        for path in random.Random(SEED).sample(files, len(files) // 2):
            {"cut": cut, "flip": flip, "empty": empty}[damage](path)
        child = training.finish(folder / "second", DIR, maps)
        assert "is damaged; its map is computed again" in child.out + child.err
        reference.check_recovered(folder / "second")

    cases = {damage: partial(case, damage) for damage in ("cut", "flip", "empty")}
    ledger.inject("damaged maps of a teacher", cases, tmp_path)


def test_two_writers(
    training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    """One of the two is killed while both write; the other one is not disturbed."""

    def case(killed: bool, folder: Path) -> None:
        maps = folder / "maps"
        outputs = [folder / str(k) / "output" for k in range(2)]
        children: list[Child] = [training.start(x, DIR, maps) for x in outputs]
        if killed and kill_after(children[0], 0.6 * reference.seconds):
            assert children[1].wait() == 0
            training.finish(outputs[0], DIR, maps, resume=True)
        assert all(x.wait() in (0, KILLED) for x in children)
        for output in outputs:
            reference.check_recovered(output)

    cases = {"both end": partial(case, False), "one is killed": partial(case, True)}
    ledger.inject("two trainings that write the same maps", cases, tmp_path)


def test_full_disk(
    training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    """A disk that is too small for the maps ends no training."""
    if not can_mount(tmp_path):
        pytest.skip("there are no user namespaces here, in which to mount a small disk")

    def case(folder: Path) -> None:
        with small_disk(folder / "disk", 1) as (holder, disk):
            fill(disk, FREE)
            opts = (DIR, folder / "disk" / "maps")
            child = training.finish(folder / "output", *opts, disk=holder, log=folder / "log")
            assert "no more maps are stored" in child.out + child.err
        reference.check_recovered(folder / "output")

    ledger.inject("full disk of a teacher's maps", {"64 KiB": case}, tmp_path)

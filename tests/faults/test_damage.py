"""Test damaged checkpoints: a resume uses the newest intact one, with a warning."""

import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from .child import kill
from .ledger import Ledger
from .runs import Reference, Training, size

SEED = 0
NEWEST, BEFORE, OLDEST = (f"model_{k:07d}.pth" for k in (9, 7, 5))

Damage = Callable[[Path], object]
"""Function that damages a file."""


@pytest.fixture(scope="module")
def interrupted(
    training: Training, reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Kill a run while it writes its final checkpoint, and return its output."""
    output = tmp_path_factory.mktemp("interrupted") / "output"
    place = ("open", "model_final.pth.tmp", 0)
    assert training.start(output, place=place, act=kill).wait() == -9
    reference.check_intact(output)
    return output


def flip(bit: int, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def cut(length: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:length])


def overwrite(start: int, new: bytes, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[start : start + len(new)] = new
    path.write_bytes(content)


def swap(other: str, path: Path) -> None:
    between = path.with_name("between")
    path.rename(between)
    path.with_name(other).rename(path)
    between.rename(path.with_name(other))


def checksum(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def resumed(
    training: Training, reference: Reference, output: Path, sources: tuple[str, ...]
) -> None:
    """Resume from one of ``sources``, with a warning unless it is the newest."""
    child = training.finish(output, resume=True)
    (loaded,) = set(re.findall(rf"Loading from {re.escape(str(output))}/(\S+) ", child.out))
    assert loaded in sources, loaded
    warned = f"{output}/{NEWEST}" in child.out and "using the one before it" in child.out
    assert warned == (loaded != NEWEST), child.out
    reference.check_recovered(output)


@pytest.fixture
def inject(
    interrupted: Path, training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> Callable[..., None]:
    """Return a function that damages copies of the interrupted run, and resumes each."""

    def inject(kind: str, damages: dict[str, Damage], *sources: str, file: str = NEWEST) -> None:
        def case(damage: Damage, folder: Path) -> None:
            output = folder / "output"
            shutil.copytree(interrupted, output)
            damage(output / file)
            resumed(training, reference, output, sources)

        cases = {name: partial(case, damage) for name, damage in damages.items()}
        ledger.inject(kind, cases, tmp_path)

    return inject


@pytest.fixture
def draw(interrupted: Path) -> Callable[[int], list[int]]:
    """Return a function that draws sorted positions in the newest checkpoint, in bytes."""
    generator = random.Random(SEED)
    return lambda count: sorted(generator.sample(range(size(interrupted / NEWEST)), count))


def test_flipped_bits(inject: Callable[..., None], draw: Callable[[int], list[int]]) -> None:
    flips: dict[str, Damage] = {f"{x}": partial(flip, 8 * x + x % 8) for x in draw(20)}
    inject("one bit of the last checkpoint flips", flips, BEFORE)


def test_flipped_bits_without_checksum(
    inject: Callable[..., None], draw: Callable[[int], list[int]]
) -> None:
    """Then the checksums inside the file are used, which do not cover its table of contents."""

    def damage(position: int, path: Path) -> None:
        position %= size(path)
        flip(8 * position + position % 8, path)
        checksum(path).unlink()

    flips = {f"{x}": partial(damage, x) for x in [*draw(10), *range(-5000, 0, 500)]}
    inject("one bit flips, no checksum beside the file", flips, NEWEST, BEFORE)


def test_truncation(inject: Callable[..., None], draw: Callable[[int], list[int]]) -> None:
    cuts: dict[str, Damage] = {f"{x}": partial(cut, x) for x in [0, 1, *draw(8)]}
    cuts["the last byte"] = lambda path: cut(size(path) - 1, path)
    inject("the last checkpoint is truncated", cuts, BEFORE)


def test_truncation_without_checksum(
    inject: Callable[..., None], draw: Callable[[int], list[int]]
) -> None:
    def damage(length: int, path: Path) -> None:
        cut(length, path)
        checksum(path).unlink()

    cuts = {f"{x}": partial(damage, x) for x in [0, *draw(5)]}
    inject("the last checkpoint is truncated, no checksum beside it", cuts, BEFORE)


def test_blocks(inject: Callable[..., None], draw: Callable[[int], list[int]]) -> None:
    noise = random.Random(SEED).randbytes(4096)
    damages: dict[str, Damage] = {}
    for position in draw(3):
        damages[f"zeros at {position}"] = partial(overwrite, position, bytes(4096))
        damages[f"noise at {position}"] = partial(overwrite, position, noise)
    damages["noise behind the end"] = lambda path: overwrite(size(path), noise, path)
    inject("a block of the last checkpoint is overwritten", damages, BEFORE)


def test_swapped_files(inject: Callable[..., None]) -> None:
    inject("two checkpoints are swapped", {"": partial(swap, BEFORE)}, OLDEST)
    swapped = partial(swap, f"{BEFORE}.sha256")
    inject("two checksums are swapped", {"": swapped}, OLDEST, file=f"{NEWEST}.sha256")


def test_several_checkpoints(inject: Callable[..., None]) -> None:
    def two(path: Path) -> None:
        flip(0, path)
        cut(1000, path.with_name(BEFORE))

    def gone(path: Path) -> None:
        path.unlink()
        flip(0, path.with_name(BEFORE))

    inject("the last two checkpoints are damaged", {"bit, cut": two, "gone, bit": gone}, OLDEST)


GARBAGE = {
    "empty": b"",
    "zeros": bytes(64),
    "noise": random.Random(SEED).randbytes(200),
    "other file": b"model_9999999.pth",
    "path": b"../../../etc/passwd",
    "folder": b".",
}


def test_tag(inject: Callable[..., None]) -> None:
    damages: dict[str, Damage] = {
        name: partial(lambda new, path: path.write_bytes(new), new) for name, new in GARBAGE.items()
    }
    damages["gone"] = Path.unlink
    inject("last_checkpoint is overwritten or gone", damages, NEWEST, file="last_checkpoint")


def test_checksum(inject: Callable[..., None]) -> None:
    damages: dict[str, Damage] = {
        name: partial(lambda new, path: path.write_bytes(new), new) for name, new in GARBAGE.items()
    }
    inject("a checksum is overwritten", damages, BEFORE, file=f"{NEWEST}.sha256")
    inject("a checksum is gone", {"": Path.unlink}, NEWEST, file=f"{NEWEST}.sha256")


def test_final_checkpoint(
    training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    """A finished run with a damaged final checkpoint trains its last iterations again."""

    def case(damage: Damage, folder: Path) -> None:
        output = folder / "output"
        training.finish(output)
        damage(output / "model_final.pth")
        child = training.finish(output, resume=True)
        assert f"{output}/model_final.pth" in child.out and "using the one before it" in child.out
        reference.check_recovered(output)

    damages: dict[str, Damage] = {"bit": partial(flip, 10**6), "cut": partial(cut, 10**5)}
    cases = {name: partial(case, damage) for name, damage in damages.items()}
    ledger.inject("the final checkpoint is damaged", cases, tmp_path)


def test_all_checkpoints(
    interrupted: Path, training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    """Then the run starts from the beginning only after the files of the error are removed."""

    def case(folder: Path) -> None:
        output = folder / "output"
        shutil.copytree(interrupted, output)
        for name in (NEWEST, BEFORE, OLDEST):
            flip(0, output / name)
        sentence = training.start(output, resume=True).sentence()
        assert NEWEST in sentence and "remove" in sentence
        for path in output.glob("model_0*"):
            path.unlink()
        training.finish(output, resume=True)
        reference.check_recovered(output)

    ledger.inject("all checkpoints are damaged", {"": case}, tmp_path)

"""Checkpoint files of any content: they load as they were written, or a sentence says why not."""

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distill.checkpoint import StudentCheckpointer, checksum_file
from distill.engine.replay import read_reproducer
from distill.weights import load_strictly

from .fuzzing import TEXT, VALUES, fuzz, works

# Content that tells when a bit of it has changed.
GOOD = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
nn.init.uniform_(GOOD[0].weight, generator=torch.Generator().manual_seed(0))
OPCODES = [getattr(pickle, name) for name in dir(pickle) if name.isupper() and len(name) > 3]
OPCODES = [x for x in OPCODES if isinstance(x, bytes) and len(x) == 1]


def good_bytes(folder: Path) -> bytes:
    torch.save({"model": GOOD.state_dict(), "iteration": 3}, folder / "good.pth")
    return (folder / "good.pth").read_bytes()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file's bytes with some of them flipped, cut, moved, repeated or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.sampled_from([1, 1, 4, 64, 1000]))
        part = content[place : place + length]
        new = draw(
            st.sampled_from(
                [
                    bytes(x ^ 1 << place % 8 for x in part),
                    b"",
                    part * 2,
                    bytes(len(part)),
                    content[:length],
                ]
            )
            | st.binary(max_size=8)
        )
        rest = b"" if draw(st.integers(0, 9)) == 0 else content[place + length :]
        content = content[:place] + new + rest
    return content


TENSORS = st.sampled_from(
    [
        torch.zeros(8, 8),
        torch.zeros(8),
        torch.zeros(0),
        torch.zeros(3, 3, dtype=torch.float64),
        torch.full((8,), float("nan")),
        torch.zeros(8, 8, dtype=torch.complex64),
        torch.eye(8).to_sparse(),
        torch.ones(8, dtype=torch.bool),
        torch.zeros(1).expand(8, 8),
    ]
)
NAMES = st.sampled_from([*GOOD.state_dict(), "0", "module.0.weight", "x.y"]) | TEXT
CONTENTS = (
    VALUES
    | st.fixed_dictionaries({"model": VALUES | st.dictionaries(NAMES, TENSORS | VALUES)})
    | st.dictionaries(NAMES, TENSORS)
    | st.fixed_dictionaries(
        {"model": st.just(GOOD.state_dict()), "iteration": VALUES, "trainer": VALUES},
        optional={"distill": VALUES, "__author__": VALUES, "matching_heuristics": VALUES},
    )
)
PICKLES = st.lists(
    st.sampled_from(OPCODES)
    | st.binary(max_size=3)
    | st.sampled_from([b"cos\nsystem\n", b"cbuiltins\neval\n", b"S'x'\n", b"I1\n", b"\x80\x02"]),
    max_size=12,
).map(lambda x: b"".join(x) + b".")


def same_weights(model: nn.Module) -> bool:
    def bits(x: Tensor) -> bytes:
        return x.numpy().tobytes()

    ours, theirs = model.state_dict(), GOOD.state_dict()
    return all(bits(ours[k]) == bits(theirs[k]) for k in theirs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_damaged_weights(suffix: str, folder: Path) -> None:
    content, path = good_bytes(folder), folder / f"weights{suffix}"

    @fuzz(150)
    @given(damaged(content) | PICKLES | st.binary(max_size=50))
    def check(spoilt: bytes) -> None:
        path.write_bytes(spoilt)
        model = copy.deepcopy(GOOD)
        nn.init.zeros_(model[0].weight)
        options = {"allow_pickle": True}
        if works("weights", lambda: load_strictly(model, str(path), "MODEL.WEIGHTS", **options)):
            assert same_weights(model)

    check()


@fuzz(150)
@given(CONTENTS)
def test_weights_of_other_content(folder: Path, content: Any) -> None:
    path = folder / "content.pth"
    torch.save(content, path)
    model = copy.deepcopy(GOOD)
    works("weights", lambda: load_strictly(model, str(path), "MODEL.WEIGHTS"))
    assert all(x.shape == y.shape for x, y in zip(model.parameters(), GOOD.parameters()))


@pytest.mark.parametrize("checked", [True, False], ids=["checksum", "no checksum"])
def test_damaged_checkpoints_of_a_run(checked: bool, folder: Path) -> None:
    """The one before is taken, or the same where the damage does not matter."""
    output = folder / f"run_{checked}"
    checkpointer = StudentCheckpointer(copy.deepcopy(GOOD), str(output))
    output.mkdir()
    for name in ("model_0000001", "model_0000003"):
        checkpointer.save(name)
    last = output / "model_0000003.pth"
    content = last.read_bytes()
    if not checked:
        os.remove(checksum_file(str(last)))

    @fuzz(120)
    @given(damaged(content))
    def check(spoilt: bytes) -> None:
        last.write_bytes(spoilt)
        checkpointer.model = copy.deepcopy(GOOD)
        nn.init.zeros_(checkpointer.model[0].weight)
        found = []

        def resume() -> None:
            found.append(checkpointer.newest_intact())
            checkpointer.load(found[0])

        assert works("resume", resume) and same_weights(checkpointer.model)
        assert Path(found[0]).name in ("model_0000001.pth", last.name)
        assert not (checked and spoilt != content and found[0] == str(last))

    check()


@fuzz(80)
@given(st.binary(max_size=80), st.binary(max_size=80))
def test_small_files_beside_the_checkpoints(folder: Path, tag: bytes, checksum: bytes) -> None:
    output = folder / "small"
    output.mkdir(exist_ok=True)
    checkpointer = StudentCheckpointer(copy.deepcopy(GOOD), str(output))
    for name in ("model_0000001", "model_0000003"):
        checkpointer.save(name)
    (output / "last_checkpoint").write_bytes(tag)
    (output / "model_0000003.pth.sha256").write_bytes(checksum)
    found: list[str | None] = []
    assert works("resume", lambda: found.append(checkpointer.newest_intact()))
    assert found == [str(output / "model_0000001.pth")]


def test_reproducers(folder: Path) -> None:
    path = folder / "reproducer.pth"
    keys = ("what", "losses", "config", "seed", "iteration", "rank", "model")
    good: dict[str, Any] = dict.fromkeys((*keys, "student_state", "batch"), "")
    torch.save(good, path)
    content = path.read_bytes()

    @fuzz(60)
    @given(damaged(content))
    def spoilt(content: bytes) -> None:
        path.write_bytes(content)
        works("reproducer", lambda: read_reproducer(str(path)))

    @fuzz(60)
    @given(CONTENTS)
    def other(content: Any) -> None:
        torch.save(content, path)
        works("reproducer", lambda: read_reproducer(str(path)))

    spoilt()
    other()

"""Test checkpoint files of any content: they load as written, or an error says why not."""

import copy
import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distill.checkpoint.load import load_strictly
from distill.checkpoint.save import StudentCheckpointer, checksum_file, write_checked
from distill.doctor.replay import read_reproducer
from distill.engine import Trainer, setup_config
from tests.support.trainings import Run, Shapes

from .fuzzing import TEXT, VALUES, command_works, fuzz, garbled, spoilt, works

# Weights that show when a bit has changed.
GOOD = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
nn.init.uniform_(GOOD[0].weight, generator=torch.Generator().manual_seed(0))
OPCODES = [getattr(pickle, name) for name in dir(pickle) if name.isupper() and len(name) > 3]
OPCODES = [x for x in OPCODES if isinstance(x, bytes) and len(x) == 1]


def good_bytes(folder: Path) -> bytes:
    torch.save({"model": GOOD.state_dict(), "iteration": 3}, folder / "good.pth")
    return (folder / "good.pth").read_bytes()


@st.composite
def rezipped(draw: st.DrawFn, content: bytes) -> bytes:
    """Return a zip file with other members and right checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(members) - 1))
        name, data = members[place]
        other = draw(st.sampled_from(members))
        members[place : place + 1] = draw(
            st.sampled_from(
                [[], [(name, other[1])], [(other[0], data)], [(name, b"")], [(name, data)] * 2]
            )
            | st.tuples(st.tuples(st.just(name), garbled(data)))
            | st.tuples(st.tuples(TEXT.map(lambda x: f"archive/{x}"), st.just(data)))
        )
        if not members:
            break
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about duplicate names
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


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
    @given(garbled(content) | PICKLES | st.binary(max_size=50))
    def check(spoilt: bytes) -> None:
        path.write_bytes(spoilt)
        model = copy.deepcopy(GOOD)
        nn.init.zeros_(model[0].weight)
        options = {"allow_pickle": True}
        if works("weights", lambda: load_strictly(model, str(path), "MODEL.WEIGHTS", **options)):
            assert same_weights(model)

    check()


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_weights_in_a_file_that_is_consistent(form: str, folder: Path) -> None:
    """Its checksums are right or missing, so the damage cannot be detected."""
    path = folder / "consistent.pth"
    if form == "legacy":
        torch.save({"model": GOOD.state_dict()}, path, _use_new_zipfile_serialization=False)
        files = garbled(path.read_bytes())
    else:
        files = rezipped(good_bytes(folder))

    @fuzz(60)
    @given(files)
    def check(content: bytes) -> None:
        path.write_bytes(content)
        model = copy.deepcopy(GOOD)
        works("weights", lambda: load_strictly(model, str(path), "MODEL.WEIGHTS"))

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
    """The checkpoint before is used, or the same one if the damage does not matter."""
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
    @given(garbled(content))
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
def test_small_files_next_to_the_checkpoints(folder: Path, tag: bytes, checksum: bytes) -> None:
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
    @given(garbled(content))
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


# With everything that a checkpoint may hold.
TRAINED = [
    *("SOLVER.OPTIMIZER", "ADAMW", "SOLVER.EMA.DECAY", "0.9", "SOLVER.MAX_ITER", "2"),
    *("SOLVER.CHECKPOINT_PERIOD", "1", "DATASETS.TEST", "('shapes_tiny',)"),
    *("TEST.BEST_METRIC", "bbox/AP"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shapes: Shapes) -> Run:
    """Train for two iterations, whose checkpoints may be damaged."""
    run = Run(tmp_path_factory.mktemp("run"), shapes, None)
    assert command_works("command", ["--config-file", str(run.config), *TRAINED])
    return run


@st.composite
def prepared(draw: st.DrawFn, content: Any) -> Any:
    """Replace one to three tensors of a checkpoint by tensors of another form."""
    content = copy.deepcopy(content)
    places = [(holder, key) for holder, key in tensors(content) if holder[key].is_floating_point()]
    for place in draw(
        st.lists(st.sampled_from(range(len(places))), min_size=1, max_size=3, unique=True)
    ):
        holder, name = places[place]
        holder[name] = draw(st.sampled_from(FORMS))(holder[name])
    return content


FORMS: list[Callable[[Tensor], Any]] = [
    lambda x: x.new_zeros(()),
    lambda x: x.new_zeros(0),
    lambda x: x.new_zeros(1),
    lambda x: x.new_zeros(()).expand(x.shape),
    lambda x: x.flatten(),
    lambda x: x[..., None],
    lambda x: x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] if x.dim() else 2),
    lambda x: x.T.contiguous().T if x.dim() == 2 else x.double(),
    lambda x: x.double(),
    lambda x: x.half(),
    lambda x: x.to(torch.int64),
    lambda x: x.to(torch.complex64),
    lambda x: x.to_sparse() if x.dim() else x.bool(),
    lambda x: torch.full_like(x, float("inf")),
    lambda x: x.tolist(),
]


def tensors(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the holder and the key of every tensor inside."""
    if isinstance(content, dict | list):
        keys = content if isinstance(content, dict) else range(len(content))
        for key in keys:
            if isinstance(content[key], Tensor):
                yield content, key
            yield from tensors(content[key])


@pytest.mark.parametrize("change, examples", [(spoilt, 200), (prepared, 320)])
def test_resuming_a_training_from_other_content(run: Run, change: Any, examples: int) -> None:
    """Another program may write such a file, which is not damaged.

    The training takes a step after each resume. A fused optimizer on a CPU does not look at the
    shapes of its state, and would write beyond its memory.
    """
    good = torch.load(run.output / "model_0000000.pth", weights_only=True)
    cfg = setup_config(str(run.config), TRAINED)
    path = run.output / "model_0000000.pth"
    trainer = Trainer(cfg)

    def resume() -> None:
        trainer.resume_or_load(resume=True)
        with EventStorage(trainer.start_iter):
            trainer._trainer.iter = trainer.start_iter
            trainer._trainer.run_step()

    @fuzz(examples)
    @given(change(good))
    def check(content: Any) -> None:
        write_checked(str(path), content)
        (run.output / "last_checkpoint").write_text(path.name)
        works("resume", resume)

    check()
    write_checked(str(path), good)
    assert works("resume", resume)


# Damaged file, and the options with which a command reads it.
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "the student's": ("output/model_final.pth", ["MODEL.WEIGHTS"]),
    "pickled": ("output/model_final.pth", ["MODEL.ALLOW_PICKLE", "True", "MODEL.WEIGHTS"]),
    "to evaluate": ("output/model_final.pth", ["--eval-only", "MODEL.WEIGHTS"]),
    "the teacher's": ("teacher.pth", ["MODEL.DISTILL.TEACHER.WEIGHTS"]),
}


@pytest.fixture(scope="module")
def originals(run: Run) -> dict[str, tuple[bytes, Any]]:
    """Return the files as bytes and as contents, before any command writes new ones."""
    paths = {file: run.folder / file for file, _ in COMMANDS.values()}
    return {
        file: (path.read_bytes(), torch.load(path, weights_only=True))
        for file, path in paths.items()
    }


@fuzz(40)
@given(data=st.data())
def test_commands(
    data: st.DataObject, run: Run, folder: Path, originals: dict[str, tuple[bytes, Any]]
) -> None:
    """Training and evaluation read a damaged file."""
    name = data.draw(st.sampled_from(sorted(COMMANDS)))
    file, options = COMMANDS[name]
    content, good = originals[file]
    path = folder / f"command{'.pkl' if name == 'pickled' else '.pth'}"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(garbled(content)))
    elif name == "pickled":
        path.write_bytes(pickle.dumps(data.draw(spoilt(arrays(good)))))
    else:
        torch.save(data.draw(spoilt(good)), path)
    command_works("command", ["--config-file", str(run.config), *options, str(path)])


def arrays(content: Any) -> Any:
    """Return the weights of a checkpoint in the form of detectron2's pickles."""
    return {"model": {name: x.numpy() for name, x in content["model"].items()}}

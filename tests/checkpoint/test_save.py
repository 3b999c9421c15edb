"""Test that training checkpoints are stock checkpoints of the student, and that runs resume."""

import copy
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes
from detectron2.utils.env import seed_all_rng
from torch import nn

from distill.checkpoint.save import StudentCheckpointer, StudentState, resumable
from distill.engine import Trainer
from distill.errors import CheckpointError, WeightsError
from distill.launch.main import main
from tests.support.networks import STOCK_FPN, STOCK_P3_P7, distill_opts, image_dict, write_config
from tests.support.trainings import trainable_cfg, write_teacher

EIGHT_CLASSES = ("MODEL.ROI_HEADS.NUM_CLASSES", 8, "MODEL.RETINANET.NUM_CLASSES", 8)
FAMILIES = ("faster", "mask", "retinanet")
HEADS = {
    "faster": ("FitNet", "IMA", "ROIKD", "DenseKD"),
    "mask": ("FitNet", "IMA", "ROIKD", "MaskLogitKD", "DenseKD"),
    "retinanet": ("FitNet", "IMA", "DenseKD"),
}
Shapes = tuple[str, str, str]


class Run(NamedTuple):
    """Finished training of two iterations, with a student that stock detectron2 can build."""

    cfg: CfgNode
    trainer: Trainer
    output: Path

    @property
    def saved(self) -> dict[str, Any]:
        return torch.load(self.output / "model_final.pth", weights_only=True)


def train(family: str, folder: Path, shapes: Shapes) -> Run:
    stock = STOCK_P3_P7 if family == "retinanet" else STOCK_FPN
    neck = STOCK_P3_P7 if family == "retinanet" else ()  # dense heads need equal strides
    teacher = write_teacher(folder / "teacher", family, *EIGHT_CLASSES, *neck, fpn=24)
    (folder / "output").mkdir()
    cfg = trainable_cfg(
        family,
        shapes,
        folder / "output",
        *(*stock, *distill_opts(family, HEADS[family]), *teacher),
        *("SOLVER.MAX_ITER", 2),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
        norm="BN",
    )
    seed_all_rng(3)
    trainer = Trainer(cfg)
    trainer.train()
    return Run(cfg, trainer, folder / "output")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shapes: Shapes) -> dict[str, Run]:
    torch.set_num_threads(1)
    return {f: train(f, tmp_path_factory.mktemp(f), shapes) for f in FAMILIES}


# ---- The student without this package.

STRANGER = """
import json, sys, torch

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "distill":
            raise ModuleNotFoundError("there is no distill here")

sys.meta_path.insert(0, Blocker())
try:
    import distill
except ModuleNotFoundError:
    pass
else:
    sys.exit("distill can be imported")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model

torch.set_num_threads(1)
folder, outputs = sys.argv[1], sys.argv[2:]
inputs = torch.load(f"{folder}/inputs.pth", weights_only=True)
report = []
for k, output in enumerate(outputs):
    cfg = get_cfg()
    cfg.merge_from_file(f"{output}/student.yaml")
    saved = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)
    keys = build_model(cfg).load_state_dict(saved["model"], strict=False)
    report.append([keys.missing_keys, keys.unexpected_keys])
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    with torch.no_grad():
        predictions = [x["instances"].get_fields() for x in model(inputs)]
    for fields in predictions:
        fields["pred_boxes"] = fields["pred_boxes"].tensor
    torch.save(predictions, f"{folder}/predictions{k}.pth")
print(json.dumps(report))
"""


class Stranger(NamedTuple):
    """Results of a process that loads the checkpoints and cannot import this package."""

    inputs: list[dict[str, Any]]
    misfits: dict[str, list[list[str]]]
    predictions: dict[str, list[dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def stranger(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> Stranger:
    folder = tmp_path_factory.mktemp("stranger")
    inputs = [{k: v for k, v in image_dict(i, 64, 96).items() if k != "instances"} for i in (0, 1)]
    torch.save(inputs, folder / "inputs.pth")
    command = [sys.executable, "-c", STRANGER, str(folder)]
    command += [str(run.output) for run in runs.values()]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout.splitlines()[-1])
    predictions = [
        torch.load(folder / f"predictions{k}.pth", weights_only=True) for k in range(len(runs))
    ]
    return Stranger(inputs, dict(zip(runs, report)), dict(zip(runs, predictions)))


@pytest.mark.e2e
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_detectron2_loads_the_student(
    family: str, runs: dict[str, Run], stranger: Stranger
) -> None:
    assert stranger.misfits[family] == [[], []]
    student = runs[family].trainer.student
    training = student.training
    with torch.no_grad():
        expected = [x["instances"].get_fields() for x in student.eval()(stranger.inputs)]
    student.train(training)
    for ours, theirs in zip(expected, stranger.predictions[family]):
        assert ours.keys() == theirs.keys()
        assert len(theirs["scores"]) > 0
        assert ("pred_masks" in theirs) == (family == "mask")
        for name, value in ours.items():
            value = value.tensor if isinstance(value, Boxes) else value
            assert torch.equal(value, theirs[name]), name


# ---- Contents.


@pytest.mark.e2e
@pytest.mark.parametrize("family", FAMILIES)
def test_contents(family: str, runs: dict[str, Run]) -> None:
    run = runs[family]
    saved = run.saved  # read with weights_only=True: only plain types
    assert saved.keys() == {"model", "distill", "student_state", "trainer", "iteration"}
    assert saved["iteration"] == saved["trainer"]["iteration"] == 1
    assert saved["model"].keys() == run.trainer.student.state_dict().keys()
    assert {k.split(".")[0] for k in saved["distill"]} == {"FitNet", "IMA"}
    assert saved["trainer"]["seed"] == run.cfg.SEED
    normalizer = {"loss_normalizer"} if family == "retinanet" else set()
    assert saved["student_state"].keys() == normalizer
    assert "DISTILL" not in (run.output / "student.yaml").read_text()


@pytest.mark.e2e
def test_loss_normalizer_makes_a_round_trip(runs: dict[str, Run]) -> None:
    student: Any = runs["retinanet"].trainer.student
    state = StudentState(student).state_dict()
    assert state == runs["retinanet"].saved["student_state"]
    assert type(state["loss_normalizer"]) is float and state["loss_normalizer"] != 100
    fresh = copy.deepcopy(student)
    fresh.loss_normalizer = 100
    StudentState(fresh).load_state_dict(state)
    assert fresh.loss_normalizer == student.loss_normalizer


# ---- Resuming.


@pytest.mark.e2e
@pytest.mark.parametrize("family", FAMILIES)
def test_resume_continues_where_it_stopped(
    family: str, runs: dict[str, Run], tmp_path: Path
) -> None:
    run = runs[family]
    shutil.copytree(run.output, tmp_path / "output")
    cfg = run.cfg.clone()
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.SOLVER.MAX_ITER = 3
    seed_all_rng(99)  # other initial weights than those of the first part
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)

    assert trainer.start_iter == 2
    first: Any = run.trainer._trainer
    second: Any = trainer._trainer
    ours, theirs = second.model.state_dict(), first.model.state_dict()
    assert [k for k in theirs if not torch.equal(ours[k], theirs[k])] == []
    assert StudentState(trainer.student).state_dict() == run.saved["student_state"]
    assert trainer.scheduler.last_epoch == run.trainer.scheduler.last_epoch == 2
    momenta = [
        [state["momentum_buffer"] for state in x.optimizer.state_dict()["state"].values()]
        for x in (first, second)
    ]
    assert len(momenta[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))

    trainer.train()
    assert torch.load(tmp_path / "output/model_final.pth", weights_only=True)["iteration"] == 2


@pytest.mark.slow
@pytest.mark.e2e
def test_trained_student_needs_no_teacher(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = write_teacher(tmp_path / "teacher", "faster", *EIGHT_CLASSES)
    opts = [*distill_opts("faster", ["FitNet"]), *teacher, "SOLVER.MAX_ITER", 1]
    opts += ["DATASETS.TEST", (shapes[0],), "INPUT.MAX_SIZE_TEST", 64]
    opts += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    config = write_config(
        trainable_cfg("faster", shapes, tmp_path / "output", *opts), tmp_path / "config.yaml"
    )
    command = ["--config-file", str(config)]
    assert main(command) == 0
    final = tmp_path / "output" / "model_final.pth"
    trained = final.read_bytes()
    results = tmp_path / "output" / "inference" / "coco_instances_results.json"
    expected = results.read_text()
    assert len(json.loads(expected)) > 0

    shutil.rmtree(tmp_path / "teacher")
    for evaluation in (["--resume"], ["--eval-only", "MODEL.WEIGHTS", str(final)]):
        results.unlink()
        assert main([*command, *evaluation]) == 0
        assert results.read_text() == expected
    assert final.read_bytes() == trained
    # Continuing the training needs the teacher, and the error says so.
    capsys.readouterr()
    assert main([*command, "--resume", "SOLVER.MAX_ITER", "2"]) == 2
    assert "MODEL.DISTILL.TEACHER.CONFIG_FILE" in capsys.readouterr().err


# ---- Crashes.


def test_failed_save_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(2, 2)
    checkpointer = StudentCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    earlier = (tmp_path / "model_0000001.pth").read_bytes()

    def fail(data: Any, file: Any) -> None:
        file.write(b"half a check")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", fail)
    nn.init.zeros_(model.weight)
    for name in ("model_0000001", "model_0000002"):
        with pytest.raises(CheckpointError, match=r"No space left.*the 1 before it.*--resume"):
            checkpointer.save(name)
    assert (tmp_path / "model_0000001.pth").read_bytes() == earlier
    names = {"model_0000001.pth", "model_0000001.pth.sha256", "last_checkpoint"}
    assert {x.name for x in tmp_path.iterdir()} == names
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    monkeypatch.undo()
    fresh = nn.Linear(2, 2)
    found = StudentCheckpointer(fresh, str(tmp_path)).newest_intact()
    assert found == str(tmp_path / "model_0000001.pth")


@pytest.mark.e2e
def test_failed_training_can_be_resumed(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the second of two checkpoints of a trainer."""
    cfg = runs["faster"].cfg.clone()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER = 1, 3
    save, names = torch.save, []

    def fill(data: Any, file: Any) -> None:
        names.append(Path(file.name).name)
        if len(names) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(data, file)

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(CheckpointError, match="No space left"):
        Trainer(cfg).train()
    monkeypatch.undo()
    assert names == ["model_0000000.pth.tmp", "model_0000001.pth.tmp"]
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 1


@pytest.fixture
def three(tmp_path: Path) -> StudentCheckpointer:
    """Save three checkpoints, whose weights are 1 to 3."""
    model = nn.Linear(64, 64)
    checkpointer = StudentCheckpointer(model, str(tmp_path))
    for k in (1, 2, 3):
        nn.init.constant_(model.weight, k)
        checkpointer.save(f"model_{k:07d}")
    return checkpointer


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "one bit": flip,
    "truncated": cut,
    "empty": lambda path: path.write_bytes(b""),
    "one bit, no checksum": lambda path: (flip(path), unlink_checksum(path)),
    "truncated, no checksum": lambda path: (cut(path), unlink_checksum(path)),
    "removed": Path.unlink,
    "checksum emptied": lambda path: Path(f"{path}.sha256").write_text(""),
}


def unlink_checksum(path: Path) -> None:
    Path(f"{path}.sha256").unlink()


@pytest.mark.parametrize("name", DAMAGES)
def test_the_newest_intact_checkpoint_is_found(
    name: str, three: StudentCheckpointer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert three.newest_intact() == str(tmp_path / "model_0000003.pth")
    DAMAGES[name](tmp_path / "model_0000003.pth")
    caplog.clear()
    found = three.newest_intact()
    assert found == str(tmp_path / "model_0000002.pth")
    assert ("model_0000003.pth" in caplog.text and "using the one before" in caplog.text) == (
        name != "removed"
    )


def test_all_damaged_is_an_error_rather_than_a_new_start(
    three: StudentCheckpointer, tmp_path: Path
) -> None:
    for k in (1, 2, 3):
        flip(tmp_path / f"model_{k:07d}.pth")
    with pytest.raises(WeightsError, match=r"0000003.* none of 3 checkpoints is intact"):
        three.newest_intact()


@pytest.mark.parametrize("tag", [b"", b"\xff\x00", b"../model_0000001.pth", b"nothing.pth"])
def test_a_broken_tag_does_not_matter(
    tag: bytes, three: StudentCheckpointer, tmp_path: Path
) -> None:
    (tmp_path / "last_checkpoint").write_bytes(tag)
    assert three.newest_intact() == str(tmp_path / "model_0000003.pth")


def test_a_missing_checksum_is_no_damage(three: StudentCheckpointer, tmp_path: Path) -> None:
    """A crash may come between the file and its checksum."""
    unlink_checksum(tmp_path / "model_0000003.pth")
    assert three.newest_intact() == str(tmp_path / "model_0000003.pth")


def test_checksums_are_those_of_sha256sum(three: StudentCheckpointer, tmp_path: Path) -> None:
    content = (tmp_path / "model_0000002.pth").read_bytes()
    expected = f"{hashlib.sha256(content).hexdigest()}  model_0000002.pth\n"
    assert (tmp_path / "model_0000002.pth.sha256").read_text() == expected


def test_pruning_keeps_the_newest_and_the_named(three: StudentCheckpointer, tmp_path: Path) -> None:
    three.save("model_final")
    three.save_best(2, "bbox/AP", 12.5)
    three.prune(2)
    names = {x.name for x in tmp_path.glob("*.pth")}
    kept = {"model_0000002.pth", "model_0000003.pth", "model_final.pth", "model_best.pth"}
    assert names == kept
    assert {x.name for x in tmp_path.glob("*.sha256")} == {f"{x}.sha256" for x in kept}
    # A run cannot resume from the best checkpoint.
    assert [Path(x).name for x in resumable(three.save_dir)] == [
        *("model_final.pth", "model_0000003.pth", "model_0000002.pth")
    ]
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert best.keys() == {"model", "iteration", "bbox/AP"} and best["bbox/AP"] == 12.5

"""Test that a step that is not finite changes nothing, and stops the run or is skipped."""

import copy
import enum
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.structures import (
    BitMasks,
    Boxes,
    Instances,
    Keypoints,
    PolygonMasks,
    RotatedBoxes,
)
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from distill.checkpoint.save import StudentState
from distill.config import get_distill_cfg
from distill.engine import Trainer
from distill.engine.nonfinite import FiniteGuard, from_plain, says_nonfinite, to_plain
from distill.engine.train_loop import TrainLoop
from distill.errors import NumericalError
from distill.heads.fitnet import FitNet
from distill.launch.main import main
from tests.support.networks import write_config
from tests.support.nonfinite import (
    AT,
    FAULTS,
    BadGradient,
    Teachers,
    config,
    infinite,
    nan,
    reproducer,
    spoil,
    spoil_image,
    spoilt_teacher,
    stopped,
    write_teachers,
)
from tests.support.processes import needs_loopback, spawn, starts_processes
from tests.support.trainings import (
    Interrupted,
    Interruption,
    differences,
)

Shapes = tuple[str, str, str]


class Watch(HookBase):
    """Hook that keeps a copy of everything that a step may change, before each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def before_step(self) -> None:
        self.states.append(state(self.trainer))


def state(trainer: Any) -> dict[str, Any]:
    loop = trainer._trainer
    everything = {
        "model": loop.model.state_dict(),
        "optimizer": loop.optimizer.state_dict(),
        "student": StudentState(trainer.student).state_dict(),
    }
    return copy.deepcopy(everything)


def images_of(trainer: Any) -> list[str]:
    return [x["file_name"] for x in trainer._trainer.guard._batch]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Teachers:
    return write_teachers(tmp_path_factory.mktemp("teachers"))


# ---- Stopping.


@pytest.mark.e2e
@pytest.mark.parametrize("fault", FAULTS)
def test_the_run_stops_and_nothing_has_changed(
    fault: str,
    shapes: Shapes,
    teachers: Teachers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, inject, what = FAULTS[fault]
    inject(monkeypatch)
    watch = Watch()
    trainer, message = stopped(config(family, shapes, teachers, tmp_path), watch)

    assert message.startswith(f"Iteration {AT}: {what}")
    names = images_of(trainer)
    assert len(names) == 2 and f"(images {', '.join(names)})" in message
    assert f"`distill replay {reproducer(tmp_path)}` repeats the step" in message
    assert len(watch.states) == AT + 1
    assert differences(watch.states[-1], state(trainer)) == []
    # A finite step changes something; otherwise the test could not fail.
    changed = differences(watch.states[1], watch.states[2])
    assert ".model.student.backbone.bottom_up.stem.conv1.norm.running_mean" in changed
    assert (".student.loss_normalizer" in changed) == (family == "retinanet")
    assert any(x.endswith(".momentum_buffer") for x in changed)
    assert not (tmp_path / "model_final.pth").exists()


@pytest.mark.e2e
def test_a_teacher_that_is_not_finite(shapes: Shapes, tmp_path: Path) -> None:
    watch = Watch()
    teacher = {"faster": spoilt_teacher(tmp_path / "teacher", "faster")}
    trainer, message = stopped(config("faster", shapes, teacher, tmp_path), watch)
    assert message.startswith("Iteration 0: loss_fitnet/p3 is inf")
    assert differences(watch.states[0], state(trainer)) == []


@pytest.mark.e2e
def test_the_command_line_prints_one_line(
    shapes: Shapes,
    teachers: Teachers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    FAULTS["gradient"][1](monkeypatch)
    path = write_config(
        config("faster", shapes, teachers, tmp_path / "out"), tmp_path / "config.yaml"
    )
    capsys.readouterr()
    assert main(["--config-file", str(path)]) == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.out + output.err
    (line,) = output.err.splitlines()
    assert line.startswith(f"error: Iteration {AT}: the gradient of loss_fitnet/p3 in student.")
    assert " more is not finite (images " in line
    assert line.endswith("or set SOLVER.ON_NONFINITE skip.")


@pytest.mark.e2e
def test_a_full_disk_does_not_hide_the_fault(
    shapes: Shapes,
    teachers: Teachers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    FAULTS["task loss"][1](monkeypatch)
    (tmp_path / "nonfinite").write_text("no folder")
    _, message = stopped(config("faster", shapes, teachers, tmp_path))
    assert "loss_cls is nan" in message and "replay.py" not in message
    assert "There is no reproducer" in caplog.text


# ---- Skipping.

SKIP = ("SOLVER.ON_NONFINITE", "skip")
first_step_skipped = pytest.mark.filterwarnings("ignore:Detected call of `lr_sched:UserWarning")


def omit_step(patch: pytest.MonkeyPatch) -> None:
    """Let iteration AT read its batch without a step."""
    original = TrainLoop.run_step

    def run_step(self: TrainLoop) -> None:
        if self.iter == AT:
            next(self._data_loader_iter)
        else:
            original(self)

    patch.setattr(TrainLoop, "run_step", run_step)


@pytest.mark.e2e
@pytest.mark.parametrize("fault", FAULTS)
def test_a_skipped_step_leaves_no_trace(
    fault: str,
    shapes: Shapes,
    teachers: Teachers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    family, inject, what = FAULTS[fault]
    inject(monkeypatch)
    ends = []
    for name in ("skipped", "omitted"):
        if name == "omitted":
            omit_step(monkeypatch)
        seed_all_rng(3)  # for the same initial weights
        Trainer(config(family, shapes, teachers, tmp_path / name, *SKIP)).train()
        ends.append(torch.load(tmp_path / name / "model_final.pth", weights_only=True))
    assert differences(*ends) == [".trainer._trainer.skips"]
    assert [x["trainer"]["_trainer"]["skips"] for x in ends] == [1, 0]
    (warning,) = [x for x in caplog.messages if what in x]
    assert warning.endswith("Skipped, 1 so far.")
    assert reproducer(tmp_path / "skipped").is_file()
    # The log has no losses for the iteration either.
    rows = map(json.loads, (tmp_path / "skipped" / "metrics.json").read_text().splitlines())
    assert AT not in [x["iteration"] for x in rows if "kd_ratio/fitnet/p3" in x]


@pytest.mark.e2e
def test_a_skipped_step_leaves_no_trace_in_the_balance(
    shapes: Shapes, teachers: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "losses", FitNet, "p3", BadGradient.apply)
    opts = (*SKIP, "MODEL.DISTILL.BALANCE.MODE", "gradient")
    ends = []
    for name in ("skipped", "omitted"):
        if name == "omitted":
            omit_step(monkeypatch)
        seed_all_rng(3)
        Trainer(config("faster", shapes, teachers, tmp_path / name, *opts)).train()
        ends.append(torch.load(tmp_path / name / "model_final.pth", weights_only=True))
    assert differences(*ends) == [".trainer._trainer.skips"]
    state = ends[0]["balance"]
    assert state["measured"]["backbone.p3"].keys() == {"FitNet"}


@pytest.mark.e2e
@first_step_skipped
def test_skips_are_bounded_and_counted_over_a_resume(
    shapes: Shapes, teachers: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "losses", FitNet, "p3", nan, at=(0, 2, 3))
    opts = (*SKIP, "SOLVER.MAX_SKIPS", 2, "SOLVER.CHECKPOINT_PERIOD", 1)
    cfg = config("faster", shapes, teachers, tmp_path, *opts)
    with pytest.raises(Interrupted):
        Trainer(cfg, [Interruption(2)]).train()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2 and trainer._trainer.guard.skips == 1
    with pytest.raises(NumericalError) as error:
        trainer.train()
    assert str(error.value).startswith("Iteration 3: loss_fitnet/p3 is nan")
    assert "2 steps were skipped before, as many as SOLVER.MAX_SKIPS allows" in str(error.value)


@pytest.mark.e2e
@first_step_skipped
def test_the_very_first_step_may_be_skipped(
    shapes: Shapes, teachers: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the log is empty, and no parameter has a gradient."""
    spoil_image(monkeypatch, at=(0, 1))
    Trainer(config("faster", shapes, teachers, tmp_path, *SKIP)).train()
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert saved["trainer"]["_trainer"]["skips"] == 2


# ---- Toys.


class Toy(nn.Module):
    """Module with one weight, and buffers that every forward changes in place or replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("queue", torch.zeros(1), persistent=False)

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        self.count += 1
        self.queue = torch.cat([self.queue, self.count[None]])
        loss = (self.weight * batch[0]["image"]).sum()
        if batch[0].get("bad gradient"):
            loss = BadGradient.apply(loss)
        if batch[0].get("error"):
            raise batch[0]["error"]
        return {"loss": loss}


def toy_loop(tmp_path: Path, batches: Sequence[dict[str, Any]], *, skip: bool = True) -> TrainLoop:
    cfg = get_distill_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.SOLVER.ON_NONFINITE = "skip" if skip else "stop"
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    guard = FiniteGuard(cfg, model, model, seed=0)
    data = [[x] for x in batches]
    return TrainLoop(model, data, optimizer, amp=False, device="cpu", seed=0, guard=guard)


GOOD = {"image": torch.tensor([1.0, 2.0, 3.0])}


def test_buffers_that_the_forward_replaces_come_back(tmp_path: Path, storage: EventStorage) -> None:
    loop = toy_loop(tmp_path, [GOOD, {"image": GOOD["image"] * math.nan}, GOOD])
    toy: Any = loop.model
    for expected in (1, 1, 2):
        loop.run_step()
        assert toy.count == expected and toy.queue.tolist() == list(range(expected + 1))
    assert loop.guard.skips == 1
    torch.testing.assert_close(toy.weight.detach(), 1 - GOOD["image"])  # two steps of 0.5


def test_scaled_gradients_may_overflow(tmp_path: Path, storage: EventStorage) -> None:
    """The scaler skips the step and lowers the scale, as without the guard."""
    loop = toy_loop(tmp_path, [{"image": torch.full((3,), 1e15)}] * 8, skip=False)
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**81)
    scales = []
    for storage.iter in range(5):
        loop.run_step()
        scales.append(loop.scaler.get_scale())
    assert scales == [2.0**80, 2.0**79, 2.0**78, 2.0**78, 2.0**78]
    assert loop.guard.skips == 0
    assert loop.model.weight.tolist() == pytest.approx([-1e15] * 3)  # two steps of 0.5
    norms = storage.history("grad_norm").values()
    assert norms == [(pytest.approx(math.sqrt(3) * 1e15), k) for k in (3, 4)]


def test_gradients_that_overflow_without_a_scale_are_an_error(
    tmp_path: Path, storage: EventStorage
) -> None:
    loop = toy_loop(tmp_path, [{**GOOD, "bad gradient": True}] * 3, skip=False)
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loop.run_step()
    loop.run_step()
    assert loop.scaler.get_scale() == 1
    with pytest.raises(NumericalError, match="the gradient of loss in weight is not finite"):
        loop.run_step()
    assert loop.model.weight.tolist() == [1, 1, 1]


def test_a_skipped_step_leaves_the_scale(tmp_path: Path, storage: EventStorage) -> None:
    loop = toy_loop(tmp_path, [GOOD, {"image": GOOD["image"] * math.inf}, GOOD])
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for scale in (2.0**10, 2.0**10, 2.0**11):  # the two good steps count as consecutive
        loop.run_step()
        assert loop.scaler.get_scale() == scale
    assert loop.guard.skips == 1


def test_squares_of_finite_gradients_may_overflow(tmp_path: Path, storage: EventStorage) -> None:
    loop = toy_loop(tmp_path, [{"image": torch.full((3,), 1e30)}], skip=False)
    loop.run_step()
    assert loop.model.weight.tolist() == pytest.approx([-5e29] * 3)
    assert "grad_norm" not in storage.latest()  # metrics.json has no infinity


def test_other_errors_of_the_forward_pass(tmp_path: Path, storage: EventStorage) -> None:
    for error in (AssertionError("a shape"), ValueError("NaN"), RuntimeError("NaN")):
        with pytest.raises(type(error)):
            toy_loop(tmp_path, [{**GOOD, "error": error}]).run_step()
        assert not says_nonfinite(error)
    for error in (FloatingPointError("x"), AssertionError("contains infinite or NaN!")):
        toy_loop(tmp_path, [{**GOOD, "error": error}]).run_step()
        assert says_nonfinite(error)


# ---- Two processes.


def train_together(rank: int, folder: Path) -> None:
    """Only the second process has a bad loss, a bad gradient, a bad forward."""
    shapes, teacher = json.loads((folder / "inputs.json").read_text())
    cfg = config("faster", shapes, {"faster": teacher}, folder / "skip", *SKIP)
    report: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            spoil(patch, "losses", FitNet, "p3", infinite, at=(1,))  # its gradient is finite
            spoil(patch, "losses", FitNet, "p4", BadGradient.apply, at=(3,))
        watch = Watch()
        trainer = Trainer(cfg, [watch])
        trainer.train()
        states = [x["model"] for x in (*watch.states, state(trainer))]
        report["changed"] = [differences(*pair) != [] for pair in pairwise(states)]
        report["skips"] = trainer._trainer.guard.skips
        report["weights"] = {k: v.detach() for k, v in trainer.student.named_parameters()}
        with pytest.raises(NumericalError) as error, EventStorage(7):
            trainer._trainer.guard.failed(FloatingPointError("Inf/NaN."))
        report["alone"] = str(error.value)
        cfg = config("faster", shapes, {"faster": teacher}, folder / "stop")
        trainer, report["message"] = stopped(cfg)
    comm.synchronize()
    torch.save(report, folder / f"{rank}.pth")


@pytest.mark.slow
@starts_processes
@needs_loopback
def test_two_processes_decide_alike(shapes: Shapes, teachers: Teachers, tmp_path: Path) -> None:
    (tmp_path / "inputs.json").write_text(json.dumps([shapes, teachers["faster"]]))
    spawn(train_together, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    assert first["changed"] == second["changed"] == [True, False, True, False]
    assert first["skips"] == second["skips"] == 2
    assert differences(first["weights"], second["weights"]) == []
    # Only the process with the bad loss or gradient writes a reproducer.
    assert {p.name for p in (tmp_path / "skip" / "nonfinite").glob("*.pth")} == {
        "iteration_0000001_rank_1.pth",
        "iteration_0000003_rank_1.pth",
        "iteration_0000007_rank_0.pth",
        "iteration_0000007_rank_1.pth",
    }
    assert first["message"] == second["message"]
    assert first["message"].startswith("Iteration 1: loss_fitnet/p3 is inf (images ")
    assert "iteration_0000001_rank_1.pth` repeats" in first["message"]
    assert "the step cannot be skipped, because the other processes wait" in second["alone"]


# ---- Reproducers.


@pytest.mark.e2e
def test_the_reproducer_has_plain_types_only(
    shapes: Shapes, teachers: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAULTS["image"][1](monkeypatch)
    watch = Watch()
    trainer, _ = stopped(config("retinanet", shapes, teachers, tmp_path), watch)
    saved = torch.load(reproducer(tmp_path), weights_only=True)
    assert (saved["iteration"], saved["rank"], saved["seed"]) == (AT, 0, 0)
    assert saved["what"].startswith("loss_cls is nan")
    assert saved["losses"].keys() >= {"loss_cls", "loss_fitnet/p3"}
    assert saved["student_state"] == watch.states[-1]["student"]
    assert differences(saved["model"], dict(watch.states[-1]["model"])) == []
    assert [x["file_name"] for x in saved["batch"]] == images_of(trainer)
    assert "DISTILL" in saved["config"]


class Colour(enum.IntEnum):
    RED = 3


def test_batches_make_a_round_trip() -> None:
    instances = Instances((40, 50))
    instances.gt_boxes = Boxes(torch.rand(2, 4))
    instances.gt_masks = BitMasks(torch.rand(2, 40, 50) > 0.5)
    instances.gt_classes = torch.tensor([1, 2])
    instances.gt_keypoints = Keypoints(torch.rand(2, 5, 3))
    polygons = Instances((40, 50))
    square = np.array([1.0, 1, 9, 1, 9, 9, 1, 9])
    polygons.gt_masks = PolygonMasks([[square, square + 20], [square[::-1]]])
    polygons.proposal_boxes = RotatedBoxes(torch.rand(2, 5))
    batch = [
        {"image": torch.rand(3, 40, 50), "instances": instances, "file_name": "a/b.jpg"},
        {"sem_seg": torch.ones(4, 5, dtype=torch.long), "instances": polygons, "height": 40},
    ]
    first, second = from_plain(to_plain(batch))
    assert torch.equal(first["image"], batch[0]["image"]) and first["file_name"] == "a/b.jpg"
    back = first["instances"]
    assert back.image_size == (40, 50) and len(back) == 2
    for name, kind in (("gt_boxes", Boxes), ("gt_masks", BitMasks), ("gt_keypoints", Keypoints)):
        assert type(back.get(name)) is kind
        assert torch.equal(back.get(name).tensor, instances.get(name).tensor)
    assert torch.equal(back.gt_classes, instances.gt_classes)
    back = second["instances"]
    assert type(back.proposal_boxes) is RotatedBoxes
    for ours, theirs in zip(back.gt_masks.polygons, polygons.gt_masks.polygons, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(second["sem_seg"], batch[1]["sem_seg"]) and second["height"] == 40
    assert first["instances"].gt_boxes.tensor is not instances.gt_boxes.tensor  # a copy


def test_whatever_a_mapper_returns_can_be_saved(tmp_path: Path) -> None:
    odd = {
        "scalar": np.float32(1.5),
        "integer": np.int64(7),
        "text": np.str_("seven"),
        "flag": np.bool_(True),
        "array": np.arange(6, dtype=">i4").reshape(2, 3)[:, ::-1],
        "names": np.array(["a", "b"]),
        "objects": np.array([None, {}], dtype=object),
        "enum": Colour.RED,
        "nothing": None,
        "path": Path("a") / "b.jpg",
        "set": {1},
        "bytes": b"x",
        "pair": (1, [2.5, "x"]),
        7: object(),
    }
    torch.save(to_plain(odd), tmp_path / "odd.pth")
    saved = torch.load(tmp_path / "odd.pth", weights_only=True)
    assert saved["scalar"] == 1.5 and saved["integer"] == 7 and saved["flag"] is True
    assert type(saved["text"]) is str and saved["text"] == "seven"
    assert saved["array"].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert type(saved["enum"]) is int and saved["nothing"] is None
    assert saved["path"] == "a/b.jpg" and saved["pair"] == [1, [2.5, "x"]]
    assert "object object" in saved["7"] and isinstance(saved["objects"], str)

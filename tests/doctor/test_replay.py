"""Test that a saved step is repeated to the last bit, and that its cause is found."""

import io
import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from distill import cli
from distill.doctor.replay import Replay, _is_nonfinite, _watch_modules, replay, show
from distill.engine import Trainer
from distill.errors import DistillError
from distill.heads.fitnet import FitNet
from distill.structures import Batch, NetworkOutputs
from distill.utils.old_names import HEADS as HEADS_BEFORE
from distill.utils.old_names import LOSSES
from tests.support.nonfinite import (
    FAULTS,
    HEADS,
    BadGradient,
    Teachers,
    config,
    nan,
    reproducer,
    spoil,
    spoilt_teacher,
    stopped,
    write_teachers,
)
from tests.support.processes import call, starts_processes
from tests.support.trainings import Shapes, semantic_images


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Teachers:
    return write_teachers(tmp_path_factory.mktemp("teachers"))


def same(a: dict[str, float], b: dict[str, float]) -> bool:
    """Compare to the last bit; all NaN are equal."""
    return {k: repr(v) for k, v in a.items()} == {k: repr(v) for k, v in b.items()}


# ---- Sources.

FIRST = {
    "task loss": "output of student.roi_heads (StandardROIHeads)",
    "level of a distillation loss": "output of heads.FitNet (FitNet)",
    "gradient": "gradient of loss_fitnet/p3 in student.backbone.fpn_output3.weight",
    "image": "image {second}",
    "proposals": "image {second}",
}


@pytest.mark.e2e
@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_thing_that_is_not_finite(
    fault: str,
    shapes: Shapes,
    teachers: Teachers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, inject, _ = FAULTS[fault]
    inject(monkeypatch)
    trainer, message = stopped(config(family, shapes, teachers, tmp_path))
    torch.manual_seed(1234)  # nothing depends on earlier random numbers
    result = replay(str(reproducer(tmp_path)))

    second = trainer._trainer.guard._batch[1]["file_name"]
    assert result.reproduced and result.sources[0] == FIRST[fault].format(second=second)
    assert result.what in message
    if fault == "proposals":
        assert result.error and "contain Inf/NaN" in result.error and result.losses == {}
    else:
        assert result.error is None
        assert len(result.losses) >= 4 and same(result.losses, result.saved_losses)
    assert all("gradient" in x for x in result.sources) == (fault == "gradient")


@pytest.mark.e2e
@pytest.mark.parametrize("family", HEADS)
def test_families(
    family: str,
    shapes: Shapes,
    teachers: Teachers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random proposals, random masks and running statistics are as in the run."""
    if family == "semantic":
        semantic_images(monkeypatch)
    spoil(monkeypatch, "losses", FitNet, "p4", nan)
    stopped(config(family, shapes, teachers, tmp_path))
    result = replay(str(reproducer(tmp_path)))
    assert result.saved_losses.keys() > {"loss_fitnet/p3", "loss_fitnet/p4"}
    assert [k for k, v in result.losses.items() if not math.isfinite(v)] == ["loss_fitnet/p4"]
    assert same(result.losses, result.saved_losses)
    assert result.sources == ["output of heads.FitNet (FitNet)", "loss loss_fitnet/p4"]


@pytest.mark.e2e
def test_a_batch_in_parts(
    shapes: Shapes, teachers: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "losses", FitNet, "p4", nan)
    opts = ("SOLVER.ACCUMULATE", 2, "MODEL.DISTILL.IMA.MASK_RATIO", 0.5)
    stopped(config("faster", shapes, teachers, tmp_path, *opts))
    result = replay(str(reproducer(tmp_path)))
    assert same(result.losses, result.saved_losses) and "loss_ima" in result.losses
    assert result.sources[-1] == "loss loss_fitnet/p4"


@pytest.mark.e2e
def test_the_balance_is_that_of_the_step(
    shapes: Shapes, teachers: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factors of the run are in the file; without them the gradient would be 0."""
    spoil(monkeypatch, "losses", FitNet, "p4", lambda x: x * 1e30)
    opts = ("MODEL.DISTILL.BALANCE.MODE", "gradient", "MODEL.DISTILL.BALANCE.RATIO", 1e30)
    trainer, _ = stopped(config("faster", shapes, teachers, tmp_path, *opts))
    saved = torch.load(reproducer(tmp_path), weights_only=True)
    state = trainer._trainer.guard.model.balance.state_dict()
    assert saved["balance"] == state
    assert state["measured"]["backbone.p4"]["FitNet"]
    assert replay(str(reproducer(tmp_path))).reproduced


@pytest.mark.slow
@pytest.mark.e2e
def test_a_quantized_student_has_its_ranges(
    shapes: Shapes, teachers: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "losses", FitNet, "p4", nan)
    opts = ("SOLVER.QAT.ENABLED", True, "SOLVER.QAT.CALIBRATION_ITERS", 1)
    opts += ("MODEL.WEIGHTS", "student.pth")  # which only the check of the config reads
    trainer, _ = stopped(config("faster", shapes, teachers, tmp_path, *opts))
    assert trainer.quantization.active
    result = replay(str(reproducer(tmp_path)))
    assert same(result.losses, result.saved_losses) and result.reproduced


@pytest.mark.e2e
def test_a_file_of_a_version_without_a_balance(
    shapes: Shapes, teachers: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "losses", FitNet, "p4", nan)
    stopped(config("faster", shapes, teachers, tmp_path))
    path = reproducer(tmp_path)
    saved = torch.load(path, weights_only=True)
    content = yaml.safe_load(saved["config"])
    del content["MODEL"]["DISTILL"]["BALANCE"], saved["balance"]
    torch.save({**saved, "config": yaml.safe_dump(content)}, tmp_path / "old.pth")
    result = replay(str(tmp_path / "old.pth"))
    assert same(result.losses, result.saved_losses) and result.reproduced


@pytest.mark.e2e
def test_random_masks_are_those_of_the_step(
    shapes: Shapes,
    teachers: Teachers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, "losses", FitNet, "p4", nan)
    opts = ("MODEL.DISTILL.IMA.MASK_RATIO", 0.5)
    stopped(config("faster", shapes, teachers, tmp_path, *opts))
    path = reproducer(tmp_path)
    assert same((result := replay(str(path))).losses, result.saved_losses)
    for key in ("seed", "iteration", "rank"):
        saved = torch.load(path, weights_only=True)
        saved[key] += 1
        torch.save(saved, tmp_path / "other.pth")
        other = replay(str(tmp_path / "other.pth")).losses
        assert other["loss_ima"] != result.losses["loss_ima"], key
        assert other["loss_fitnet/p3"] == result.losses["loss_fitnet/p3"], key


@pytest.mark.e2e
def test_old_names_of_heads_and_losses(
    shapes: Shapes,
    teachers: Teachers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    semantic_images(monkeypatch)
    spoil(monkeypatch, "losses", FitNet, "p4", nan)
    stopped(config("semantic", shapes, teachers, tmp_path))
    path = reproducer(tmp_path)
    result = replay(str(path))
    saved = torch.load(path, weights_only=True)
    for part, new, old in (("model", "heads.CIRKD", "heads.Memory"), ("losses", "cirkd", "memory")):
        assert any(new in key for key in saved[part]), part
        saved[part] = {key.replace(new, old): x for key, x in saved[part].items()}
    torch.save(saved, tmp_path / "old.pth")
    monkeypatch.setitem(HEADS_BEFORE, "Memory", "CIRKD")
    monkeypatch.setitem(LOSSES, "memory", "cirkd")
    again = replay(str(tmp_path / "old.pth"))
    assert same(again.saved_losses, result.saved_losses) and again.sources == result.sources


@pytest.mark.e2e
def test_mixed_precision_and_overrides(
    shapes: Shapes,
    teachers: Teachers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, "losses", FitNet, "p4", nan)
    stopped(config("faster", shapes, teachers, tmp_path, "SOLVER.AMP.ENABLED", True))
    path = str(reproducer(tmp_path))
    assert same((result := replay(path)).losses, result.saved_losses)
    exact = replay(path, ["SOLVER.AMP.ENABLED", "False"])
    assert exact.losses["loss_fitnet/p3"] != result.losses["loss_fitnet/p3"]


@pytest.mark.e2e
def test_a_weight_of_the_teacher(
    shapes: Shapes,
    tmp_path: Path,
) -> None:
    teacher = {"faster": spoilt_teacher(tmp_path / "teacher", "faster")}
    stopped(config("faster", shapes, teacher, tmp_path))
    result = replay(str(reproducer(tmp_path, iteration=0)))
    assert result.sources[:2] == [
        "weight teacher.backbone.fpn_output3.bias",
        "output of teacher.backbone.fpn_output3 (Conv2d)",
    ]


@pytest.mark.e2e
def test_a_weight_of_the_student(
    shapes: Shapes,
    teachers: Teachers,
    tmp_path: Path,
) -> None:
    """The weight is NaN, as after a learning rate that is far too high."""
    trainer = Trainer(config("retinanet", shapes, teachers, tmp_path))
    with torch.no_grad():
        trainer.student.head.bbox_pred.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(DistillError, match="Iteration 0: loss_box_reg is nan"):
        trainer.train()
    result = replay(str(reproducer(tmp_path, iteration=0)))
    assert result.sources[:2] == [
        "weight student.head.bbox_pred.weight",
        "output of student.head.bbox_pred (Conv2d)",
    ]


def again(path: Path) -> None:
    result = replay(str(path))
    same_bits = {k: repr(v) == repr(result.saved_losses[k]) for k, v in result.losses.items()}
    print(json.dumps([result.sources[0], same_bits]))


@starts_processes
def test_another_process_has_the_same_losses(shapes: Shapes, tmp_path: Path) -> None:
    teacher = {"retinanet": spoilt_teacher(tmp_path / "teacher", "retinanet")}
    stopped(config("retinanet", shapes, teacher, tmp_path))
    done = call(again, reproducer(tmp_path, iteration=0), folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    source, same_bits = json.loads(done.stdout.splitlines()[-1])
    assert source == "weight teacher.backbone.fpn_output3.bias"
    assert same_bits.keys() > {"loss_cls", "loss_fitnet/p2"} and all(same_bits.values())


# ---- Modules.


class Shifted(nn.Module):
    """Module that adds a number to the output of an inner module."""

    def __init__(self, inner: nn.Module, shift: float):
        super().__init__()
        self.inner = inner
        self.shift = shift

    def forward(self, *, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.inner(x) + self.shift}


def sources_of(network: nn.Module, x: Tensor) -> list[str]:
    sources: list[str] = []
    with _watch_modules(network, sources):
        network(x)
    with torch.no_grad():
        network(x * math.nan)  # after the context nothing is added
    return sources


class Chain(nn.Module):
    def __init__(self, *shifts: float):
        super().__init__()
        self.parts = nn.ModuleList(Shifted(nn.Linear(2, 2), x) for x in shifts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x=x)["out"]
        return x


def test_the_innermost_module_is_named_once() -> None:
    x = torch.ones(1, 2)
    assert sources_of(Chain(0, 0), x) == []
    assert sources_of(Chain(0, math.inf, 0), x) == ["output of parts.1 (Shifted)"]
    broken = Chain(0, math.nan)
    nn.init.constant_(broken.parts[0].inner.weight, math.inf)
    assert sources_of(broken, x) == ["output of parts.0.inner (Linear)"]
    assert sources_of(Chain(0), x * math.nan) == []


def test_values_that_are_not_finite() -> None:
    bad = torch.tensor([1.0, math.nan])
    boxes = Instances((4, 4), gt_boxes=Boxes(torch.tensor([[0.0, 0, math.inf, 1]])))
    for value in (
        bad,
        {"a": [bad]},
        (1, bad),
        boxes,
        ImageList(bad, [(1, 1)]),
        NetworkOutputs(Batch([], (4, 4)), features={"p2": bad}),
        NetworkOutputs(Batch([{"image": bad}], (4, 4))),
    ):
        assert _is_nonfinite(value), value
    fine = Instances((4, 4), gt_boxes=Boxes(torch.ones(1, 4)), gt_classes=torch.ones(1).long())
    for value in (
        torch.ones(2),
        "nan",
        None,
        math.nan,
        fine,
        NetworkOutputs,
        [],
        torch.tensor([True]),
    ):
        assert not _is_nonfinite(value), value


# ---- Command line.


@pytest.fixture(scope="module")
def saved(
    shapes: Shapes,
    teachers: Teachers,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a reproducer whose step is finite without the patch."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, "losses", FitNet, "p3", BadGradient.apply)
        stopped(config("faster", shapes, teachers, folder))
    return reproducer(folder)


@pytest.mark.e2e
def test_exit_codes(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["replay", str(saved)]) == 1
    output = capsys.readouterr().out
    assert "Everything is finite here." in output and "first not finite" not in output
    spoil(monkeypatch, "losses", FitNet, "p3", BadGradient.apply)
    assert cli.main(["replay", str(saved)]) == 0
    output = capsys.readouterr().out
    assert "The run said: the gradient of loss_fitnet/p3 in student." in output
    assert "first not finite: gradient of loss_fitnet/p3 in student.backbone.fpn_output3" in output
    assert "then: " in output and " more\n" in output
    row = next(x for x in output.splitlines() if "loss_fitnet/p2" in x)
    before, here = row.replace("│", " ").split()[1:]
    assert before == here and float(here) > 0


def test_text_of_the_file_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    odd = Replay("[/b] said", {"[red]loss": 1.0}, {}, ["image a[/b].jpg"], "[x]")
    show(odd)
    output = capsys.readouterr().out
    for text in ("[/b] said", "[red]loss", "first not finite: image a[/b].jpg", "forward: [x]"):
        assert text in output


def test_a_long_path_stays_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/".join(["folder"] * 40)
    show(Replay("x", {}, {}, [f"image {path}"]))
    assert path in capsys.readouterr().out


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("hacked",)


def altered(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {**content, **changes}


def with_batch(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {**content, "batch": change(content["batch"])}


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "code": lambda content: {**content, "what": Evil()},
    "a list": lambda content: [content],
    "a checkpoint": lambda content: {"model": content["model"], "iteration": 3},
    "a key is missing": lambda content: {k: v for k, v in content.items() if k != "rank"},
    "a number for a text": altered(config=3),
    "no config": altered(config="nothing"),
    "code in the config": altered(config="SEED: !!python/object/apply:os.mkdir [hacked]"),
    "unknown key": altered(config="NEVER_HEARD: 1"),
    "surrogates": altered(config="SEED: \ud800"),
    "a negative seed": altered(seed=-1),
    "no model": altered(model={}),
    "text for a weight": lambda x: altered(model=dict.fromkeys(x["model"], "1"))(x),
    "text for a loss": altered(losses={"loss": "high"}),
    "an odd batch": altered(batch=[1, 2]),
    "an empty batch": altered(batch=[]),
    "no image": with_batch(lambda batch: [{"file_name": "x"}] * 2),
    "an odd image": with_batch(lambda batch: [{**x, "image": "x"} for x in batch]),
    "an odd size": with_batch(lambda b: [{**x, "instances": {"is": "Instances"}} for x in b]),
    "an odd kind": with_batch(lambda b: [{**x, "instances": {"is": []}} for x in b]),
    "odd boxes": with_batch(
        lambda b: [{**x, "instances": {"is": "Boxes", "tensor": "x"}} for x in b]
    ),
}


def check_refusal(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["replay", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "Traceback" not in line
    return line


@pytest.mark.e2e
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_reproducer_is_refused(
    name: str,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    content = torch.load(saved, weights_only=True)
    torch.save(BROKEN[name](content), "other.pth")
    capsys.readouterr()
    assert "other.pth" in check_refusal(Path("other.pth"), capsys)
    assert not Path("hacked").exists()


@pytest.mark.e2e
def test_files_that_are_no_reproducer_at_all(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.pth"
    assert "there is no file" in check_refusal(path, capsys)
    buffer = io.BytesIO()
    pickle.dump(Evil(), buffer)
    for content in (b"", b"text", saved.read_bytes()[:-5000], buffer.getvalue()):
        path.write_bytes(content)
        assert "cannot be read" in check_refusal(path, capsys)
    assert not Path("hacked").exists()


@pytest.mark.e2e
def test_a_state_sets_nothing_else_of_the_student(saved: Path, tmp_path: Path) -> None:
    content = torch.load(saved, weights_only=True)
    content["student_state"] = {"forward": "x", "training": False, "backbone": 1}
    torch.save(content, tmp_path / "other.pth")
    assert same(replay(str(tmp_path / "other.pth")).losses, replay(str(saved)).losses)


@pytest.mark.e2e
def test_overrides_are_checked(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["replay", str(saved), "SOLVER.NOTHING", "1"]) == 2
    assert "SOLVER.NOTHING" in capsys.readouterr().err
    assert cli.main(["replay", str(saved), "MODEL.DISTILL.TEACHER.WEIGHTS", "gone.pth"]) == 2
    assert "gone.pth" in capsys.readouterr().err

"""Test periodic checkpoints, the best checkpoint, and warnings in the log."""

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, get_event_storage

from distill.engine import Trainer, evaluate_finished
from distill.engine.hooks import BestCheckpointHook, LossHealthHook, median_of_nonzero
from distill.heads import DistillHead
from distill.launch.main import finished_checkpoint, main
from tests.support.networks import distill_opts, write_config
from tests.support.processes import call, needs_loopback, starts_processes, with_forks
from tests.support.trainings import (
    Interrupted,
    Interruption,
    differences,
    trainable_cfg,
    write_teacher,
)

CLASSES = ("MODEL.ROI_HEADS.NUM_CLASSES", 8)
Shapes = tuple[str, str, str]


def config(shapes: Shapes, output: Path, *opts: Any) -> CfgNode:
    """Return the config of a plain detector: these hooks do not depend on heads."""
    return trainable_cfg("faster", shapes, output, *opts, norm="BN")


def train(cfg: CfgNode, *hooks: HookBase, resume: bool = False) -> Trainer:
    seed_all_rng(3)
    trainer = Trainer(cfg, hooks)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def names(folder: Path) -> list[str]:
    return sorted(x.name for x in folder.glob("*.pth"))


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


# ---- Checkpoints.


@pytest.mark.e2e
@pytest.mark.parametrize("keep", [0, 2])
def test_the_newest_checkpoints_are_kept(keep: int, shapes: Shapes, tmp_path: Path) -> None:
    schedule = ("SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 1)
    train(config(shapes, tmp_path, *schedule, "SOLVER.KEEP_CHECKPOINTS", keep))
    kept = [f"model_{k:07d}.pth" for k in range(4)][-keep:]
    assert names(tmp_path) == [*kept, "model_final.pth"]
    assert {x.stem for x in tmp_path.glob("*.sha256")} == {*kept, "model_final.pth"}
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.e2e
def test_checkpoints_of_an_earlier_run_are_not_the_newest(shapes: Shapes, tmp_path: Path) -> None:
    """Otherwise those of this run would be removed, and a resume would use the earlier run."""
    stale = tmp_path / "model_0000099.pth"
    stale.write_bytes(b"of another run, or damaged")
    os.utime(stale, (1e9, 1e9))
    schedule = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1)
    cfg = config(shapes, tmp_path, *schedule, "SOLVER.KEEP_CHECKPOINTS", 1)
    with pytest.raises(Interrupted):
        train(cfg, Interruption(2))
    assert names(tmp_path) == ["model_0000001.pth"]
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2


# ---- Best checkpoint.

SERIES = {1: 3.0, 2: 9.0, 3: math.nan, 4: 5.0, 5: 9.0, 6: 2.0}  # by finished iterations
LAST = len(SERIES)


class Series(dict[int, float]):
    """Values by number of finished iterations, and the iterations at which they were asked for."""

    at: list[int]


@pytest.fixture
def evaluation(monkeypatch: pytest.MonkeyPatch) -> Series:
    """Replace the evaluations by a series of values."""
    series = Series(SERIES)
    series.at = []

    def test(cfg: CfgNode, model: Any) -> dict[str, dict[str, float]]:
        series.at.append(get_event_storage().iter)
        return {"bbox": {"AP": series[min(get_event_storage().iter + 1, LAST)], "AP50": 1.0}}

    monkeypatch.setattr(Trainer, "test", staticmethod(test))
    return series


def evaluated(shapes: Shapes, output: Path, *opts: Any) -> CfgNode:
    best = ("TEST.BEST_METRIC", "bbox/AP", "TEST.EVAL_PERIOD", 1)
    schedule = ("SOLVER.MAX_ITER", LAST, "SOLVER.CHECKPOINT_PERIOD", 2)
    sets = ("DATASETS.TEST", (shapes[0],))
    return config(shapes, output, *best, *schedule, *sets, *opts)


@pytest.mark.e2e
def test_the_best_checkpoint(evaluation: Series, shapes: Shapes, tmp_path: Path) -> None:
    """The first of equal values is the best. NaN, COCO's AP without predictions, does not count."""
    every = ("SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.KEEP_CHECKPOINTS", 5)
    train(evaluated(shapes, tmp_path, *every))
    best = load(tmp_path / "model_best.pth")
    assert (best["iteration"], best["bbox/AP"]) == (1, 9.0)
    assert differences(best["model"], load(tmp_path / "model_0000001.pth")["model"]) == []
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    hooks = load(tmp_path / "model_final.pth")["trainer"]["hooks"]
    assert hooks["BestCheckpointHook"] == {"metric": "bbox/AP", "best": 9.0}


@pytest.mark.e2e
def test_the_last_evaluation_counts(evaluation: Series, shapes: Shapes, tmp_path: Path) -> None:
    evaluation[LAST] = 10.0
    train(evaluated(shapes, tmp_path))
    best, final = load(tmp_path / "model_best.pth"), load(tmp_path / "model_final.pth")
    assert (best["iteration"], best["bbox/AP"]) == (final["iteration"], 10.0)
    assert differences(best["model"], final["model"]) == []


@pytest.mark.e2e
def test_a_failing_last_evaluation_loses_nothing(
    evaluation: dict[int, float], shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume of the finished training evaluates, and keeps the results as the training does."""
    cfg = evaluated(shapes, tmp_path / "a", "TEST.EVAL_PERIOD", 0)
    train(cfg)
    failing = evaluated(shapes, tmp_path / "b", "TEST.EVAL_PERIOD", 0)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Trainer, "test", lambda *args: (_ for _ in ()).throw(OSError("no image")))
        train(failing)
    assert names(tmp_path / "b")[-1] == "model_final.pth"
    with monkeypatch.context() as patch:
        patch.setattr("distill.engine.trainer.evaluate", lambda *args: {"bbox": {"AP": 2.0}})
        evaluate_finished(failing, str(tmp_path / "b" / "model_final.pth"))
        written = (tmp_path / "b" / "model_best.pth").stat().st_mtime_ns
        evaluate_finished(failing, str(tmp_path / "b" / "model_final.pth"))  # once more
    for name in ("model_final.pth", "model_best.pth"):
        assert differences(load(tmp_path / "a" / name), load(tmp_path / "b" / name)) == []
    assert (tmp_path / "b" / "model_best.pth").stat().st_mtime_ns == written
    rows = [json.loads(x) for x in (tmp_path / "b" / "metrics.json").read_text().splitlines()]
    assert [row["bbox/AP"] for row in rows if "bbox/AP" in row] == [2.0]
    assert rows[-1]["iteration"] == LAST - 1


@pytest.mark.e2e
def test_without_a_period_the_end_is_evaluated(
    evaluation: Series, shapes: Shapes, tmp_path: Path
) -> None:
    train(evaluated(shapes, tmp_path, "TEST.EVAL_PERIOD", 0))
    assert load(tmp_path / "model_best.pth")["bbox/AP"] == SERIES[LAST]


@pytest.mark.e2e
@pytest.mark.parametrize("series", [SERIES, {**SERIES, 3: 11.0}, {**SERIES, 6: 11.0}])
@pytest.mark.parametrize("crash", [3, 5])
def test_a_resumed_run_has_the_same_best(
    crash: int,
    series: dict[int, float],
    evaluation: Series,
    shapes: Shapes,
    tmp_path: Path,
) -> None:
    """This holds also if the best came after the checkpoint from which the run resumes."""
    evaluation.update(series)
    train(evaluated(shapes, tmp_path / "a"))
    cfg = evaluated(shapes, tmp_path / "b")
    with pytest.raises(Interrupted):
        train(cfg, Interruption(crash))
    assert (tmp_path / "b" / "last_checkpoint").read_text() == f"model_000000{crash - 2}.pth"
    trainer = train(cfg, resume=True)
    assert trainer.start_iter == crash - 1
    ends = [load(tmp_path / x / "model_best.pth") for x in "ab"]
    assert differences(*ends) == [] and ends[0]["bbox/AP"] == max(
        x for x in series.values() if x == x
    )


@pytest.mark.e2e
def test_an_interrupted_run_does_not_compare_again(
    evaluation: Series, shapes: Shapes, tmp_path: Path
) -> None:
    """detectron2 evaluates even if the last iteration fails."""
    evaluation[LAST] = 10.0
    with pytest.raises(Interrupted):
        train(evaluated(shapes, tmp_path), Interruption(LAST - 1))
    assert load(tmp_path / "model_best.pth")["bbox/AP"] == 9.0


@pytest.mark.e2e
def test_an_unknown_metric_is_a_warning(
    evaluation: Series,
    shapes: Shapes,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    train(evaluated(shapes, tmp_path, "TEST.BEST_METRIC", "bbox/APs"))
    assert "TEST.BEST_METRIC bbox/APs is not a metric of the evaluation" in caplog.text
    assert "model_best.pth" not in names(tmp_path)


def test_the_best_of_another_metric_does_not_count() -> None:
    first, second = (BestCheckpointHook(None, 1, x) for x in ("bbox/AP", "segm/AP"))  # type: ignore[arg-type]
    assert first.state_dict() == {}
    first.best = 50.0
    second.load_state_dict(first.state_dict())
    assert second.best is None
    second = BestCheckpointHook(None, 1, "bbox/AP")  # type: ignore[arg-type]
    second.load_state_dict(first.state_dict())
    assert second.best == 50.0


# ---- Early end.

FINAL = "model_final.pth"
# The best of SERIES is at 2 finished iterations, so a patience of 2 ends after the evaluation at 4.
WAITED = ("SOLVER.PATIENCE", 2)


@pytest.mark.e2e
def test_a_training_ends_early(
    evaluation: Series,
    shapes: Shapes,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        trainer = train(evaluated(shapes, tmp_path, *WAITED))
    assert (load(tmp_path / FINAL)["iteration"], trainer.iter) == (3, 4)
    assert names(tmp_path) == ["model_0000001.pth", "model_best.pth", FINAL]
    assert (tmp_path / "last_checkpoint").read_text() == FINAL
    assert evaluation.at == [0, 1, 2, 3]
    assert load(tmp_path / "model_best.pth")["iteration"] == 1
    sentence = (
        "Iteration 3: the training ends, as 2 evaluations had no better bbox/AP; the best is "
        "9.0000 of iteration 1"
    )
    assert sentence in caplog.messages and "Exception during training" not in caplog.text


@pytest.mark.e2e
@pytest.mark.parametrize("crash", [1, 3])
def test_a_resumed_training_ends_early_too(
    crash: int, evaluation: Series, shapes: Shapes, tmp_path: Path
) -> None:
    every = (*WAITED, "SOLVER.CHECKPOINT_PERIOD", 1)
    train(evaluated(shapes, tmp_path / "a", *every))
    with pytest.raises(Interrupted):
        train(evaluated(shapes, tmp_path / "b", *every), Interruption(crash))
    train(evaluated(shapes, tmp_path / "b", *every), resume=True)
    assert differences(*(load(tmp_path / x / FINAL) for x in "ab")) == []


@pytest.mark.e2e
def test_a_longer_patience_continues(evaluation: Series, shapes: Shapes, tmp_path: Path) -> None:
    """Patience is no part of the training itself, so the bits are those of a run without it."""
    train(evaluated(shapes, tmp_path / "a"))
    train(evaluated(shapes, tmp_path / "b", *WAITED))
    longer = evaluated(shapes, tmp_path / "b", "SOLVER.PATIENCE", 5)
    assert finished_checkpoint(longer) is None
    evaluation.at.clear()
    train(longer, resume=True)
    assert evaluation.at == [4, 5]
    a, b = (load(tmp_path / x / FINAL) for x in "ab")
    found = b["trainer"]["hooks"].pop("BestCheckpointHook")
    expected = {"metric": "bbox/AP", "best": 9.0, "best_iteration": 1, "waited": 4, "counted": 5}
    assert found == expected
    assert a["trainer"]["hooks"].pop("BestCheckpointHook") == {"metric": "bbox/AP", "best": 9.0}
    assert differences(a, b) == [".trainer.config.SOLVER.PATIENCE"]


@pytest.mark.e2e
def test_patience_that_is_set_at_a_resume(
    evaluation: Series, shapes: Shapes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts from there, because the checkpoint does not say when the best was."""
    with pytest.raises(Interrupted):
        train(evaluated(shapes, tmp_path), Interruption(2))
    with caplog.at_level(logging.INFO):
        train(evaluated(shapes, tmp_path, *WAITED), resume=True)
    assert load(tmp_path / FINAL)["iteration"] == 3
    assert caplog.text.count("the best is 9.0000\n") == 1


ENDED: dict[str, tuple[tuple[Any, ...], bool]] = {
    "the same": ((), True),
    "a shorter patience": (("SOLVER.PATIENCE", 1), True),
    "a longer schedule": (("SOLVER.MAX_ITER", 2 * LAST), True),
    "a longer patience": (("SOLVER.PATIENCE", 3), False),
    "no patience": (("SOLVER.PATIENCE", 0), False),
    "another metric": (("TEST.BEST_METRIC", "bbox/AP50"), False),
}


@pytest.mark.parametrize("case", ENDED)
def test_a_training_that_ended_early_has_finished(
    case: str, shapes: Shapes, tmp_path: Path
) -> None:
    state = {"metric": "bbox/AP", "best": 9.0, "best_iteration": 1, "waited": 2}
    saved = {"iteration": 3, "trainer": {"hooks": {"BestCheckpointHook": state}}}
    torch.save(saved, tmp_path / FINAL)
    opts, finished = ENDED[case]
    cfg = evaluated(shapes, tmp_path, *WAITED, *opts)
    assert finished_checkpoint(cfg) == (str(tmp_path / FINAL) if finished else None)


@pytest.mark.e2e
def test_a_training_without_any_value_ends(
    evaluation: Series,
    shapes: Shapes,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """COCO's AP without detections is no number."""
    evaluation.update(dict.fromkeys(evaluation, math.nan))
    cfg = evaluated(shapes, tmp_path, *WAITED, "SOLVER.CHECKPOINT_PERIOD", 1)
    with pytest.raises(Interrupted):
        train(cfg, Interruption(1))
    with caplog.at_level(logging.INFO):
        train(cfg, resume=True)
    assert load(tmp_path / FINAL)["iteration"] == 1
    assert "as 2 evaluations had no better bbox/AP; there was no value" in caplog.text


@pytest.mark.e2e
def test_the_augmented_evaluation_comes_at_an_early_end(
    evaluation: Series,
    shapes: Shapes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at: list[int] = []

    def augmented(cfg: CfgNode, model: Any) -> dict[str, dict[str, float]]:
        at.append(get_event_storage().iter)
        return {"bbox_TTA": {"AP": 1.0}}

    monkeypatch.setattr(Trainer, "test_with_TTA", staticmethod(augmented))
    train(evaluated(shapes, tmp_path, *WAITED, "TEST.AUG.ENABLED", True))
    assert at == [3]


@pytest.mark.slow
@starts_processes
@needs_loopback
def test_all_processes_end_early_together(shapes: Shapes, tmp_path: Path) -> None:
    """An untrained network detects nothing, so no evaluation has a value."""
    strict = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0)
    cfg = evaluated(shapes, tmp_path / "out", *WAITED, *strict)
    config = write_config(cfg, tmp_path / "config.yaml")
    command = ["--config-file", str(config), "--num-gpus", "2"]
    for options in ([], ["--resume"]):
        ended = call(with_forks, main, [*command, *options], folder=tmp_path)
        assert ended.returncode == 0, ended.stderr
    assert load(tmp_path / "out" / FINAL)["iteration"] == 1


# ---- Warnings.


class Log:
    """Runner of the hook on given scalars of one head, FitNet, by iteration."""

    def __init__(self, caplog: pytest.LogCaptureFixture, **head: Any):
        self.caplog = caplog
        self.hook = LossHealthHook({"FitNet": DistillHead(**head)})

    def warnings(
        self, iterations: int = 60, **scalars: float | Callable[[int], float]
    ) -> list[str]:
        self.caplog.clear()
        with EventStorage() as storage:
            for i in range(iterations):
                storage.iter = i
                for name, value in scalars.items():
                    storage.put_scalar(name, value(i) if callable(value) else value)
                self.hook.trainer = SimpleNamespace(iter=i)
                self.hook.after_step()
        return self.caplog.messages


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    return Log(caplog)


def fitnet(**levels: Any) -> dict[str, Any]:
    return {f"kd_ratio/fitnet/{level}": value for level, value in levels.items()}


def test_a_healthy_run_has_no_warning(log: Log) -> None:
    healthy = {**fitnet(p2=0.4, p3=0.2), "kd_cosine/fitnet": -0.1, "data_share": 0.3}
    assert log.warnings(**healthy) == []


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "large": (fitnet(p2=6.0, p3=6.0), "fitnet is 12 of the task loss, above 10; lower"),
    "small": (fitnet(p2=1e-4, p3=1e-4), "fitnet is 0.0002 of the task loss, below 0.001; raise"),
    "dead": (fitnet(p2=0.0, p3=0.0), "fitnet is dead: its loss is exactly 0"),
    "against": (
        {**fitnet(p2=1.0), "kd_cosine/fitnet": -0.7},
        "fitnet has a gradient that opposes that of the task loss (cosine -0.70",
    ),
    "slow data": ({"data_share": 0.75}, "75% of the time is spent waiting for data; raise DATALOA"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_warning_is_given_once(case: str, log: Log) -> None:
    scalars, sentence = CASES[case]
    (warning,) = log.warnings(**scalars)
    assert warning.startswith(f"Iteration 19: {sentence}")
    assert warning.endswith(".")
    assert log.warnings(**scalars) == []


def test_several_problems_are_several_warnings(log: Log) -> None:
    assert len(log.warnings(**fitnet(p2=20.0), **{"kd_cosine/fitnet": -1.0}, data_share=0.9)) == 3


def test_a_level_or_a_batch_without_objects_is_no_problem(log: Log) -> None:
    """Most batches have no object on the coarsest level, and many have no object."""
    rare = {"p6": lambda i: float(i % 10 == 0)}
    assert log.warnings(**fitnet(p2=0.5, p5=0.0, **rare)) == []
    assert log.warnings(**fitnet(p2=lambda i: float(i % 5 == 0))) == []


def test_a_single_bad_iteration_is_no_problem(log: Log) -> None:
    scalars = fitnet(p2=lambda i: 1000.0 if i == 7 else 0.5)
    assert log.warnings(**scalars, data_share=lambda i: 1.0 if i < 3 else 0.1) == []


@pytest.mark.parametrize(
    "head",
    [{"weight": 0.0}, {"warmup_iters": 60}, {"stop_iter": 5}],
    ids=["weight", "warm-up", "stopped"],
)
def test_a_head_without_its_full_weight_has_no_warning(
    head: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    for value in (0.0, 1e-6, 100.0):
        scalars = {**fitnet(p2=value), "kd_cosine/fitnet": -1.0}
        assert Log(caplog, **head).warnings(**scalars) == []


def test_values_of_the_warm_up_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    low_at_first = fitnet(p2=lambda i: 1e-5 if i < 35 else 0.5)
    against = {"kd_cosine/fitnet": lambda i: -1.0 if i < 35 else 0.5}
    assert Log(caplog, warmup_iters=35).warnings(**low_at_first, **against) == []
    assert len(Log(caplog).warnings(**low_at_first, **against)) == 2


def test_other_processes_have_no_warning(log: Log) -> None:
    """Only the main process has losses in its log."""
    assert log.warnings(rank_data_time=1.0) == []


def test_median_of_nonzero() -> None:
    assert median_of_nonzero([]) == median_of_nonzero([0.0, 0.0]) == 0
    assert median_of_nonzero([0.0, 3.0, 0.0, 1.0, 2.0]) == 2


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run_with_a_tiny_weight(
    shapes: Shapes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = write_teacher(tmp_path / "teacher", "faster", *CLASSES)
    opts = [*distill_opts("faster", ("FitNet", "IMA")), *teacher, "SOLVER.MAX_ITER", 41]
    opts += ["MODEL.DISTILL.FITNET.WEIGHT", 1e-9, "MODEL.DISTILL.IMA.WEIGHT", 0.0]
    with caplog.at_level(logging.WARNING):
        train(config(shapes, tmp_path / "out", *opts))
    warnings = [x for x in caplog.messages if "MODEL.DISTILL" in x]
    assert len(warnings) == 1 and "raise MODEL.DISTILL.FITNET.WEIGHT" in warnings[0]
    rows = map(json.loads, (tmp_path / "out" / "metrics.json").read_text().splitlines())
    assert {"kd_ratio/fitnet/p2", "kd_ratio/ima"} <= {x for row in rows for x in row}

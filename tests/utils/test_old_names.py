"""Files of earlier versions: checkpoints, config files, logs and reproducers with old names."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import get_event_storage

from distill.config import get_distill_cfg, merge_from_file, merge_from_list
from distill.engine import Trainer, hooks
from distill.engine.telemetry import rename_losses
from distill.errors import WeightsError
from distill.heads import DISTILL_HEAD_REGISTRY
from distill.solver import ema
from distill.utils.old_names import HEADS, HOOKS, LOSSES, with_renamed_keys
from tests.support.networks import distill_opts
from tests.support.trainings import (
    Interrupted,
    Interruption,
    differences,
    train,
    trainable_cfg,
    write_teacher,
)

Shapes = tuple[str, str, str]


def test_the_names_of_today_exist_and_the_old_ones_do_not() -> None:
    assert [x for x in HOOKS.values() if not (hasattr(hooks, x) or hasattr(ema, x))] == []
    assert [x for x in HEADS.values() if x not in DISTILL_HEAD_REGISTRY] == []
    assert [x for x in HEADS if x in DISTILL_HEAD_REGISTRY] == []


# ---- Config files.


def test_a_yaml_with_old_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(
        "MODEL: {DISTILL: {HEADS: [IMA, MaskKD], MASKKD: {WEIGHT: 3.0}}}\n"
        "OUTPUT_DIR: output/MaskKD/mask_rcnn\n"
    )
    cfg = get_distill_cfg()
    for _ in range(2):
        merge_from_file(cfg, str(old))
    assert tuple(cfg.MODEL.DISTILL.HEADS) == ("IMA", "MaskLogitKD")
    assert cfg.MODEL.DISTILL.MASKLOGITKD.WEIGHT == 3.0
    assert cfg.OUTPUT_DIR == "output/MaskKD/mask_rcnn"  # a path is no name
    (line,) = caplog.messages
    assert line == (
        f"Config file '{old}' has names of an earlier version: "
        "MASKKD is now MASKLOGITKD, MaskKD is now MaskLogitKD."
    )


@pytest.mark.parametrize("old_base", [True, False])
def test_a_file_goes_before_its_base(old_base: bool, tmp_path: Path) -> None:
    base, own = ("MASKKD", "MASKLOGITKD") if old_base else ("MASKLOGITKD", "MASKKD")
    section = "MODEL: {{DISTILL: {{{}: {}}}}}\n"
    (tmp_path / "base.yaml").write_text(section.format(base, "{WEIGHT: 2.0, TEMPERATURE: 4.0}"))
    (tmp_path / "own.yaml").write_text("_BASE_: base.yaml\n" + section.format(own, "{WEIGHT: 5.0}"))
    cfg = get_distill_cfg()
    merge_from_file(cfg, str(tmp_path / "own.yaml"))
    node = cfg.MODEL.DISTILL.MASKLOGITKD
    assert (node.WEIGHT, node.TEMPERATURE) == (5.0, 4.0)


def test_overrides_with_old_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = get_distill_cfg()
    opts = ["MODEL.DISTILL.HEADS", "('MaskKD',)", "MODEL.DISTILL.MASKKD.TEMPERATURE", "2.0"]
    merge_from_list(cfg, [*opts, "OUTPUT_DIR", "MaskKD"], f"the overrides of {tmp_path}")
    assert cfg.MODEL.DISTILL.HEADS == ("MaskLogitKD",)
    assert (cfg.MODEL.DISTILL.MASKLOGITKD.TEMPERATURE, cfg.OUTPUT_DIR) == (2.0, "MaskKD")
    assert [x.split(": ")[1] for x in caplog.messages] == [
        "MaskKD is now MaskLogitKD.",
        "MASKKD is now MASKLOGITKD.",
    ]


# ---- Checkpoints.


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("teacher")
    return write_teacher(folder, "faster", "MODEL.ROI_HEADS.NUM_CLASSES", 8, fpn=24)


def config(shapes: Shapes, teacher: list[Any], output: Path, *opts: Any) -> CfgNode:
    schedule = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
    hooks = ("SOLVER.EMA.DECAY", 0.9, "SOLVER.EMA.WARMUP_ITERS", 0)
    hooks += ("TEST.BEST_METRIC", "bbox/AP", "TEST.EVAL_PERIOD", 1)
    hooks += ("DATASETS.TEST", (shapes[0],))
    opts = (*distill_opts("faster", ("FitNet",)), *teacher, *schedule, *hooks, *opts)
    return trainable_cfg("faster", shapes, output, *opts, norm="BN")


@pytest.fixture(scope="module")
def interrupted(
    shapes: Shapes, teacher: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run with an average, a best metric and a head, stopped after 2 of 4."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        falling_metric(patch)
        train(config(shapes, teacher, folder), Interruption(2))
    return folder


def falling_metric(patch: pytest.MonkeyPatch) -> None:
    """The best evaluation is the first one, before the checkpoint."""
    results = lambda cfg, model: {"bbox": {"AP": 9.0 - get_event_storage().iter}}  # noqa: E731
    patch.setattr(Trainer, "test", staticmethod(results))


def changed(source: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Copy an interrupted run, with another content of its checkpoint."""
    shutil.copytree(source, folder)
    path = folder / "model_0000001.pth"
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)
    Path(f"{path}.sha256").unlink()
    return folder


def renamed(state: dict[str, Any], old: str, new: str) -> None:
    for key in [key for key in state if key.split(".")[0] == new]:
        state[key.replace(new, old)] = state.pop(key)


def with_old_names(saved: dict[str, Any]) -> None:
    states = saved["trainer"]["hooks"]
    assert states.keys() == {"LRScheduler", "EMAHook", "BestCheckpointHook"}
    renamed(states, "WeightsEMA", "EMAHook")
    renamed(states, "BestCheckpoint", "BestCheckpointHook")
    renamed(saved["distill"], "Hint", "FitNet")
    del saved["trainer"]["config"]  # which these versions did not write


@pytest.mark.e2e
def test_a_checkpoint_with_old_names_resumes_to_the_bit(
    interrupted: Path,
    shapes: Shapes,
    teacher: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    falling_metric(monkeypatch)
    monkeypatch.setitem(HEADS, "Hint", "FitNet")  # those that were renamed have no state
    old = changed(interrupted, tmp_path / "old", with_old_names)
    caplog.clear()
    ends = [train(config(shapes, teacher, old), resume=True)]
    assert [x for x in caplog.messages if "earlier version" in x] == [
        "The checkpoint has names of an earlier version: WeightsEMA is now EMAHook, "
        "BestCheckpoint is now BestCheckpointHook.",
        "The checkpoint has names of an earlier version: Hint is now FitNet.",
    ]
    shutil.copytree(interrupted, tmp_path / "new")
    ends.append(train(config(shapes, teacher, tmp_path / "new"), resume=True))
    assert differences(*ends) == []
    assert ends[0]["trainer"]["hooks"]["BestCheckpointHook"]["best"] == 9.0


UNFIT: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[Any, ...], str]] = {
    "unknown hook": (
        lambda saved: saved["trainer"]["hooks"].update(Warmth={"degrees": 3}),
        (),
        "a state of the hook Warmth, which this training lacks; set SOLVER.EMA.DECAY, TEST",
    ),
    "average switched off": (
        lambda saved: None,
        ("SOLVER.EMA.DECAY", 0.0),
        "a state of the hook EMAHook, which this training lacks; set SOLVER.EMA.DECAY, TEST",
    ),
    "no state of a hook": (
        lambda saved: saved["trainer"]["hooks"].pop("LRScheduler"),
        (),
        "no state of the hook LRScheduler, which this training has; set",
    ),
    "unknown head": (
        lambda saved: renamed(saved["distill"], "Hinton", "FitNet"),
        (),
        "a state of the head Hinton, which this training lacks; set MODEL.DISTILL.HEADS as",
    ),
    "head left out": (
        lambda saved: saved["trainer"].pop("config"),
        ("MODEL.DISTILL.HEADS", ()),
        "a state of the head FitNet, which this training lacks; set MODEL.DISTILL.HEADS as",
    ),
    "no state of a head": (
        lambda saved: saved["distill"].clear(),
        (),
        "no state of the head FitNet, which this training has; set MODEL.DISTILL.HEADS as",
    ),
    "no state of heads": (
        lambda saved: saved.pop("distill"),
        (),
        "no state of the head FitNet, which this training has; set MODEL.DISTILL.HEADS as",
    ),
    "no state of the trainer": (
        lambda saved: saved.pop("trainer"),
        (),
        "its iteration and seed are ",
    ),
}


@pytest.mark.e2e
@pytest.mark.parametrize("case", UNFIT)
def test_states_that_do_not_fit_are_errors(
    case: str, interrupted: Path, shapes: Shapes, teacher: list[Any], tmp_path: Path
) -> None:
    change, opts, sentence = UNFIT[case]
    folder = changed(interrupted, tmp_path / "run", change)
    trainer = Trainer(config(shapes, teacher, folder, *opts))
    with pytest.raises(WeightsError) as error:
        trainer.resume_or_load(resume=True)
    assert str(error.value).startswith("--resume: ") and sentence in str(error.value)


# ---- Names of losses.


def test_a_resumed_log_has_one_name_for_a_loss(tmp_path: Path) -> None:
    log = tmp_path / "metrics.json"
    log.write_text('{"loss_maskkd": 1.5, "loss_maskd/p3": 2.5, "kd_ratio/maskkd": 0.5}\n')
    rename_losses(str(log))
    after = '{"loss_masklogitkd": 1.5, "loss_maskd/p3": 2.5, "kd_ratio/masklogitkd": 0.5}\n'
    assert log.read_text() == after
    rename_losses(str(tmp_path / "none.json"))


def test_parts_of_names_stay_as_they_are() -> None:
    losses = {"loss_maskkd": 1, "loss_maskkd/p2": 2, "loss_xmaskkd": 3, "loss_maskkd2": 4}
    assert [*with_renamed_keys(losses, LOSSES, "the losses")] == [
        *("loss_masklogitkd", "loss_masklogitkd/p2", "loss_xmaskkd", "loss_maskkd2"),
    ]

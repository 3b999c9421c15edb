"""A resume of another training is refused before anything is assigned; other values take effect."""

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from torch import Tensor

from distill.checkpoint.compare import optimizer_misfits, tensor_misfits
from distill.config.resume import changed_values, takes_effect, training_values
from distill.engine import Trainer
from distill.errors import WeightsError
from tests.support.cases import for_each
from tests.support.networks import distill_opts, tiny_cfg
from tests.support.trainings import Shapes, Shared, train, trainable_cfg, write_teacher

CLASSES = ("MODEL.ROI_HEADS.NUM_CLASSES", 8)
BIAS = "proposal_generator.rpn_head.conv.bias"
ADAMW = ("SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BASE_LR", 0.001)
Spoil = Callable[[dict[str, Any]], object]


def config(folder: Path, shapes: Shapes, *opts: Any) -> CfgNode:
    """Return the config of a training that reads the teacher in ``folder``/teacher."""
    teacher = [
        *("MODEL.DISTILL.TEACHER.CONFIG_FILE", str(folder / "teacher" / "teacher.yaml")),
        *("MODEL.DISTILL.TEACHER.WEIGHTS", str(folder / "teacher" / "teacher.pth")),
    ]
    schedule = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.EMA.DECAY", 0.9)
    opts = (*distill_opts("faster", ["IMA", "FGD"]), *teacher, *schedule, *ADAMW, *opts)
    return trainable_cfg("faster", shapes, folder / "run", *opts, norm="BN")


@pytest.fixture(scope="module")
def finished(shared: Shared, shapes: Shapes) -> Path:
    """The folder of a teacher, and of a training of 4 iterations with a checkpoint after 2."""

    def fill(folder: Path) -> None:
        write_teacher(folder / "teacher", "faster", *CLASSES)
        train(config(folder, shapes))

    return shared("resume_checks", fill)


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy that was interrupted after 2 iterations, at another place."""
    shutil.copytree(finished, tmp_path / "moved")
    for name in ("model_final.pth", "model_final.pth.sha256", "last_checkpoint"):
        (tmp_path / "moved" / "run" / name).unlink()
    return tmp_path / "moved"


def spoil(folder: Path, change: Spoil) -> None:
    path = folder / "run" / "model_0000001.pth"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    Path(f"{path}.sha256").unlink()


def refused(cfg: CfgNode) -> str:
    """Return the sentence with which a resume is refused, without a change of any tensor."""
    trainer = Trainer(cfg)
    before = copy.deepcopy([trainer.student.state_dict(), trainer.heads.state_dict()])
    with pytest.raises(WeightsError) as e:
        trainer.resume_or_load(resume=True)
    after = [trainer.student.state_dict(), trainer.heads.state_dict()]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(before, after) for k in a)
    assert not trainer.optimizer.state
    return str(e.value)


# ---- Another config.

CHANGED: dict[str, tuple[tuple[Any, ...], list[str]]] = {
    "more classes": (
        ("MODEL.ROI_HEADS.NUM_CLASSES", 9),
        ["MODEL.ROI_HEADS.NUM_CLASSES is 9 but was 8", "OUTPUT_DIR"],
    ),
    "fewer channels": (("MODEL.FPN.OUT_CHANNELS", 8), ["MODEL.FPN.OUT_CHANNELS is 8 but was 16"]),
    "another optimizer": (
        ("SOLVER.OPTIMIZER", "SGD"),
        ["SOLVER.OPTIMIZER is 'SGD' but was 'ADAMW'"],
    ),
    "other heads": (
        ("MODEL.DISTILL.HEADS", ("IMA",)),
        ["MODEL.DISTILL.HEADS is ['IMA'] but was ['IMA', 'FGD']"],
    ),
    "larger batches": (
        ("SOLVER.IMS_PER_BATCH", 4),
        ["SOLVER.IMS_PER_BATCH is 4 but was 2"],
    ),
    "another seed": (("SEED", 1), ["SEED is 1 but was 0"]),
    "another temperature": (
        ("MODEL.DISTILL.FGD.TEMPERATURE", 3.0),
        ["MODEL.DISTILL.FGD.TEMPERATURE"],
    ),
    "other images": (("INPUT.MIN_SIZE_TRAIN", (64,)), ["INPUT.MIN_SIZE_TRAIN is [64]"]),
    "a decay of biases": (
        ("SOLVER.WEIGHT_DECAY_BIAS", 0.5),
        ["the optimizer has groups", "changed: SOLVER.WEIGHT_DECAY_BIAS"],
    ),
}


@pytest.mark.e2e
@pytest.mark.parametrize("case", CHANGED)
def test_another_config(case: str, folder: Path, shapes: Shapes) -> None:
    opts, words = CHANGED[case]
    sentence = refused(config(folder, shapes, *opts))
    assert sentence.startswith("--resume: ") and "model_0000001.pth" in sentence
    assert all(word in sentence for word in words), sentence


@pytest.mark.e2e
def test_another_teacher(folder: Path, shapes: Shapes) -> None:
    path = folder / "teacher" / "teacher.pth"
    state = torch.load(path, weights_only=True)["model"]
    next(iter(state.values())).add_(1)
    torch.save({"model": state}, path)
    assert "MODEL.DISTILL.TEACHER.WEIGHTS is" in refused(config(folder, shapes))


@pytest.mark.e2e
def test_another_input_of_the_teacher(folder: Path, shapes: Shapes) -> None:
    opts = ("MODEL.DISTILL.TEACHER.OPTS", ["INPUT.FORMAT", "RGB"])
    assert "TEACHER.CONFIG_FILE (INPUT.FORMAT)" in refused(config(folder, shapes, *opts))


@pytest.mark.e2e
def test_other_annotations(folder: Path, shapes: Shapes, tmp_path: Path) -> None:
    name, annotations, images = shapes
    content = json.loads(Path(annotations).read_text())
    content["annotations"].pop()
    (tmp_path / "changed.json").write_text(json.dumps(content))
    opts = ("DATASETS.COCO_FORMAT", ((name, str(tmp_path / "changed.json"), images),))
    values = [training_values(config(folder, shapes)), training_values(tiny_cfg("faster"))]
    cfg = config(folder, shapes)
    cfg.merge_from_list(list(opts))
    key = f"DATASETS.COCO_FORMAT '{name}'"
    assert list(changed_values(values[0], training_values(cfg))) == [key]
    assert not takes_effect(key)


@pytest.mark.parametrize("saved", [{}, {"MODEL.DISTILL.BALANCE.MODE": "none"}])
def test_a_run_without_a_balance_goes_on_without_one(saved: dict[str, str]) -> None:
    """Also if it is older than the key, whose default balances it."""
    key, head = "MODEL.DISTILL.BALANCE.MODE", ("MODEL.DISTILL.HEADS", ("LGD",))
    for mode, changed in (("auto", {key: ("none", "gradient")}), ("none", {})):
        own = training_values(tiny_cfg("faster", *head, key, mode))
        old = {k: x for k, x in own.items() if k != key} | saved
        assert changed_values(old, own) == changed
    plain = training_values(tiny_cfg("faster", key, "auto"))
    assert not changed_values({k: x for k, x in plain.items() if k != key}, plain)


# ---- Values that may change.


@pytest.mark.e2e
def test_values_that_take_effect(
    folder: Path, shapes: Shapes, caplog: pytest.LogCaptureFixture
) -> None:
    opts = (*("SOLVER.BASE_LR", 0.002), *("SOLVER.WEIGHT_DECAY", 0.01), *("SOLVER.MAX_ITER", 5))
    opts += (*("MODEL.DISTILL.IMA.WEIGHT", 7.0), *("SOLVER.EMA.DECAY", 0.5))
    trainer = Trainer(config(folder, shapes, *opts))
    with caplog.at_level(logging.WARNING):
        trainer.resume_or_load(resume=True)
    for line in (
        "Iteration 2: SOLVER.BASE_LR is now 0.002; it was 0.001",
        "Iteration 2: SOLVER.MAX_ITER is now 5; it was 4",
        "Iteration 2: MODEL.DISTILL.IMA.WEIGHT is now 7.0",
    ):
        assert line in caplog.text
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.002}
    assert trainer.scheduler.base_lrs == [0.002] * len(trainer.optimizer.param_groups)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.01, 0.0}
    assert trainer.optimizer.state
    assert trainer.ema is not None and trainer.ema.decay == 0.5
    trainer.train()
    assert torch.load(folder / "run" / "model_final.pth", weights_only=True)["iteration"] == 4


@pytest.mark.e2e
def test_values_that_change_nothing(
    folder: Path, finished: Path, shapes: Shapes, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder has moved with the teacher, and the new values are of the evaluation."""
    opts = ("TEST.DETECTIONS_PER_IMAGE", 7, "DATALOADER.NUM_WORKERS", 1, "VIS_PERIOD", 0)
    cfg = config(folder, shapes, *opts, "MODEL.WEIGHTS", "nothing.pth")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.3
    with caplog.at_level(logging.WARNING):
        resumed = train(cfg, resume=True)
    assert "is now" not in caplog.text
    expected = torch.load(finished / "run" / "model_final.pth", weights_only=True)
    assert all(torch.equal(resumed["model"][k], x) for k, x in expected["model"].items())


def test_a_key_that_a_version_lacks_has_its_default() -> None:
    own = training_values(tiny_cfg("faster"))
    saved = {key: value for key, value in own.items() if key != "SOLVER.FLAT_FRACTION"}
    assert not changed_values(saved, own)
    own["SOLVER.FLAT_FRACTION"] = 0.25
    assert changed_values(saved, own) == {"SOLVER.FLAT_FRACTION": (0.5, 0.25)}


def test_heads_that_are_not_used_do_not_matter() -> None:
    cfg = tiny_cfg("faster", *distill_opts("faster", ["ROIKD"]))
    cfg.MODEL.DISTILL.HEADS = ()
    before = training_values(cfg)
    cfg.MODEL.DISTILL.FGD.TEMPERATURE = 3.0
    assert not changed_values(before, training_values(cfg))


# ---- Tensors that do not fit: checkpoints without a config, prepared or damaged ones.


def forget_config(content: dict[str, Any]) -> None:
    del content["trainer"]["config"]


def optimizer_state(content: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a parameter with several elements."""
    states = content["trainer"]["_trainer"]["optimizer"]["state"].values()
    return next(x for x in states if x["exp_avg"].dim() > 1)


def larger(x: Tensor) -> Tensor:
    return torch.zeros(len(x) + 1, *x.shape[1:])


SPOILT: dict[str, tuple[Spoil, str]] = {
    "exp_avg of another shape": (
        lambda c: optimizer_state(c).update(exp_avg=torch.zeros(3)),
        "exp_avg has shape (3,) where",
    ),
    "exp_avg of a single value": (
        lambda c: optimizer_state(c).update(exp_avg=torch.zeros(())),
        "exp_avg has shape () where",
    ),
    "exp_avg of another type": (
        lambda c: optimizer_state(c).update(exp_avg=optimizer_state(c)["exp_avg"].double()),
        "exp_avg is of torch.float64 where torch.float32 is needed",
    ),
    "exp_avg in one place of memory": (
        lambda c: optimizer_state(c).update(
            exp_avg=torch.zeros(1).expand_as(optimizer_state(c)["exp_avg"])
        ),
        "exp_avg is not an ordinary tensor",
    ),
    "no exp_avg_sq": (lambda c: optimizer_state(c).pop("exp_avg_sq"), "exp_avg_sq is missing"),
    "a step of many values": (
        lambda c: optimizer_state(c).update(step=torch.zeros(2)),
        "step has shape (2,) where () is needed",
    ),
    "a parameter too many": (
        lambda c: c["trainer"]["_trainer"]["optimizer"]["state"].update({999: {}}),
        "the optimizer has no parameter 999",
    ),
    "a weight of another shape": (
        lambda c: c["model"].update({BIAS: torch.zeros(3)}),
        f"{BIAS} has shape (3,) where (16,) is needed",
    ),
    "a weight of another type": (
        lambda c: c["model"].update({BIAS: torch.zeros(16).half()}),
        f"{BIAS} is of torch.float16",
    ),
    "a weight that is missing": (
        lambda c: c["model"].pop(BIAS),
        f"{BIAS} is missing",
    ),
    "a trained weight of another shape": (
        lambda c: c["trainer"]["hooks"]["EMAHook"].update({BIAS: torch.zeros(1)}),
        f"{BIAS} has shape (1,)",
    ),
    "a rate too few": (
        lambda c: c["trainer"]["hooks"]["LRScheduler"].update(base_lrs=[0.1]),
        "base_lrs of the schedule is [0.1]",
    ),
    "another place in the schedule": (
        lambda c: c["trainer"]["hooks"]["LRScheduler"].update(last_epoch=10**9),
        "the learning rate is of iteration 1000000000",
    ),
}


@pytest.mark.e2e
@pytest.mark.parametrize("case", SPOILT)
def test_a_prepared_checkpoint(case: str, folder: Path, shapes: Shapes) -> None:
    change, words = SPOILT[case]
    spoil(folder, change)
    sentence = refused(config(folder, shapes))
    assert words in sentence and "is of another training" in sentence


@pytest.mark.e2e
def test_an_old_checkpoint_of_other_classes(
    folder: Path, shapes: Shapes, caplog: pytest.LogCaptureFixture
) -> None:
    """With a fused optimizer on a CPU, this was a segmentation fault."""
    spoil(folder, forget_config)
    with caplog.at_level(logging.WARNING):
        sentence = refused(config(folder, shapes, "MODEL.ROI_HEADS.NUM_CLASSES", 9))
    assert "kept no config in it" in caplog.text
    assert " has shape (" in sentence and "is of another training" in sentence


@pytest.mark.e2e
def test_an_old_checkpoint_goes_on(folder: Path, finished: Path, shapes: Shapes) -> None:
    spoil(folder, forget_config)
    resumed = train(config(folder, shapes), resume=True)
    expected = torch.load(finished / "run" / "model_final.pth", weights_only=True)
    assert all(torch.equal(resumed["model"][k], x) for k, x in expected["model"].items())


def test_tensors_are_compared_by_name_shape_and_dtype() -> None:
    own = {"a": torch.zeros(2), "b": torch.zeros(2, 3), "c": torch.zeros(1)}
    saved = {"a": torch.zeros(2), "b": torch.zeros(3), "d": 1, "e": 2}
    assert list(tensor_misfits(saved, own, optional=("e",))) == [
        "b has shape (3,) where (2, 3) is needed",
        "c is missing",
        "d is unexpected",
    ]
    assert not list(tensor_misfits(own, own))


@for_each(
    "kind",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    ],
)
def test_the_state_of_an_optimizer_fits_itself(kind: Any) -> None:
    parameters = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(()))]
    optimizer = kind(parameters)
    assert not list(optimizer_misfits(optimizer.state_dict(), optimizer, {}))
    sum(x.sum() for x in parameters).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert not list(optimizer_misfits(optimizer.state_dict(), optimizer, {}))
    found = optimizer_misfits(optimizer.state_dict(), kind(parameters[:1]), {})
    assert list(found) == ["the optimizer has groups of [2] parameters where [1] are needed"]

"""Test the moving average of the weights: its formula, its use, and its checkpoints."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from torch import nn

from distill.checkpoint.load import load_strictly
from distill.config import student_config, validate_config
from distill.engine import Trainer
from distill.errors import ConfigError
from distill.solver.ema import EMAHook
from tests.support.trainings import trainable_cfg

Shapes = tuple[str, str, str]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def shift(model: nn.Module) -> None:
    """Increase every number of the network by one, including the count of batches."""
    for x in model.state_dict().values():
        x += 1


@pytest.mark.parametrize("warmup", [0, 5])
def test_the_average_against_a_loop(warmup: int) -> None:
    model = network()
    ema = EMAHook(model, 0.9, warmup)
    expected = {k: v.double().clone() for k, v in model.state_dict().items()}
    for step in range(1, 8):
        shift(model)
        ema.trainer = SimpleNamespace(iter=step - 1)  # type: ignore[assignment]
        ema.after_step()
        decay = 0.9 * (1 - math.exp(-step / warmup)) if warmup else 0.9
        for name, x in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * x.double()
    trained = {k: v.clone() for k, v in model.state_dict().items()}
    with ema.applied():
        for name, x in model.state_dict().items():
            if name == "1.num_batches_tracked":
                assert x == 7  # counted, not averaged
            else:
                torch.testing.assert_close(x.double(), expected[name])
    assert all(torch.equal(x, trained[name]) for name, x in model.state_dict().items())


# Averages of a weight of t / 1000 at update t, by the authors' code (float64). YOLOv5's averages
# start at 0 before update 1. RTMDet counts from 0, and its update 0 copies.
YOLOV5 = {1: 0.0009995, 2: 0.001999, 10: 0.00999499, 100: 0.0999488, 1000: 0.999352, 3000: 2.99653}
RTMDET = {0: 0.0, 1: 0.000999001, 2: 0.0019985, 10: 0.00999449, 100: 0.0999482, 1000: 0.999351}


@pytest.mark.parametrize("decay, first, expected", [(0.9999, 1, YOLOV5), (0.9998, 0, RTMDET)])
def test_the_averages_of_the_authors(decay: float, first: int, expected: dict[int, float]) -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    ema = EMAHook(model, decay, 2000)
    for update in range(first, 1001):
        nn.init.constant_(model.weight, update / 1000)
        ema.trainer = SimpleNamespace(iter=update - first)  # type: ignore[assignment]
        ema.after_step()
        if update in expected:
            assert ema.kept["weight"].item() == pytest.approx(expected[update], rel=1e-4), update


@pytest.mark.e2e
def test_a_checkpoint_has_both(shapes: Shapes, tmp_path: Path) -> None:
    """``model`` is the average and a stock checkpoint; the training continues with the weights."""
    opts = ("SOLVER.MAX_ITER", 3, "SOLVER.EMA.DECAY", 0.9, "SOLVER.EMA.WARMUP_ITERS", 0)
    seen: list[dict[str, torch.Tensor]] = []
    cfg = trainable_cfg("faster", shapes, tmp_path, *opts, norm="BN")

    class Watching(Trainer):
        @classmethod
        def test(cls, cfg: Any, model: nn.Module, evaluators: Any = None) -> Any:
            seen.append({k: v.clone() for k, v in model.state_dict().items()})
            return {}

    seed_all_rng(0)
    trainer = Watching(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    average, trained = saved["model"], saved["trainer"]["hooks"]["EMAHook"]
    own = trainer.student.state_dict()
    assert all(torch.equal(trained[name], own[name]) for name in trained)
    assert not torch.equal(
        average["backbone.bottom_up.stem.conv1.weight"], own["backbone.bottom_up.stem.conv1.weight"]
    )
    assert average.keys() == own.keys()
    load_strictly(build_model(student_config(cfg)), str(tmp_path / "model_final.pth"), "it")
    (evaluated,) = seen  # the average is evaluated
    assert all(torch.equal(evaluated[name], average[name]) for name in average)


@pytest.mark.e2e
def test_switched_on_when_resumed(shapes: Shapes, tmp_path: Path) -> None:
    """The average starts with the weights of the checkpoint."""
    cfg = trainable_cfg("faster", shapes, tmp_path, "SOLVER.MAX_ITER", 2, norm="BN")
    cfg.DATASETS.TEST = ()
    seed_all_rng(0)
    Trainer(cfg).train()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.EMA.DECAY, cfg.SOLVER.EMA.WARMUP_ITERS = 3, 0.9, 0
    before = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    trained = saved["trainer"]["hooks"]["EMAHook"]
    for name, x in trained.items():
        expected = 0.9 * before[name] + 0.1 * x
        torch.testing.assert_close(saved["model"][name], expected)


def test_precise_statistics_would_go_to_other_weights(shapes: Shapes, tmp_path: Path) -> None:
    opts = ("SOLVER.EMA.DECAY", 0.9, "TEST.PRECISE_BN.ENABLED", True)
    with pytest.raises(ConfigError, match=r"PRECISE_BN.ENABLED is True.* switch one off"):
        validate_config(trainable_cfg("faster", shapes, tmp_path, *opts))

"""Test the warm-up of biases and momentum, and the groups of the optimizers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from torch import nn

from distill.config.validate import check_values
from distill.engine import Trainer
from distill.errors import ConfigError
from distill.solver.warmup import build_warmup
from tests.support.cases import for_each
from tests.support.networks import tiny_cfg, tiny_model

LINEAR = ("SOLVER.WARMUP_ITERS", 1392, "SOLVER.WARMUP_FACTOR", 0.0)
YOLOV5 = (
    *(*LINEAR, "SOLVER.WARMUP_BIAS_FACTOR", 10.0, "SOLVER.WARMUP_MOMENTUM", 0.8),
    *("SOLVER.MAX_ITER", 200 * 464, "SOLVER.BASE_LR", 0.01, "SOLVER.BASE_LR_END", 0.001),
    *("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.MOMENTUM", 0.937),
)
# The authors' learning rates of weights and biases, and momentum, by iteration. They change the
# schedule once per epoch of 464 iterations, and here it changes at every iteration.
EXPECTED = {
    0: (0.0, 0.1, 0.8),
    100: (0.000718391, 0.0935345, 0.809842),
    464: (0.00333315, 0.0699998, 0.845667),
    1000: (0.00718231, 0.0353432, 0.89842),
    1392: (0.009995, 0.009995, 0.937),
}


class Loop:
    """The part of a trainer that the hook needs, at any iteration."""

    def __init__(self, *opts: Any):
        cfg = tiny_cfg("faster", *opts)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.optimizer = Trainer.build_optimizer(cfg, self.model)
        self.scheduler = Trainer.build_lr_scheduler(cfg, self.optimizer)
        self.hook = build_warmup(cfg)

    def at(self, iteration: int) -> tuple[float, float, float]:
        """Return the learning rates of weights and biases, and the momentum, at an iteration."""
        self.scheduler.last_epoch = iteration
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_lr()):
            group["lr"] = rate
        assert self.hook
        self.hook.trainer = SimpleNamespace(  # type: ignore[assignment]
            iter=iteration, optimizer=self.optimizer
        )
        self.hook.before_step()
        groups = {id(x): group for group in self.optimizer.param_groups for x in group["params"]}
        conv, norm = (groups[id(x.bias)] for x in self.model)
        assert conv["lr"] == norm["lr"]
        weights = groups[id(self.model[0].weight)]
        return weights["lr"], conv["lr"], conv["momentum"]


def test_yolov5() -> None:
    loop = Loop(*YOLOV5)
    for iteration, expected in EXPECTED.items():
        assert loop.at(iteration) == pytest.approx(expected, rel=1e-3)
    assert loop.at(0) == (0.0, 0.1, 0.8)  # in any order: nothing is remembered
    rate = loop.scheduler.get_lr()[0]
    loop.at(5000)
    weights, biases, momentum = loop.at(2000)
    assert weights == biases != rate and momentum == 0.937


def test_each_alone() -> None:
    biases = Loop(*LINEAR, "SOLVER.WARMUP_BIAS_FACTOR", 0.0, "SOLVER.WARMUP_FACTOR", 0.5)
    assert biases.at(0) == pytest.approx((0.0005, 0.0, 0.9))  # BASE_LR is 0.001
    assert biases.at(696) == pytest.approx((0.00075, 0.0005, 0.9))
    momentum = Loop(*LINEAR, "SOLVER.WARMUP_MOMENTUM", 0.0)
    assert len(momentum.optimizer.param_groups) == len(Loop().optimizer.param_groups)
    assert momentum.at(348) == pytest.approx((0.00025, 0.00025, 0.225))


@for_each(
    "opts",
    [(), ("SOLVER.WARMUP_ITERS", 0, "SOLVER.WARMUP_MOMENTUM", 0.8)],
)
def test_without_a_warmup_there_is_no_hook(opts: tuple[Any, ...]) -> None:
    assert build_warmup(tiny_cfg("faster", *opts)) is None


@for_each("key, value", [("WARMUP_MOMENTUM", 1.0), ("WARMUP_BIAS_FACTOR", -0.5)])
def test_wrong_values(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"SOLVER.{key} is {value}; it must be -1"):
        check_values(tiny_cfg("faster", f"SOLVER.{key}", value))


def test_adamw_has_no_momentum() -> None:
    cfg = tiny_cfg("faster", "SOLVER.WARMUP_MOMENTUM", 0.8, "SOLVER.OPTIMIZER", "ADAMW")
    with pytest.raises(ConfigError, match=r"SOLVER\.OPTIMIZER ADAMW has no momentum"):
        check_values(cfg)


def test_a_sum_is_not_scaled_twice() -> None:
    scaled = ("SOLVER.REFERENCE_WORLD_SIZE", 8)
    check_values(tiny_cfg("yolox", *scaled))
    for family in ("yolov5", "yolov7"):
        with pytest.raises(ConfigError, match="YOLOv5's loss grows with the batch itself"):
            check_values(tiny_cfg(family, *scaled))


# ---- Groups of parameters


def decays(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """Return the weight decay of each parameter, each of which is in one group."""
    names = {id(x): name for name, x in model.named_parameters()}
    groups = Trainer.build_optimizer(cfg, model).param_groups
    pairs = [(names[id(x)], group["weight_decay"]) for group in groups for x in group["params"]]
    assert len(pairs) == len(dict(pairs)) == len(names)
    return dict(pairs)


@for_each("optimizer", ["SGD", "ADAMW"])
@for_each("factor", [-1.0, 10.0])
@for_each("family", ["rtmdet", "yolov5"])
def test_norms_and_biases_do_not_decay(optimizer: str, factor: float, family: str) -> None:
    none = ("SOLVER.WEIGHT_DECAY_NORM", 0.0, "SOLVER.WEIGHT_DECAY_BIAS", 0.0)
    chosen = ("SOLVER.OPTIMIZER", optimizer, "SOLVER.WARMUP_BIAS_FACTOR", factor)
    model = tiny_model(family, norm="BN")
    found = decays(tiny_cfg(family, "SOLVER.WEIGHT_DECAY", 0.05, *none, *chosen), model)
    norms = {f"{name}.weight" for name, x in model.named_modules() if isinstance(x, nn.BatchNorm2d)}
    assert norms
    for name, decay in found.items():
        assert decay == (0.0 if name in norms or name.endswith("bias") else 0.05), name


def test_shared_parameters_are_in_one_group() -> None:
    """The convolutions of a head that all levels share are trained once per step."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    model.append(model[0])
    optimizer = Trainer.build_optimizer(tiny_cfg("faster", *YOLOV5), model)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert torch.isfinite(model[0].weight).all()

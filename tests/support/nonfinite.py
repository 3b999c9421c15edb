"""Trainings in which a value that is not finite appears at a chosen place."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.utils.events import get_event_storage
from torch import Tensor

from distill.data.loader import TrainLoader
from distill.engine import Trainer
from distill.errors import NumericalError
from distill.heads.fitnet import FitNet
from tests.support.networks import distill_opts
from tests.support.trainings import Shapes, trainable_cfg, write_teacher

AT, LAST = 2, 4  # iteration of the fault, number of iterations
HEADS = {
    "faster": ("FitNet", "IMA"),
    "retinanet": ("FitNet", "DenseKD"),
    "mask": ("FitNet", "MaskLogitKD"),
    "semantic": ("FitNet", "IMA", "CIRKD"),
}
CLASSES = ("MODEL.ROI_HEADS.NUM_CLASSES", 8, "MODEL.RETINANET.NUM_CLASSES", 8)
Teachers = dict[str, list[Any]]
Change = Callable[[Tensor], Tensor]


class BadGradient(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.nan


def spoil(
    patch: pytest.MonkeyPatch,
    method: str,
    owner: type,
    loss: str,
    change: Change,
    at: Iterable[int] = (AT,),
) -> None:
    """Let a method, which returns losses by name, change one of them at some iterations."""
    original, iterations = getattr(owner, method), set(at)

    def spoilt(self: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        losses = dict(original(self, *args, **kwargs))
        if get_event_storage().iter in iterations:
            losses[loss] = change(losses[loss])
        return losses

    patch.setattr(owner, method, spoilt)


def spoil_image(patch: pytest.MonkeyPatch, at: Iterable[int] = (AT,)) -> None:
    """Let the second image of some batches have a pixel that is not finite."""
    original, iterations = TrainLoader.__iter__, set(at)

    def spoilt(self: TrainLoader) -> Iterator[list[dict[str, Any]]]:
        for k, batch in enumerate(original(self), self.batches.start):
            if k in iterations:
                image = batch[1]["image"].float()
                image[1, 20, 30] = math.nan
                batch[1]["image"] = image
            yield batch

    patch.setattr(TrainLoader, "__iter__", spoilt)


def nan(x: Tensor) -> Tensor:
    return x * math.nan


def infinite(x: Tensor) -> Tensor:
    return x + math.inf


# Family, function that makes a value not finite, and start of the message, by name.
FAULTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None], str]] = {
    "task loss": (
        "faster",
        lambda patch: spoil(patch, "losses", FastRCNNOutputLayers, "loss_cls", nan),
        "loss_cls is nan",
    ),
    "level of a distillation loss": (
        "faster",
        lambda patch: spoil(patch, "losses", FitNet, "p3", infinite),
        "loss_fitnet/p3 is inf",
    ),
    "gradient": (
        "faster",
        lambda patch: spoil(patch, "losses", FitNet, "p3", BadGradient.apply),
        "the gradient of loss_fitnet/p3 in student.backbone.fpn_output3.weight and ",
    ),
    "image": ("retinanet", spoil_image, "loss_cls is nan, loss_box_reg is nan, "),
    "proposals": ("faster", spoil_image, "Predicted boxes or scores contain Inf/NaN. Training"),
}


def write_teachers(folder: Path) -> Teachers:
    torch.set_num_threads(1)
    return {family: write_teacher(folder / family, family, *CLASSES) for family in HEADS}


def spoilt_teacher(folder: Path, family: str) -> list[Any]:
    """Write a teacher whose P3 is infinite."""
    opts = write_teacher(folder, family, *CLASSES)
    weights = torch.load(folder / "teacher.pth", weights_only=True)
    weights["model"]["backbone.fpn_output3.bias"][0] = math.inf
    torch.save(weights, folder / "teacher.pth")
    return opts


def config(
    family: str, shapes: Shapes, teachers: Teachers, output: Path, *opts: Any, **kw: Any
) -> CfgNode:
    distillation = (*distill_opts(family, HEADS[family]), *teachers[family])
    schedule = ("SOLVER.MAX_ITER", LAST, "SOLVER.WARMUP_ITERS", 3)
    return trainable_cfg(family, shapes, output, *distillation, *schedule, *opts, norm="BN", **kw)


def stopped(cfg: CfgNode, *hooks: HookBase) -> tuple[Trainer, str]:
    """Train until the error, and return the trainer and the message."""
    trainer = Trainer(cfg, hooks)
    with pytest.raises(NumericalError) as error:
        trainer.train()
    return trainer, str(error.value)


def reproducer(output: Path, iteration: int = AT, rank: int = 0) -> Path:
    return output / "nonfinite" / f"iteration_{iteration:07d}_rank_{rank}.pth"

"""Test our dense detectors in training: checkpoints, DDP, precision, compilation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor

from distill.engine import Trainer
from distill.nets import add_nets_config
from tests.support.networks import (
    ARCHITECTURES,
    DENSE,
    YOLO,
    distill_opts,
    distilled,
    image_dict,
    outspoken_model,
)
from tests.support.processes import WORLD, needs_loopback, spawn, starts_processes
from tests.support.trainings import trainable_cfg, write_teacher

Shapes = tuple[str, str, str]


MOBILE = "build_timm_fpn_backbone", "mobilenetv3_small_050"
PAIRS = [*((family, family, ()) for family in (*DENSE, *YOLO)), ("gfl", "fcos", MOBILE)]


@pytest.mark.e2e
@pytest.mark.parametrize("taught_by, family, backbone", PAIRS)
def test_a_stock_checkpoint(
    taught_by: str, family: str, backbone: tuple[str, ...], shapes: Shapes, tmp_path: Path
) -> None:
    """Stock detectron2 with these networks and keys loads and predicts the same bits."""
    name = ARCHITECTURES[family]
    classes = (f"MODEL.{ARCHITECTURES[taught_by].upper()}.NUM_CLASSES", 8)
    threshold = (f"MODEL.{name.upper()}.SCORE_THRESH_TEST", 0.0)
    opts = [*distill_opts(family, ("IMA", "TID")), *write_teacher(tmp_path, taught_by, *classes)]
    opts += ["SOLVER.MAX_ITER", 2, "SOLVER.BASE_LR", 0.001, *threshold]
    for key, value in zip(("MODEL.BACKBONE.NAME", "MODEL.TIMM.NAME"), backbone):
        opts += [key, value]
    seed_all_rng(3)
    trainer = Trainer(trainable_cfg(family, shapes, tmp_path / "out", *opts, norm="BN"))
    trainer.train()

    cfg = get_cfg()
    add_nets_config(cfg)
    cfg.merge_from_file(str(tmp_path / "out" / "student.yaml"))
    assert name == cfg.MODEL.META_ARCHITECTURE
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    inputs = [{k: v for k, v in image_dict(i, 64, 96).items() if k != "instances"} for i in (0, 1)]
    with torch.no_grad():
        both = zip(trainer.student.eval()(inputs), model(inputs))
    for ours, theirs in both:
        ours, theirs = ours["instances"].get_fields(), theirs["instances"].get_fields()
        assert len(theirs["scores"]) > 0
        for key, value in ours.items():
            value, other = (x.tensor if isinstance(x, Boxes) else x for x in (value, theirs[key]))
            assert torch.equal(value, other), key


# ---- Two processes. detectron2's FCOS averages its normalizer over time in each process.

JOINT = [*(family for family in DENSE if family != "fcos"), "yolox", "yolov5", "yolov7"]
# Means over matches are those of a process. Only the objectness is that of the joint batch.
OBJECTNESS = ("yolov5", "yolov7")
OBJECTS = {"uneven": (3, 1), "none in one": (3, 0), "none at all": (0, 0)}  # objects per rank


def gradients(family: str, image_dicts: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the gradients of the network's own losses, as far as processes share them."""
    model: Any = outspoken_model(family)
    if family == "gfl":  # at the start, the sum of weights is below its minimum in each process
        torch.nn.init.zeros_(model.head.cls_score.bias)
    with EventStorage():
        losses = model(image_dicts)
    (losses["loss_obj"] if family in OBJECTNESS else sum(losses.values())).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def batch(objects: str) -> list[dict[str, Any]]:
    return [image_dict(seed, objects=n) for seed, n in zip((5, 6), OBJECTS[objects])]


def write_gradients(rank: int, folder: Path) -> None:
    results = {}
    for objects in OBJECTS:
        for family in JOINT:
            gathered = comm.all_gather(gradients(family, [batch(objects)[rank]]))
            results[family, objects] = {k: sum(x[k] for x in gathered) / WORLD for k in gathered[0]}
    if rank == 0:
        torch.save(results, folder / "gradients.pth")


@pytest.mark.slow
@starts_processes
@needs_loopback
def test_two_processes_have_the_gradients_of_the_joint_batch(tmp_path: Path) -> None:
    spawn(write_gradients, tmp_path)
    averaged = torch.load(tmp_path / "gradients.pth", weights_only=True)
    for (family, objects), divided in averaged.items():
        joint = gradients(family, batch(objects))
        assert joint.keys() == divided.keys()
        largest = max(float(x.abs().max()) for x in joint.values())
        gaps = {name: float((divided[name] - x).abs().max()) for name, x in joint.items()}
        assert largest > 1e-6 and max(gaps.values()) <= 1e-5 * largest, (family, objects)


# ---- Compilation


@pytest.mark.slow
@pytest.mark.parametrize("family", (*DENSE, *YOLO))
def test_a_compiled_backbone_keeps_the_losses(family: str) -> None:
    inputs = [image_dict(0, 64, 64)]
    losses = []
    for compiled in (False, True):
        model = distilled(family, ("IMA", "TID", "DenseKD"))
        if compiled:
            backbone: Any = model.student.backbone
            backbone.compile(backend="aot_eager")
        torch.manual_seed(0)
        with EventStorage():
            losses.append(model(inputs))
        sum(losses[-1].values()).backward()
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=1e-4, atol=1e-5)

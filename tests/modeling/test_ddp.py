"""Two processes give the gradients of one with the joint batch, and wait for each other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import create_ddp_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor

from distill import DistillModel
from tests.support.networks import PAFPN, distilled, image_dict, kd_losses, outspoken_model
from tests.support.processes import WORLD, needs_loopback, spawn, starts_processes

pytestmark = needs_loopback

MKD_UNMASKED = ("MODEL.DISTILL.MKD.MASK_RATIO", 0.0)
CASES = {
    "FitNet": ("mask", ("FitNet",), ()),
    "ROIKD": ("mask", ("ROIKD",), ()),
    "ROIKD, cascade": ("cascade", ("ROIKD",), ()),
    "MaskLogitKD": ("mask", ("MaskLogitKD",), ()),
    "PointMaskKD": ("rtmdet_ins", ("PointMaskKD",), ()),
    "DenseKD, RPN": ("mask", ("DenseKD",), ()),
    "DenseKD, RetinaNet": ("retinanet", ("DenseKD",), ()),
    "IMA, image": ("mask", ("IMA",), ("MODEL.DISTILL.IMA.SCOPE", "image")),
    "IMA, box": ("mask", ("IMA",), ("MODEL.DISTILL.IMA.SCOPE", "box")),
    "IMA, mask": ("mask", ("IMA",), ("MODEL.DISTILL.IMA.SCOPE", "mask")),
    # On coarse levels classes have single cells, whose gradient is rounding over 1e-5.
    "IMA, class": ("semantic", ("IMA",), ("MODEL.DISTILL.IMA.IN_FEATURES", ("p2", "p3"))),
    "MKD": ("mask", ("MKD",), (*MKD_UNMASKED, "MODEL.DISTILL.MKD.WEIGHT", 0.01)),
    "TID, RPN": ("mask", ("TID",), ("MODEL.DISTILL.TID.WEIGHT", 0.01)),
    "TID, RetinaNet": ("retinanet", ("TID",), ("MODEL.DISTILL.TID.WEIGHT", 0.01)),
    "CWD": ("semantic", ("CWD",), ()),
    "CWDLogits": ("semantic", ("CWDLogits",), ()),
    "PixelKD": ("semantic", ("PixelKD",), ()),
    "SKD": ("semantic", ("SKD",), ()),
    "IFVD": ("semantic", ("IFVD",), ("MODEL.DISTILL.IFVD.WEIGHT", 1.0)),
    "MasKD, tokens": ("semantic", ("MasKDLogits",), ()),
    "MasKD, masks": ("semantic", ("MasKDLogits",), ("MODEL.DISTILL.MASKDLOGITS.TOKEN_ITERS", 0)),
    "MSSD": ("mask", ("MSSD",), (*PAFPN, "MODEL.DISTILL.MSSD.WEIGHT", 0.01)),
}
NEED_OBJECTS = ("MaskLogitKD", "PointMaskKD", "IMA, box", "IMA, mask", "TID, RPN", "TID, RetinaNet")
OBJECTS = {"uneven": (3, 1), "none in one": (3, 0), "none at all": (0, 0)}  # by rank


# ---- Gradients.


def fixed_samples(proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
    """In place of random sampling: every object, moved a little, and two boxes of background."""
    samples = []
    for target in targets:
        n = len(target)
        sample = Instances(target.image_size)
        background = torch.tensor([[40.0, 2.0, 62.0, 20.0], [1.0, 45.0, 20.0, 62.0]])
        sample.proposal_boxes = Boxes(torch.cat([target.gt_boxes.tensor + 1, background]))
        sample.gt_classes = torch.cat([target.gt_classes, torch.tensor([3, 3])])
        sample.gt_boxes = Boxes(torch.cat([target.gt_boxes.tensor, background]))
        index = torch.cat([torch.arange(n), torch.zeros(2, dtype=torch.long)])
        if n:
            sample.gt_masks = target.gt_masks[index]
        samples.append(sample)
    return samples


def distillation_gradients(case: str, image_dicts: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return gradients of the distillation losses alone, for the student and the adapters."""
    family, heads, opts = CASES[case]
    opts = (*opts, "MODEL.DISTILL.IMA.MASK_RATIO", 0.0)
    model = distilled(family, heads, *opts, teacher=outspoken_model(family, seed=1, fpn=24))
    if hasattr(model.student, "roi_heads"):
        model.student.roi_heads.label_and_sample_proposals = fixed_samples
    sum(kd_losses(model, image_dicts).values()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def image_dicts(objects: tuple[int, int]) -> list[dict[str, Any]]:
    """Return images of one size; with several, a joint batch has a larger canvas than its parts."""
    return [image_dict(seed, objects=n, semantic=True) for seed, n in zip((5, 6), objects)]


def write_gradients(rank: int, folder: Path) -> None:
    results: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, objects in OBJECTS.items():
        for case in CASES:
            mine = distillation_gradients(case, [image_dicts(objects)[rank]])
            gathered = comm.all_gather(mine)
            results[case, name] = {
                n: sum(x[n] for x in gathered if n in x) / WORLD
                for n in {n for x in gathered for n in x}
            }
    if rank == 0:
        torch.save(results, folder / "gradients.pth")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Gradients as DistributedDataParallel averages them."""
    folder = tmp_path_factory.mktemp("ddp")
    spawn(write_gradients, folder)
    return torch.load(folder / "gradients.pth", weights_only=True)


@starts_processes
@pytest.mark.parametrize("objects", OBJECTS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradients_of_the_joint_batch(
    case: str, objects: str, averaged: dict[tuple[str, str], dict[str, Tensor]]
) -> None:
    joint = distillation_gradients(case, image_dicts(OBJECTS[objects]))
    divided = averaged[case, objects]
    assert joint.keys() == divided.keys()
    largest = max(float(x.abs().max()) for x in joint.values())
    idle = objects == "none at all" and case in NEED_OBJECTS
    assert 1e-6 < largest < 100 or (idle and largest == 0)
    gaps = {name: float((divided[name] - x).abs().max()) for name, x in joint.items()}
    rounding = 1e-4 if case == "SKD" else 1e-5  # SKD: differences of similar cosines
    assert max(gaps.values()) <= rounding * largest, gaps


# ---- Training.

STOP = 2


def training_model() -> DistillModel:
    heads = ("FitNet", "IMA", "ROIKD", "MaskLogitKD", "DenseKD")
    opts = [x for h in heads for x in (f"MODEL.DISTILL.{h.upper()}.STOP_ITER", STOP)]
    return distilled("mask", heads, *opts, teacher=outspoken_model("mask", seed=1, fpn=24))


def train(rank: int, folder: Path) -> None:
    """Three steps; the second process never sees an object, the heads stop before the last."""
    model = training_model()
    ddp = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    assert not ddp.find_unused_parameters
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    distillation = []
    for step in range(3):
        with EventStorage(step):
            losses = ddp([image_dict(10 * step + rank, 64, 64 + 16 * rank, objects=2 - 2 * rank)])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        names = tuple(f"loss_{h.lower()}" for h in model.heads)
        distillation.append(
            float(sum(v for k, v in losses.items() if k.split("/")[0] in names).detach())
        )
    state = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    torch.save((distillation, state), folder / f"{rank}.pth")


@pytest.mark.slow
@starts_processes
def test_a_process_without_annotations_trains_along(tmp_path: Path) -> None:
    spawn(train, tmp_path)
    (losses, state), (other, other_state) = (
        torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(WORLD)
    )
    for x in (losses, other):
        assert min(x[:STOP]) > 0 and x[STOP:] == [0.0]
    moving = dict(training_model().named_parameters())
    assert all(torch.equal(state[k], other_state[k]) for k in moving)
    adapter = "heads.FitNet.adapters.p2.weight"
    assert not torch.equal(state[adapter], moving[adapter])

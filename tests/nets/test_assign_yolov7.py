"""Test YOLOv7's assignment against the authors' numbers, loops, and by hand."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.nets.assign import ota_assign, yolov5_boxes, yolov5_loss
from tests.reference.assign import random_boxes
from tests.reference.detectors import (
    ANCHORS,
    REFERENCE,
    STRIDES,
    TOLERANCE,
    emptied,
    yolov5_inputs,
)
from tests.reference.dynamic_assign import slow_ota, slow_yolov5_loss
from tests.support.cases import for_each
from tests.support.operations import Recorder

approx = partial(pytest.approx, rel=TOLERANCE)
GAINS = (0.05, 0.7, 0.3)
NAMES = ("box", "obj", "cls", "total")
Truth = list[dict[str, Tensor]]


def loss(maps: list[Tensor], targets: Truth) -> dict[str, Tensor]:
    anchors, balance = ANCHORS[: len(maps)], (4.0, 1.0, 0.4)[: len(maps)]
    return yolov5_loss(maps, targets, anchors, STRIDES[: len(maps)], GAINS, balance, ota=True)


def matches(maps: list[Tensor], targets: Truth) -> list[list[tuple[int, ...]]]:
    """Return the sorted (image, anchor, y, x, box) of each level."""
    levels = yolov5_boxes(maps, targets, ANCHORS[: len(maps)], STRIDES[: len(maps)], ota=True)
    return [
        sorted((*place, int(x[tuple(place)])) for place in (x >= 0).nonzero().tolist())
        for x in levels
    ]


def random_batch(seed: int, numbers: tuple[int, ...]) -> tuple[list[Tensor], Truth]:
    """Return maps of 128x96 pixels on two levels and the ground truth, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(len(numbers), 3, h, w, 8) for h, w in ((16, 12), (8, 6))]
    maps = [torch.randn(*x, generator=generator, dtype=torch.float64) for x in shapes]
    targets = []
    for number in numbers:
        labels = torch.randint(3, (number,), generator=generator)
        boxes = random_boxes(number, generator).double()
        targets.append({"gt_boxes": boxes, "gt_classes": labels})
    return maps, targets


def literal(maps: list[Tensor], targets: Truth) -> list[list[tuple[int, ...]]]:
    """Return :func:`matches` by loops."""
    found: list[list[tuple[int, ...]]] = [[] for _ in maps]
    first = 0
    for i, x in enumerate(targets):
        arrays = [m[i].numpy() for m in maps], x["gt_boxes"].numpy(), x["gt_classes"].numpy()
        for level, *place, box in slow_ota(*arrays, ANCHORS.numpy(), STRIDES):
            found[level].append((i, *place, first + box))
        first += len(x["gt_boxes"])
    return [sorted(x) for x in found]


@for_each("dtype", [torch.float32, torch.float64])
@for_each("case", REFERENCE["yolov7"])
def test_the_authors_matches_and_loss(dtype: torch.dtype, case: Any) -> None:
    """No prediction is proposed twice in these scenes."""
    inputs = yolov5_inputs(case["seed"], False, dtype)
    names = ("image", "anchor", "y", "x", "gt_row")
    expected = [sorted(zip(*(x[name] for name in names))) for x in case["matches"]]
    assert matches(inputs.maps, inputs.targets()) == expected
    assert list(map(len, expected)) == case["matches_per_level"]
    maps = [x.requires_grad_() for x in inputs.maps]
    losses = loss(maps, inputs.targets())
    assert {k: losses[k].item() for k in NAMES} == {k: approx(case["loss"][k]) for k in NAMES}
    losses["total"].backward()
    gradients = [x.grad.abs().sum().item() for x in maps]
    assert gradients == approx(case["loss"]["grad_abs_sum"])


def test_empty_images() -> None:
    """The authors' code fails without any object; the objectness remains."""
    inputs = yolov5_inputs(0, False)
    first = inputs._replace(images=emptied(inputs.images, "second"))
    case = REFERENCE["empty"]["yolov7"]["second"]
    losses = loss(first.maps, first.targets())
    assert {k: losses[k].item() for k in NAMES} == {k: approx(case[k]) for k in NAMES}
    neither = inputs._replace(images=emptied(inputs.images, "both"))
    maps = [x.requires_grad_() for x in neither.maps]
    losses = loss(maps, neither.targets())
    assert losses["box"] == losses["cls"] == 0
    assert losses["obj"].item() == approx(0.7 * REFERENCE["empty"]["yolov5"]["both"]["obj"])
    losses["total"].backward()
    assert all(x.grad.isfinite().all() and x.grad[..., 4].any() for x in maps)
    assert matches(maps, neither.targets()) == [[], [], []]


@for_each("seed, numbers", [(0, (4, 7)), (1, (0, 9)), (2, (25, 12)), (3, (1,)), (4, (0, 0))])
def test_matches_and_loss_against_loops(seed: int, numbers: tuple[int, ...]) -> None:
    """In the crowded scene, boxes propose the same predictions."""
    maps, targets = random_batch(seed, numbers)
    assert matches(maps, targets) == literal(maps, targets)
    pairs = [(x["gt_boxes"].numpy(), x["gt_classes"].numpy()) for x in targets]
    arrays = [x.numpy() for x in maps], pairs, ANCHORS.numpy(), STRIDES
    expected = slow_yolov5_loss(*arrays, GAINS, (4, 1), ota=True)
    found = loss(maps, targets)
    assert {k: x.item() for k, x in found.items()} == pytest.approx(expected, rel=1e-6)


def test_one_candidate_goes_to_the_cheaper_box() -> None:
    """Both boxes propose it, so it counts once; without that, both would have it."""
    boxes = torch.tensor([[8.0, 8, 16, 16], [8.0, 8, 16, 15]])
    logits = torch.tensor([[4.0, -4.0], [4.0, -4.0]])
    arguments = logits, torch.tensor([3.0, 3.0]), boxes[:1].expand(2, 4), torch.tensor([5, 5])
    keep, classes = torch.tensor([True, True]), torch.tensor([0, 1])
    assert ota_assign(*arguments, keep, boxes, classes).tolist() == [0, -1]
    assert ota_assign(*arguments, keep, boxes, 1 - classes).tolist() == [1, -1]
    assert ota_assign(*arguments, torch.tensor([False, True]), boxes, classes).tolist() == [-1, 0]
    assert ota_assign(*arguments, ~keep, boxes, classes).tolist() == [-1, -1]
    assert ota_assign(*arguments, keep, boxes[:0], classes[:0]).tolist() == [-1, -1]


def test_a_box_takes_the_candidates_of_another() -> None:
    """A box that proposes no prediction competes for all of its image."""
    maps, targets = random_batch(5, (3,))
    far = torch.tensor([[0.0, 0.0, 2.0, 90.0]]).double()  # no anchor fits it
    targets[0]["gt_boxes"] = torch.cat([targets[0]["gt_boxes"], far])
    targets[0]["gt_classes"] = torch.cat([targets[0]["gt_classes"], torch.zeros(1).long()])
    found = matches(maps, targets)
    assert found == literal(maps, targets)
    assert any(row[-1] == 3 for level in found for row in level)


@for_each("dtype", [torch.float16, torch.bfloat16])
def test_precision(dtype: torch.dtype) -> None:
    """Half precision enters as float32, also under autocast."""
    maps, targets = random_batch(1, (4, 7))
    maps = [x.to(dtype) for x in maps]
    wide = [{**x, "gt_boxes": x["gt_boxes"].float()} for x in targets]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(maps, targets)
    assert found == loss([x.float() for x in maps], wide)
    assert found["total"].dtype == torch.float32


def test_nothing_waits_for_the_device() -> None:
    maps, targets = random_batch(0, (4, 7))
    with Recorder() as recorder:
        loss([x.requires_grad_() for x in maps], targets)["total"].backward()
    assert not recorder.waits and "sort" in recorder.names

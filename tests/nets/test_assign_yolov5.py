"""Test YOLOv5's targets and loss against the authors' numbers, loops, and by hand."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.nets.assign import complete_iou, generalized_iou, yolov5_loss, yolov5_targets
from tests.reference.assign import random_boxes
from tests.reference.detectors import (
    ANCHORS,
    REFERENCE,
    SIZE,
    STRIDES,
    TOLERANCE,
    emptied,
    yolov5_inputs,
)
from tests.reference.dynamic_assign import slow_yolov5_loss, slow_yolov5_targets
from tests.support.cases import for_each
from tests.support.operations import Recorder

approx = partial(pytest.approx, rel=TOLERANCE)
SIZES = [(SIZE // s, SIZE // s) for s in STRIDES]
NAMES = ("box", "obj", "cls", "total")


def rows(levels: list[tuple[Tensor, ...]]) -> list[list[tuple[int, ...]]]:
    """Return the sorted (anchor, y, x, box) of each level."""
    return [sorted(zip(*(x.tolist() for x in level))) for level in levels]


def random_batch(
    seed: int, numbers: tuple[int, ...], classes: int = 3
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return maps of 128x96 pixels on two levels and the ground truth, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(len(numbers), 3, h, w, 5 + classes) for h, w in ((16, 12), (8, 6))]
    maps = [torch.randn(*x, generator=generator, dtype=torch.float64) for x in shapes]
    targets = []
    for number in numbers:
        labels = torch.randint(classes, (number,), generator=generator)
        boxes = random_boxes(number, generator).double()
        targets.append({"gt_boxes": boxes, "gt_classes": labels})
    return maps, targets


def loss(maps: list[Tensor], targets: list[dict[str, Tensor]], **kwargs: Any) -> dict[str, Tensor]:
    return yolov5_loss(
        maps, targets, ANCHORS[: len(maps)], STRIDES[: len(maps)], balance=(4, 1), **kwargs
    )


@for_each("dtype", [torch.float32, torch.float64])
@for_each("case", REFERENCE["yolov5"])
def test_the_authors_targets_and_loss(dtype: torch.dtype, case: Any) -> None:
    inputs = yolov5_inputs(case["seed"], case["crowded"], dtype)
    found: list[list[tuple[int, ...]]] = [[] for _ in STRIDES]
    first = 0
    for i, x in enumerate(inputs.targets()):
        levels = yolov5_targets(SIZES, STRIDES, ANCHORS, **x)
        for level, own in zip(found, rows(levels)):
            level += [(i, a, y, x, first + box) for a, y, x, box in own]
        first += len(x["gt_boxes"])
    names = ("image", "anchor", "y", "x", "gt_row")
    expected = [sorted(zip(*(x[name] for name in names))) for x in case["matches"]]
    assert found == expected
    assert [len(x) for x in found] == case["matches_per_level"]
    shared = [len(x) - len({row[:4] for row in x}) for x in found]
    assert shared == case["duplicates_per_level"]

    maps = [x.requires_grad_() for x in inputs.maps]
    losses = yolov5_loss(maps, inputs.targets(), ANCHORS, STRIDES)
    for name in NAMES:
        assert losses[name].item() == approx(case["max_duplicates"][name]), name
    losses["total"].backward()
    gradients = [x.grad.abs().sum().item() for x in maps]
    assert gradients == approx(case["max_duplicates"]["grad_abs_sum"])


@for_each("which", ["second", "both"])
def test_the_authors_loss_of_empty_images(which: str) -> None:
    inputs = yolov5_inputs(0, crowd=False)
    inputs = inputs._replace(images=emptied(inputs.images, which))
    losses = yolov5_loss(inputs.maps, inputs.targets(), ANCHORS, STRIDES)
    assert {k: x.item() for k, x in losses.items()} == {
        k: approx(x) for k, x in REFERENCE["empty"]["yolov5"][which].items()
    }


def test_the_authors_ciou() -> None:
    u = torch.rand(6, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    boxes = []
    for part in (u[:, :4], u[:, 4:]):
        centre, side = 10 * part[:, :2], 0.5 + 8 * part[:, 2:]
        boxes.append(torch.cat([centre, side], 1).requires_grad_())
    a, b = (torch.cat([x[:, :2] - x[:, 2:] / 2, x[:, :2] + x[:, 2:] / 2], 1) for x in boxes)
    case = REFERENCE["ciou"]
    assert complete_iou(a, b).tolist() == approx(case["ciou"])
    assert generalized_iou(a, b).tolist() == approx(case["giou"])
    (1 - complete_iou(a, b)).mean().backward()
    expected = torch.tensor(case["grad_of_mean_loss_wrt_a"], dtype=torch.float64)
    torch.testing.assert_close(boxes[0].grad, expected, rtol=TOLERANCE, atol=1e-8)


@for_each("seed", range(8))
def test_targets_against_loops(seed: int) -> None:
    """A map of 16x12 cells, boxes that cross its borders, and another ratio."""
    boxes = random_boxes(seed * 3, torch.Generator().manual_seed(seed)).double()
    classes = torch.zeros(len(boxes), dtype=torch.long)
    sizes, ratio = [(16, 12), (8, 6)], 4.0 - seed % 2
    found = yolov5_targets(sizes, STRIDES[:2], ANCHORS[:2], boxes, classes, ratio)
    for level, size, stride, anchors in zip(rows(found), sizes, STRIDES, ANCHORS):
        expected = slow_yolov5_targets(size, stride, anchors.numpy(), boxes.numpy(), ratio)
        assert level == sorted(expected)
    for anchor, _, _, box in found:
        order = anchor * max(len(boxes), 1) + box
        assert torch.equal(order, order.sort().values)


@for_each("numbers, classes", [((4, 7), 3), ((0, 9), 2), ((30, 30), 3), ((0, 0), 3), ((5,), 1)])
def test_loss_against_loops(numbers: tuple[int, ...], classes: int) -> None:
    maps, targets = random_batch(len(numbers) + sum(numbers), numbers, classes)
    losses = loss(maps, targets, gains=(0.1, 0.7, 0.3))
    expected = slow_yolov5_loss(
        [x.numpy() for x in maps],
        [(x["gt_boxes"].numpy(), x["gt_classes"].numpy()) for x in targets],
        *(ANCHORS.numpy(), STRIDES, (0.1, 0.7, 0.3), (4, 1)),
    )
    for name in NAMES:
        assert losses[name].item() == pytest.approx(expected[name], rel=1e-6), name


def cells(x: float, y: float, side: float = 20, width: int = 6, height: int = 4) -> list[Any]:
    """Return the (x, y) cells of one box with the centre x, y, in cells of stride 10."""
    box = torch.tensor([[x * 10, y * 10, x * 10, y * 10]])
    box = box + torch.tensor([-side, -side, side, side]) / 2
    anchors = torch.tensor([[[20.0, 20]]])
    ((_, row, column, _),) = yolov5_targets(
        [(height, width)], [10], anchors, box, torch.zeros(1, dtype=torch.long)
    )
    return list(zip(column.tolist(), row.tolist()))


def test_cells_by_hand() -> None:
    for x, y, expected in [
        (2.25, 1.75, [(2, 1), (1, 1), (2, 2)]),  # left and below
        (2.75, 1.25, [(2, 1), (2, 0), (3, 1)]),  # above and right
        (2.5, 1.5, [(2, 1)]),  # exactly between the sides
        (0.25, 0.25, [(0, 0)]),  # no neighbour beyond the corner
        (5.75, 3.75, [(5, 3)]),
        (1.0, 2.25, [(1, 2), (1, 1), (1, 2)]),  # x > 1 is strict; its own cell again, for x + ½
        (3.0, 2.25, [(3, 2), (2, 2), (3, 1), (3, 2)]),
        (6.0, 4.0, [(5, 3), (5, 3), (5, 3)]),  # on the border: clamped
    ]:
        found = cells(x, y)
        assert found[0] == expected[0] and sorted(found) == sorted(expected), (x, y)
    assert cells(2.25, 1.75, side=79) and not cells(2.25, 1.75, side=80)  # the ratio is strict
    assert cells(2.25, 1.75, side=5.01) and not cells(2.25, 1.75, side=5)
    assert not cells(2.25, 1.75, side=0)


def test_loss_by_hand() -> None:
    """One cell of stride 8 and an anchor of 8x8, which fits two boxes: itself, and half of it.

    Raw predictions of 0 decode to the anchor itself, whose CIoU is 1 with the whole. Its IoU with
    the left half is ½. The centres are 2 pixels apart, and c² is 128.
    """
    maps = torch.zeros(1, 1, 1, 1, 7)
    maps[..., 4] = 1.0
    whole, half = torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([[0.0, 0, 4, 8]])
    v = 4 / math.pi**2 * (math.atan(1) - math.atan(0.5)) ** 2
    ciou = 0.5 - 4 / 128 - v * v / (v + 0.5)

    def parts(boxes: Tensor, classes: list[int]) -> list[float]:
        targets = [{"gt_boxes": boxes, "gt_classes": torch.tensor(classes)}]
        anchor = torch.tensor([[[8.0, 8]]])
        losses = yolov5_loss([maps], targets, anchor, [8], gains=(1, 1, 1), balance=(2.0,))
        assert losses["total"].item() == approx(sum(losses[x].item() for x in NAMES[:3]))
        return [losses[x].item() for x in NAMES[:3]]

    def existence(target: float) -> float:
        return 2 * (math.log(1 + math.exp(1)) - target)

    assert parts(half, [0]) == approx([1 - ciou, existence(ciou), math.log(2)])
    both = [(1 - ciou) / 2, existence(1), math.log(2)]
    assert parts(torch.cat([whole, half]), [0, 1]) == approx(both, abs=1e-6)
    assert parts(torch.cat([half, whole]), [1, 0]) == approx(both, abs=1e-6)  # the maximum wins
    far = torch.tensor([[0.0, 0, 80, 80]])
    assert parts(torch.cat([half, far]), [0, 1])[0] == approx(1 - ciou)  # no anchor fits it


def test_the_order_of_boxes_does_not_matter() -> None:
    maps, targets = random_batch(3, (25, 12))
    order = [torch.randperm(len(x["gt_boxes"]), generator=torch.Generator()) for x in targets]
    mixed = [{k: v[rows] for k, v in x.items()} for x, rows in zip(targets, order)]
    first, second = loss(maps, targets), loss(maps, mixed)
    for name in NAMES:
        assert first[name].item() == pytest.approx(second[name].item(), rel=1e-12)
    arguments = [(16, 12), (8, 6)], STRIDES[:2], ANCHORS[:2]
    found = rows(yolov5_targets(*arguments, **mixed[0]))
    expected = rows(yolov5_targets(*arguments, **targets[0]))
    for own, theirs in zip(found, expected):
        assert sorted((*x[:3], int(order[0][x[3]])) for x in own) == theirs and own


@for_each("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision(dtype: torch.dtype) -> None:
    """Half precision enters as float32, also under autocast, and float64 is kept."""
    maps, targets = random_batch(1, (4, 7))
    maps = [x.to(dtype) for x in maps]
    targets = [{**x, "gt_boxes": x["gt_boxes"].to(dtype)} for x in targets]
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    wide = [{**x, "gt_boxes": x["gt_boxes"].to(kept)} for x in targets]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(maps, targets)
        levels = yolov5_targets([(16, 12)], STRIDES[:1], ANCHORS[:1], **targets[1])
    assert found == loss([x.to(kept) for x in maps], wide)
    assert found["total"].dtype == kept
    assert rows(levels) == rows(yolov5_targets([(16, 12)], STRIDES[:1], ANCHORS[:1], **wide[1]))


def test_no_object() -> None:
    maps, targets = random_batch(0, (0, 0))
    maps = [x.requires_grad_() for x in maps]
    losses = loss(maps, targets)
    losses["total"].backward()
    assert losses["box"] == losses["cls"] == 0 and losses["box"].requires_grad
    for x in maps:
        assert x.grad[..., 4].all() and not x.grad[..., :4].any() and not x.grad[..., 5:].any()
    levels = yolov5_targets([(16, 12)], STRIDES[:1], ANCHORS[:1], **targets[0])
    assert [len(x) for x in levels[0]] == [0] * 4
    assert all(x.dtype == torch.long for x in levels[0])


def test_one_class_has_no_class_loss() -> None:
    maps, targets = random_batch(0, (6,), classes=1)
    losses = loss([x.requires_grad_() for x in maps], targets)
    losses["cls"].backward()
    assert losses["cls"] == 0 and losses["box"] > 0


def test_the_loss_does_not_wait() -> None:
    maps, targets = random_batch(0, (4, 7))
    with Recorder() as recorder:
        loss([x.requires_grad_() for x in maps], targets)["total"].backward()
    assert not recorder.waits and "scatter_reduce" in recorder.names
    with Recorder() as recorder:
        yolov5_targets([(16, 12)], STRIDES[:1], ANCHORS[:1], **targets[0])
    assert recorder.waits == {"nonzero"}


def test_a_degenerate_box_is_background() -> None:
    maps, targets = random_batch(0, (4, 7))
    expected = loss(maps, targets)["total"]
    bad = torch.tensor([[10.0, 10, 10, 10], [20, 20, 10, 30]]).double()
    targets[0]["gt_boxes"] = torch.cat([targets[0]["gt_boxes"], bad])
    targets[0]["gt_classes"] = torch.cat([targets[0]["gt_classes"], torch.zeros(2).long()])
    maps = [x.requires_grad_() for x in maps]
    found = loss(maps, targets)["total"]
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert all(x.grad.isfinite().all() for x in maps)


def test_gradients() -> None:
    maps, targets = random_batch(4, (2, 1))
    small = [x[:, :, ::4, ::3].contiguous() for x in maps]  # 4x4 and 2x2 cells of stride 8 and 16
    targets = [{**x, "gt_boxes": x["gt_boxes"] / 3} for x in targets]

    def classes(*maps: Tensor) -> Tensor:
        return loss(list(maps), targets, gains=(0, 0, 1))["total"]

    def objectness(*maps: Tensor) -> Tensor:
        empty = [{k: v[:0] for k, v in x.items()} for x in targets]
        return loss(list(maps), empty)["total"]

    rows = [x.requires_grad_() for x in small]
    assert classes(*rows) > 0
    assert torch.autograd.gradcheck(classes, rows, fast_mode=True)
    assert torch.autograd.gradcheck(objectness, rows, fast_mode=True)

    # α has no gradient, which only shows if aspect ratios differ.
    boxes = torch.tensor([[0.0, 0, 4, 8], [1, 1, 3, 3], [9, 9, 12, 10]], dtype=torch.float64)
    same = torch.tensor([[1.0, 1, 4, 7], [0, 0, 5, 5], [0, 0, 6, 2]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: complete_iou(x, same), boxes.requires_grad_())
    inverted = torch.tensor([[5.0, 6, 2, 1], [2, 3, 2.5, 1], [0, 0, 3, 4]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: generalized_iou(x, same), inverted.requires_grad_())


def test_numbers_that_do_not_fit() -> None:
    maps, targets = random_batch(0, (1, 1))
    with pytest.raises(ValueError, match="targets of 1 images do not fit maps of 2"):
        loss(maps, targets[:1])
    with pytest.raises(ValueError, match="balance of 3 levels do not fit anchors of 2"):
        yolov5_loss(maps, targets, ANCHORS[:2], STRIDES[:2])
    with pytest.raises(ValueError, match="sizes of 2 levels do not fit anchors of 3"):
        yolov5_targets(SIZES[:2], STRIDES, ANCHORS, **targets[0])
    with pytest.raises(ValueError, match="1 boxes have 2 classes"):
        yolov5_targets(SIZES, STRIDES, ANCHORS, targets[0]["gt_boxes"], torch.tensor([0, 1]))

"""Test YOLOX's assignment and losses against the authors' numbers, loops, and by hand."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.nets.assign import sim_ota, yolox_l1, yolox_loss
from distill.nets.assign.yolox import joint_class_cost
from tests.reference.detectors import (
    CLASSES,
    REFERENCE,
    TOLERANCE,
    YOLOXInputs,
    emptied,
    points,
    yolox_inputs,
)
from tests.reference.dynamic_assign import slow_sim_ota
from tests.support.cases import for_each
from tests.support.operations import Recorder
from tests.support.scenes import Image, random_image

approx = partial(pytest.approx, rel=TOLERANCE)
VARIANTS = "paper", "repository"


def assign_reference(
    inputs: YOLOXInputs, variant: str
) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return the matches of each image, and labels, boxes and qualities of both."""
    dtype = inputs.logits.dtype
    centers, strides = points(0.5, dtype)
    matches, targets = [], []
    for i, (gt, classes) in enumerate(inputs.images):
        predicted = inputs.logits[i], inputs.objectness[i], inputs.boxes()[i]
        gt = gt.to(dtype)
        matched, quality = sim_ota(*predicted, centers, strides, gt, classes, variant=variant)
        matches.append(matched)
        labels, truth = torch.full_like(matched, CLASSES), torch.full_like(predicted[2], torch.nan)
        labels[matched >= 0] = classes[matched[matched >= 0]]
        truth[matched >= 0] = gt[matched[matched >= 0]]
        targets.append((labels, truth, quality))
    labels, truth, quality = map(torch.stack, zip(*targets))
    return matches, (labels, truth, quality)


def all_losses(
    inputs: YOLOXInputs, labels: Tensor, gt: Tensor, quality: Tensor
) -> dict[str, Tensor]:
    centers, strides = points(0.5, inputs.logits.dtype)
    positive = labels < CLASSES
    number = positive.sum().clamp(min=1)
    losses = yolox_loss(
        inputs.logits, inputs.objectness, inputs.boxes(), labels, gt, quality, number
    )
    l1 = yolox_l1(inputs.regression, centers, strides, positive, gt, number)
    return {**losses, "loss_l1": l1}


def authors_losses(case: dict[str, Any]) -> dict[str, Any]:
    names = {"cls": "cls", "box_reg": "bbox", "obj": "obj", "l1": "l1"}
    return {f"loss_{own}": approx(case[f"loss_{theirs}"]) for own, theirs in names.items()}


@for_each("dtype", [torch.float32, torch.float64])
@for_each("variant, case", [(v, c) for v in VARIANTS for c in REFERENCE[f"sim_ota_{v}"]])
def test_the_authors_matches_and_losses(dtype: torch.dtype, variant: str, case: Any) -> None:
    inputs = yolox_inputs(case["seed"], case["guided"], dtype)
    matches, targets = assign_reference(inputs, variant)
    for matched, quality, expected in zip(matches, targets[2], case["assigned"]):
        (positive,) = (matched >= 0).nonzero(as_tuple=True)
        assert positive.tolist() == expected["prior"]
        assert matched[positive].tolist() == expected["gt"]
        assert quality[positive].tolist() == approx(expected["iou"])
        assert quality[matched < 0].eq(0).all()

    predictions = inputs.logits, inputs.regression, inputs.objectness
    for x in predictions:
        x.requires_grad_()
    losses = all_losses(inputs, *targets)
    assert {k: x.item() for k, x in losses.items()} == authors_losses(case)
    if "grad_abs_sum" in case:
        torch.stack([*losses.values()]).sum().backward()
        for x, name in zip(predictions, ("cls", "reg", "obj")):
            assert x.grad.abs().sum().item() == approx(case["grad_abs_sum"][name])


@for_each("which", ["second", "both"])
def test_the_authors_losses_of_empty_images(which: str) -> None:
    inputs = yolox_inputs(0, guided=False)
    inputs = inputs._replace(images=emptied(inputs.images, which))
    matches, targets = assign_reference(inputs, "paper")
    assert (matches[1] == -1).all()
    losses = {k: x.item() for k, x in all_losses(inputs, *targets).items()}
    assert losses == authors_losses(REFERENCE["empty"]["sim_ota_paper"][which])


def assign(x: Image, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return sim_ota(*x, **kwargs)


@for_each("variant", VARIANTS)
@for_each("seed", range(12))
def test_against_loops(variant: str, seed: int) -> None:
    x = random_image(seed, seed % 5)
    found, quality = assign(x, topk=10 - seed % 4, variant=variant)
    expected, expected_quality = slow_sim_ota(*(v.numpy() for v in x), 10 - seed % 4, variant)
    assert found.tolist() == expected
    assert quality.tolist() == pytest.approx(expected_quality, abs=1e-12)
    assert seed % 5 == 0 or max(expected) >= 0


def test_candidates_by_hand() -> None:
    """Points around a wide box with the centre (40, 40), on a level of stride 8.

    The first is at the centre. The second is outside its square of 2.5 strides and inside the box,
    the third is the reverse, and the fourth is in neither. All have the same IoU of 1, so k is the
    number of candidates. In the repository the square has 12 pixels, which exclude the border.
    """
    gt = torch.tensor([[0.0, 36, 80, 44]])
    at = torch.tensor([[40.0, 40], [62, 40], [40, 51], [62, 51], [40, 52], [60, 40], [40, 61]])
    rest = torch.zeros(7, 1), torch.zeros(7), gt.expand(7, 4), at, torch.full((7,), 8.0), gt
    classes = torch.zeros(1, dtype=torch.long)
    paper, _ = sim_ota(*rest, classes)
    assert paper.tolist() == [0, 0, 0, -1, 0, 0, -1]
    repository, _ = sim_ota(*rest, classes, variant="repository")
    assert repository.tolist() == [0, -1, 0, -1, -1, -1, -1]
    first, _ = sim_ota(*rest, classes, topk=1)
    assert first.tolist() == [0, *[-1] * 6]
    far, _ = sim_ota(*(x[3:4] for x in rest[:5]), gt, classes, variant="repository")
    assert far.tolist() == [-1]  # the authors' code fails without a candidate


def test_penalised_cells_rank_by_their_exact_cost() -> None:
    """Their costs differ by less than float32 can add to 1e5. The second cell is better."""
    gt = torch.tensor([[0.0, 0, 8, 8]])
    at, strides = torch.tensor([[9.0, 4], [4, 9]]), torch.full((2,), 8.0)
    boxes = torch.tensor([[0.0, 0, 8, 4], [0, 0, 8, 4.001]])
    rest = torch.zeros(2, 1), torch.zeros(2), boxes, at, strides, gt, torch.tensor([0])
    iou = boxes[:, 3] / 8
    assert (1e5 - 3 * iou.log()).unique().numel() == 1
    assert sim_ota(*rest)[0].tolist() == [-1, 0]


def test_the_order_of_boxes_and_points_does_not_matter() -> None:
    x = random_image(1, 6)
    matched, quality = assign(x)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(x.gt), generator=generator)
    order = torch.randperm(len(x.points), generator=generator)
    found, found_quality = sim_ota(*(v[order] for v in x[:5]), x.gt[rows], x.classes[rows])
    assert torch.equal(torch.where(found < 0, -1, rows[found]), matched[order])
    assert torch.equal(found_quality, quality[order])
    assert len(matched.unique()) > 4


@for_each("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision(dtype: torch.dtype) -> None:
    """Half precision enters as float32, also under autocast, and float64 is kept."""
    x = Image(*(v.to(dtype) if v.is_floating_point() else v for v in random_image(2, 5)))
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    wide = Image(*(v.to(kept) if v.is_floating_point() else v for v in x))
    matched, quality = assign(wide)
    labels, gt = x.classes[matched].where(matched >= 0, 3), x.gt[matched]
    expected = yolox_loss(*wide[:3], labels, gt.to(kept), quality, 2)
    l1 = yolox_l1(wide.boxes, wide.points, wide.strides, matched >= 0, gt.to(kept), 2)
    with torch.autocast("cpu", torch.bfloat16):
        found, found_quality = assign(x)
        losses = yolox_loss(*x[:3], labels, gt, quality, 2)
        assert torch.equal(l1, yolox_l1(x.boxes, x.points, x.strides, matched >= 0, gt, 2))
    assert torch.equal(found, matched) and torch.equal(found_quality, quality)
    assert quality.dtype == l1.dtype == kept and (matched >= 0).any()
    assert losses == expected and losses["loss_cls"].dtype == kept


@for_each("dtype", [torch.float32, torch.float64])
def test_the_cost_of_certain_predictions(dtype: torch.dtype) -> None:
    """The probabilities are 1 and 0. Logarithms are at least −100, so that costs are finite."""
    logits, objectness = torch.tensor([[200.0, -2000]], dtype=dtype), torch.full((1,), 200.0)
    cost = joint_class_cost(logits, objectness.to(dtype), torch.tensor([0, 1]))
    assert cost.tolist() == [[0], [200]]


@for_each("boxes, number", [(0, 30), (3, 0), (0, 0)])
@for_each("variant", VARIANTS)
def test_nothing_to_match(boxes: int, number: int, variant: str) -> None:
    x = random_image(0, boxes)
    x = Image(*(v[:number] for v in x[:5]), *x[5:])
    matched, quality = assign(x, variant=variant)
    assert matched.tolist() == [-1] * number and quality.tolist() == [0] * number
    assert matched.dtype == torch.long and quality.dtype == torch.float64
    rows = [v.requires_grad_() for v in x[:3]]
    undefined = x.boxes.detach() * torch.nan
    losses = yolox_loss(*rows, matched, undefined, undefined[:, 0], 1)
    l1 = yolox_l1(x.boxes, x.points, x.strides, matched >= 0, undefined, 1)
    sum([*losses.values(), l1]).backward()
    assert losses["loss_box_reg"] == losses["loss_cls"] == l1 == 0
    assert all(v.grad.isfinite().all() for v in rows)
    assert (losses["loss_obj"] > 0) == (number > 0)


def test_an_unknown_variant() -> None:
    with pytest.raises(ValueError, match="'2023' is unknown: use 'paper' or 'repository'"):
        assign(random_image(0, 1), variant="2023")


def test_no_gradient_and_no_wait() -> None:
    x = random_image(3, 4)
    rows = [v.requires_grad_() for v in x[:3]]
    with Recorder() as recorder:
        matched, quality = assign(x)
        labels = x.classes[matched.clamp(0)].where(matched >= 0, -1)
        gt, positive = x.gt[matched.clamp(0)], matched >= 0
        losses = yolox_loss(*rows, labels, gt, quality, positive.sum())
        l1 = yolox_l1(x.boxes, x.points, x.strides, positive, gt, positive.sum())
    assert not quality.requires_grad and l1.requires_grad
    assert all(v.requires_grad for v in losses.values())
    assert not recorder.waits and "topk" in recorder.names


def test_the_cost_makes_no_tensor_of_all_classes() -> None:
    x = random_image(4, 20, classes=80)
    with Recorder() as recorder:
        assign(x)
    assert recorder.largest < 20 * len(x.points) * 80 * 8 / 4


def test_losses_by_hand() -> None:
    """Two cells and two classes, logits 0. The first matches a box of twice its height."""
    boxes = torch.tensor([[0.0, 0, 4, 4], [torch.inf, 0, -torch.inf, 9]], requires_grad=True)
    gt, labels = torch.tensor([[0.0, 0, 4, 8], [torch.nan] * 4]), torch.tensor([1, 2])
    quality = torch.tensor([0.5, torch.nan])
    losses = yolox_loss(torch.zeros(2, 2), torch.zeros(2), boxes, labels, gt, quality, 2.0)
    assert losses["loss_cls"].item() == approx(2 * math.log(2) / 2)
    assert losses["loss_box_reg"].item() == approx(5 * (1 - 0.25) / 2)
    assert losses["loss_obj"].item() == approx(2 * math.log(2) / 2)
    losses["loss_box_reg"].backward()
    assert boxes.grad.isfinite().all() and boxes.grad[1].eq(0).all()

    # The cell (1, 0) of stride 8: the centre (2, 4) is at (−¾, ½), the sides are ½ and 1.
    regression = torch.tensor([[0.25, 0.5, 0, 0], [9, 9, 9, 9]])
    centers, strides = torch.tensor([[12.0, 4], [20, 4]]), torch.tensor([8, 8])
    l1 = yolox_l1(regression, centers, strides, labels == 1, gt, 2.0)
    assert l1.item() == approx((1 + 0 + math.log(2) + 0) / 2)


def test_gradients() -> None:
    x = random_image(5, 3)
    matched, quality = assign(x)
    labels, gt = x.classes[matched].where(matched >= 0, -1), x.gt[matched]
    keep = torch.cat([(matched >= 0).nonzero()[:4, 0], (matched < 0).nonzero()[:2, 0]])
    labels, gt, quality = labels[keep], gt[keep], quality[keep]

    def losses(logits: Tensor, objectness: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        l1 = yolox_l1(boxes, x.points[keep], x.strides[keep], labels >= 0, gt, 2.0)
        return *yolox_loss(logits, objectness, boxes, labels, gt, quality, 2.0).values(), l1

    assert torch.autograd.gradcheck(losses, [v[keep].requires_grad_() for v in x[:3]])

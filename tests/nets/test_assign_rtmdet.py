"""Test RTMDet's assignment and losses against the authors' numbers, loops, and by hand."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.nets.assign import (
    dynamic_masks,
    dynamic_soft_labels,
    generalized_iou,
    mask_centers,
    mask_loss,
    rtmdet_loss,
    sampled_masks,
)
from tests.reference.detectors import (
    CLASSES,
    REFERENCE,
    TOLERANCE,
    RTMDetInputs,
    emptied,
    points,
    rtmdet_inputs,
)
from tests.reference.dynamic_assign import slow_soft_labels
from tests.support.cases import for_each
from tests.support.operations import Recorder
from tests.support.scenes import Image, random_image

approx = partial(pytest.approx, rel=TOLERANCE)
LEVELS = (400, 100, 25)  # points per level in the reference


def assign(x: Image, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return dynamic_soft_labels(x.logits, x.boxes, x.points, x.strides, x.gt, x.classes, **kwargs)


def assign_reference(
    inputs: RTMDetInputs, masks: bool
) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return the matches of each image, and labels, boxes and qualities of both."""
    dtype = inputs.logits.dtype
    at, strides = points(0, dtype)
    matches, targets = [], []
    for i, (gt, classes) in enumerate(inputs.images):
        gt, boxes = gt.to(dtype), inputs.boxes()[i]
        centres = mask_centers(inputs.masks(i)).to(dtype) if masks else None
        matched, quality = dynamic_soft_labels(
            inputs.logits[i], boxes, at, strides, gt, classes, centres
        )
        matches.append(matched)
        labels, truth = torch.full_like(matched, CLASSES), torch.full_like(boxes, torch.nan)
        labels[matched >= 0] = classes[matched[matched >= 0]]
        truth[matched >= 0] = gt[matched[matched >= 0]]
        targets.append((labels, truth, quality))
    labels, truth, quality = map(torch.stack, zip(*targets))
    return matches, (labels, truth, quality)


@for_each("dtype", [torch.float32, torch.float64])
@for_each("name, case", [(n, c) for n in ("rtmdet", "rtmdet_ins") for c in REFERENCE[n]])
def test_the_authors_matches_and_losses(dtype: torch.dtype, name: str, case: Any) -> None:
    inputs = rtmdet_inputs(case["seed"], case["guided"], dtype)
    matches, (labels, gt, quality) = assign_reference(inputs, masks=name == "rtmdet_ins")
    for matched, own, expected in zip(matches, quality, case["assigned"]):
        (positive,) = (matched >= 0).nonzero(as_tuple=True)
        assert positive.tolist() == expected["prior"]
        assert matched[positive].tolist() == expected["gt"]
        if "iou" in expected:
            assert own[positive].tolist() == approx(expected["iou"])
            assert own[matched < 0].eq(0).all()

    logits, distances = inputs.logits.requires_grad_(), inputs.distances.requires_grad_()
    boxes, number = inputs.boxes(), quality.sum().clamp(min=1)
    losses = rtmdet_loss(logits, boxes, labels, gt, quality, number)
    assert losses["loss_cls"].item() == approx(case["loss_cls"])
    assert losses["loss_box_reg"].item() == approx(case["loss_bbox"])
    if name == "rtmdet":
        tensors = [x.split(LEVELS, 1) for x in (logits, boxes, labels, gt, quality)]
        levels = [rtmdet_loss(*x, number) for x in zip(*tensors)]
        assert [x["loss_cls"].item() for x in levels] == approx(case["loss_cls_per_level"])
        assert [x["loss_box_reg"].item() for x in levels] == approx(case["loss_bbox_per_level"])
        torch.stack([*losses.values()]).sum().backward()
        assert logits.grad.abs().sum().item() == approx(case["grad_abs_sum_cls"])
        assert distances.grad.abs().sum().item() == approx(case["grad_abs_sum_distance"])


@for_each("case", REFERENCE["rtmdet_ins"])
def test_the_authors_masks(case: Any) -> None:
    inputs = rtmdet_inputs(case["seed"], case["guided"])
    at, strides = points(0)
    losses, number = [], sum(len(x["prior"]) for x in case["assigned"])
    for i, assigned in enumerate(case["assigned"]):
        index, masks = torch.tensor(assigned["prior"]), inputs.masks(i)
        assert masks.sum((1, 2)).tolist() == case["mask_pixels"][i]
        logits = dynamic_masks(
            inputs.kernels[i][index], at[index], strides[index], inputs.prototypes[i]
        )
        found = [logits.mean(), logits.std(), logits[0, 0, 0], logits[-1, -1, -1]]
        # Six digits of the logits, whose mean may be much smaller than they are.
        assert [x.item() for x in found] == approx(
            case["mask_logits_mean_std_first_last"][i], abs=1e-6
        )
        targets = sampled_masks(masks, 40, 40)[torch.tensor(assigned["gt"])]
        losses.append(mask_loss(logits, targets, number))
    assert sum(losses).item() == approx(case["loss_mask"])


@for_each("which", ["second", "both"])
def test_the_authors_losses_of_empty_images(which: str) -> None:
    inputs = rtmdet_inputs(0, guided=False)
    inputs = inputs._replace(images=emptied(inputs.images, which))
    matches, (labels, gt, quality) = assign_reference(inputs, masks=False)
    assert (matches[1] == -1).all()
    losses = rtmdet_loss(
        inputs.logits, inputs.boxes(), labels, gt, quality, quality.sum().clamp(min=1)
    )
    expected = REFERENCE["empty"]["rtmdet"][which]
    assert losses["loss_cls"].item() == approx(expected["loss_cls"])
    assert losses["loss_box_reg"].item() == approx(expected["loss_bbox"])


def test_the_authors_giou() -> None:
    """One box is empty and one is inverted."""
    case = REFERENCE["giou"]
    a, b = torch.tensor(case["a"]), torch.tensor(case["b"])
    assert (1 - generalized_iou(a, b)).tolist() == approx(case["loss"])


@for_each("seed", range(12))
def test_against_loops(seed: int) -> None:
    x = random_image(seed, seed % 5)
    centres = x.gt[:, :2] if seed % 2 else None
    found, quality = assign(x, gt_centers=centres, topk=13 - seed % 4)
    arrays = [v.numpy() for v in (x.logits, x.boxes, x.points, x.strides, x.gt, x.classes)]
    expected, expected_quality = slow_soft_labels(
        *arrays, None if centres is None else centres.numpy(), 13 - seed % 4
    )
    assert found.tolist() == expected
    assert quality.tolist() == pytest.approx(expected_quality, abs=1e-12)
    assert seed % 5 == 0 or max(expected) >= 0


def test_a_box_smaller_than_a_cell_takes_a_point_of_another() -> None:
    """The large box has k = int(14/16 + 15/16) = 1 and selects the second point, the better one.

    No point lies inside the small box. It has k = 1 and an IoU of 1/224 with the first prediction,
    which is more than 1/240 with the second. The third point lies in no box.
    """
    gt = torch.tensor([[0.0, 0, 16, 16], [9, 4, 10, 5]])
    at, strides = torch.tensor([[4.0, 4], [12, 4], [28, 4]]), torch.full((3,), 8.0)
    boxes = torch.tensor([[0.0, 0, 16, 14], [0, 0, 16, 15], [9, 4, 10, 5]])
    rest = torch.zeros(3, 2), boxes, at, strides
    matched, quality = dynamic_soft_labels(*rest, gt, torch.tensor([0, 1]))
    assert matched.tolist() == [1, 0, -1]
    assert quality.tolist() == approx([1 / 224, 15 / 16, 0])
    alone, _ = dynamic_soft_labels(*rest, gt[1:], torch.tensor([1]))
    assert alone.tolist() == [-1, -1, -1]  # without another box there is no candidate


def test_the_order_of_boxes_and_points_does_not_matter() -> None:
    x = random_image(1, 6)
    matched, quality = assign(x)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(x.gt), generator=generator)
    order = torch.randperm(len(x.points), generator=generator)
    mixed = [v[order] for v in (x.logits, x.boxes, x.points, x.strides)]
    found, found_quality = dynamic_soft_labels(*mixed, x.gt[rows], x.classes[rows])
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
    expected = rtmdet_loss(wide.logits, wide.boxes, labels, gt.to(kept), quality, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found, found_quality = assign(x)
        losses = rtmdet_loss(x.logits, x.boxes, labels, gt, quality, 2)
    assert torch.equal(found, matched) and torch.equal(found_quality, quality)
    assert quality.dtype == kept and (matched >= 0).any()
    assert losses == expected and losses["loss_cls"].dtype == kept


@for_each("boxes, points", [(0, 30), (3, 0), (0, 0)])
def test_nothing_to_match(boxes: int, points: int) -> None:
    x = random_image(0, boxes)
    x = Image(*(v[:points] for v in x[:5]), *x[5:])
    logits, predicted = x.logits.requires_grad_(), x.boxes.requires_grad_()
    matched, quality = assign(x)
    assert matched.tolist() == [-1] * points and quality.tolist() == [0] * points
    assert matched.dtype == torch.long and quality.dtype == torch.float64
    losses = rtmdet_loss(logits, predicted, matched, predicted.detach() * torch.nan, quality, 1)
    sum(losses.values()).backward()
    assert losses["loss_box_reg"] == 0 and predicted.grad.eq(0).all()
    assert logits.grad.shape == logits.shape and (losses["loss_cls"] > 0) == (points > 0)


def test_no_gradient_and_no_wait() -> None:
    x = random_image(3, 4)
    predictions = [v.requires_grad_() for v in (x.logits, x.boxes)]
    with Recorder() as recorder:
        matched, quality = assign(x)
        labels = x.classes[matched.clamp(0)].where(matched >= 0, -1)
        losses = rtmdet_loss(*predictions, labels, x.gt[matched.clamp(0)], quality, quality.sum())
    assert not quality.requires_grad and all(v.requires_grad for v in losses.values())
    assert not recorder.waits and "topk" in recorder.names


def test_the_cost_makes_no_tensor_of_all_classes() -> None:
    x = random_image(4, 20, classes=80)
    with Recorder() as recorder:
        assign(x)
    assert recorder.largest < 20 * len(x.points) * 80 * 8 / 4


def test_losses_by_hand() -> None:
    """Two points, two classes, logits 0. The first point matches a box of twice its height."""
    logits, quality = torch.zeros(2, 2), torch.tensor([0.5, torch.nan])
    boxes = torch.tensor([[0.0, 0, 4, 4], [torch.inf, 0, -torch.inf, 9]], requires_grad=True)
    gt = torch.tensor([[0.0, 0, 4, 8], [torch.nan] * 4])
    losses = rtmdet_loss(logits, boxes, torch.tensor([1, 2]), gt, quality, 2.0)
    # Three elements with target 0: log 2 · ½². The target ½ equals the probability: 0.
    assert losses["loss_cls"].item() == approx(3 * torch.tensor(2.0).log().item() / 4 / 2)
    assert losses["loss_box_reg"].item() == approx(2 * 0.5 * (1 - 0.5) / 2)
    losses["loss_box_reg"].backward()
    assert boxes.grad.isfinite().all() and boxes.grad[1].eq(0).all()


def test_masks_by_hand() -> None:
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, 2:4, 1:6] = True
    assert mask_centers(masks).tolist() == [[3, 2.5], [0, 0]]

    # Weights that return minus the relative y, times 2, plus 1: the grid runs to the lower right.
    kernel = torch.zeros(1, 3 * 8 + 64 + 8 + 17)  # one prototype
    kernel[0, 1], kernel[0, 3 * 8], kernel[0, 3 * 8 + 64] = -1, 2, 1
    kernel[0, -1] = 1
    logits = dynamic_masks(
        kernel, torch.tensor([[0.0, 0]]), torch.tensor([4.0]), torch.ones(1, 2, 3)
    )
    assert logits.tolist() == [[[1, 1, 1], [1 + 2 * 8 / 32] * 3]]

    # Logits 0, probability ½ in 2x2 samples, of which one is set: 2 · ½ / (1 + 1).
    pixels = torch.zeros(1, 7, 8)
    pixels[0, 2, 6] = 1
    pixels[0, 0] = 1
    sampled = sampled_masks(pixels, 2, 2)
    assert sampled.tolist() == [[[0, 1], [0, 0]]]
    assert mask_loss(torch.zeros(1, 1, 1), sampled, 1.0).item() == approx(2 * (1 - 1 / 2))
    assert mask_loss(torch.zeros(1, 1, 1), sampled, 4.0, weight=1).item() == approx(1 / 8)
    counts, two = torch.tensor([False, True]), sampled.repeat(2, 1, 1)
    assert mask_loss(torch.zeros(2, 1, 1), two, 1.0, counts=counts).item() == approx(1)


def test_masks_of_no_object() -> None:
    kernels = torch.zeros(0, 169, requires_grad=True)
    logits = dynamic_masks(kernels, torch.zeros(0, 2), torch.zeros(0), torch.ones(8, 2, 3))
    loss = mask_loss(logits, torch.zeros(0, 4, 6), 1.0)
    loss.backward()
    assert loss == 0 and kernels.grad.shape == (0, 169)
    assert mask_centers(torch.zeros(0, 4, 4)).shape == (0, 2)


def test_masks_in_half_precision() -> None:
    inputs = rtmdet_inputs(0, guided=False)
    at, strides = points(0)
    arguments = [inputs.kernels[0][:5], at[:5], strides[:5], inputs.prototypes[0]]
    half = [x.bfloat16() for x in arguments]
    with torch.autocast("cpu", torch.bfloat16):
        found = dynamic_masks(*half)
    assert torch.equal(found, dynamic_masks(*(x.float() for x in half)))
    assert found.dtype == torch.float32


def test_masks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="kernels of 168 numbers do not fit 8 prototypes"):
        dynamic_masks(torch.zeros(1, 168), torch.zeros(1, 2), torch.ones(1), torch.ones(8, 2, 3))
    with pytest.raises(ValueError, match="pad the sampled masks to twice the size"):
        mask_loss(torch.zeros(1, 2, 3), torch.zeros(1, 4, 5), 1.0)
    with pytest.raises(ValueError, match=r"masks of 19x8 pixels are larger than .* 16x8 pixels"):
        sampled_masks(torch.zeros(1, 19, 8), 4, 2)


def test_gradients() -> None:
    x = random_image(5, 3)
    matched, quality = assign(x)
    labels, gt = x.classes[matched].where(matched >= 0, -1), x.gt[matched]
    keep = torch.cat([(matched >= 0).nonzero()[:4, 0], (matched < 0).nonzero()[:2, 0]])
    labels, gt, quality = labels[keep], gt[keep], quality[keep]

    def losses(logits: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        return tuple(rtmdet_loss(logits, boxes, labels, gt, quality, 2.0).values())

    rows = [v[keep].detach().requires_grad_() for v in (x.logits, x.boxes)]
    assert torch.autograd.gradcheck(losses, rows)

    generator = torch.Generator().manual_seed(0)
    kernels, prototypes = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in [(2, 113), (1, 2, 2)]
    )
    masks = (torch.rand(2, 4, 4, generator=generator) > 0.5).double()

    def masked(kernels: Tensor, prototypes: Tensor) -> Tensor:
        at, strides = torch.tensor([[8.0, 4], [3, 5]]).double(), torch.tensor([8.0, 16]).double()
        return mask_loss(dynamic_masks(kernels, at, strides, prototypes), masks, 2.0)

    assert torch.autograd.gradcheck(masked, (kernels, prototypes))

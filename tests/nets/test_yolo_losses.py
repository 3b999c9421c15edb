"""Test the losses of RTMDet and YOLO in whole detectors.

The losses and assignments themselves are tested in ``test_assign_*.py``.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor

from distill.nets.assign import yolov5_boxes
from distill.nets.yolov5 import ANCHORS
from tests.reference.assign import iou
from tests.reference.detectors import (
    CLASSES,
    REFERENCE,
    SIZE,
    STRIDES,
    TOLERANCE,
    Scene,
    emptied,
    rtmdet_inputs,
    yolov5_inputs,
    yolox_inputs,
)
from tests.reference.dynamic_assign import (
    entropy,
    middle,
    sigmoid,
    slow_sim_ota,
    slow_soft_labels,
    slow_yolov5_loss,
)
from tests.support.cases import for_each
from tests.support.networks import image_dict
from tests.support.operations import Recorder
from tests.support.yolo import NETWORKS, yolo

approx = partial(pytest.approx, rel=TOLERANCE)
SIZES = [(SIZE // s, SIZE // s) for s in STRIDES]
L1 = ("MODEL.YOLOX.L1_FROM_ITER", 0)
LOSSES = [x for x in NETWORKS if x not in ("YOLOv3", "YOLOv4")]  # which have those of YOLOv5
YOLOV5_FACTORS = {"box": 2.0, "obj": 2 * (SIZE / 640) ** 2, "cls": 2 * CLASSES / 80}


def detector(architecture: str, *opts: Any) -> Any:
    """Build a tiny detector of the reference's classes, in training mode."""
    return yolo(architecture, f"MODEL.{architecture.upper()}.NUM_CLASSES", CLASSES, *opts).train()


def instances(images: Sequence[Scene], masks: Sequence[Tensor] = ()) -> list[Instances]:
    found = []
    for i, (boxes, classes) in enumerate(images):
        x = Instances((SIZE, SIZE), gt_boxes=Boxes(boxes.float()), gt_classes=classes)
        if masks:
            x.gt_masks = BitMasks(masks[i])
        found.append(x)
    return found


def as_maps(rows: Tensor) -> list[Tensor]:
    """Return (2, P, C) rows as one (2, C, H, W) map per level."""
    levels = rows.split([h * w for h, w in SIZES], 1)
    return [x.transpose(1, 2).unflatten(2, size) for x, size in zip(levels, SIZES)]


def losses(model: Any, predictions: Any, gt: list[Instances]) -> dict[str, Tensor]:
    priors = model.anchor_generator([torch.empty(1, 1, *size) for size in SIZES])
    found: dict[str, Tensor] = model.losses(priors, predictions, gt)
    return found


def check(found: dict[str, Tensor], case: dict[str, Any], names: dict[str, str]) -> None:
    assert found.keys() == names.keys()
    for ours, theirs in names.items():
        assert found[ours].item() == approx(case[theirs], abs=1e-7), ours


# ---- The authors' numbers

RTMDET = {"loss_cls": "loss_cls", "loss_box_reg": "loss_bbox"}
YOLOX = {**RTMDET, "loss_obj": "loss_obj", "loss_l1": "loss_l1"}


def rtmdet_predictions(inputs: Any) -> list[list[Tensor]]:
    distances = [x / s for x, s in zip(as_maps(inputs.distances), STRIDES)]
    return [as_maps(inputs.logits), distances, as_maps(inputs.kernels), [inputs.prototypes]]


@for_each("case", REFERENCE["rtmdet"])
def test_rtmdet(case: Any) -> None:
    inputs = rtmdet_inputs(case["seed"], case["guided"])
    found = losses(detector("RTMDet"), rtmdet_predictions(inputs)[:2], instances(inputs.images))
    check(found, case, RTMDET)


@for_each("case", REFERENCE["rtmdet_ins"])
def test_rtmdet_ins(case: Any) -> None:
    inputs = rtmdet_inputs(case["seed"], case["guided"])
    gt = instances(inputs.images, [inputs.masks(i) for i in range(2)])
    found = losses(detector("RTMDetIns"), rtmdet_predictions(inputs), gt)
    check(found, case, {**RTMDET, "loss_mask": "loss_mask"})


def yolox_predictions(inputs: Any) -> list[list[Tensor]]:
    """A head returns centres relative to the middle of the cell."""
    deltas = inputs.regression - torch.tensor([0.5, 0.5, 0, 0])
    return [as_maps(x) for x in (inputs.logits, deltas, inputs.objectness[..., None])]


@for_each(
    "variant, case",
    [(v, case) for v in ("paper", "repository") for case in REFERENCE[f"sim_ota_{v}"]],
)
def test_yolox(variant: str, case: Any) -> None:
    inputs = yolox_inputs(case["seed"], case["guided"])
    model = detector("YOLOX", *L1, "MODEL.YOLOX.ASSIGNMENT", variant)
    check(losses(model, yolox_predictions(inputs), instances(inputs.images)), case, YOLOX)


def yolov5_predictions(maps: Sequence[Tensor]) -> list[list[Tensor]]:
    channels = [x.movedim(-1, 2) for x in maps]  # N, A, 5 + K, H, W
    logits, raw = (
        [x[:, :, part].flatten(1, 2) for x in channels] for part in (slice(5, None), slice(4))
    )
    return [logits, raw, [x[:, :, 4] for x in channels], raw]


def check_yolov5(found: dict[str, Tensor], case: dict[str, float]) -> None:
    names = {"loss_box_reg": "box", "loss_obj": "obj", "loss_cls": "cls"}
    check(found, {k: YOLOV5_FACTORS[k] * case[k] for k in YOLOV5_FACTORS}, names)


@for_each("case", REFERENCE["yolov5"])
def test_yolov5(case: Any) -> None:
    """Factors are scaled to 160 x 160 pixels and 5 classes, and multiplied by two images."""
    inputs = yolov5_inputs(case["seed"], case["crowded"])
    found = losses(detector("YOLOv5"), yolov5_predictions(inputs.maps), instances(inputs.images))
    check_yolov5(found, case["max_duplicates"])


OF_YOLOV5 = ("MODEL.YOLOV7.ANCHORS", ANCHORS)


@for_each("case", REFERENCE["yolov7"])
def test_yolov7(case: Any) -> None:
    inputs = yolov5_inputs(case["seed"], False)
    model, gt = detector("YOLOv7", *OF_YOLOV5), instances(inputs.images)
    check_yolov5(losses(model, yolov5_predictions(inputs.maps), gt), case["loss"])


@for_each("which", ["second", "both"])
def test_empty_images(which: str) -> None:
    case = REFERENCE["empty"]
    rtmdet, yolox, yolov5 = rtmdet_inputs(0, False), yolox_inputs(0, False), yolov5_inputs(0, False)
    gt = instances(emptied(rtmdet.images, which))
    check(
        losses(detector("RTMDet"), rtmdet_predictions(rtmdet)[:2], gt),
        case["rtmdet"][which],
        RTMDET,
    )
    found = losses(detector("YOLOX", *L1), yolox_predictions(yolox), gt)
    check(found, case["sim_ota_paper"][which], YOLOX)
    found = losses(detector("YOLOv5"), yolov5_predictions(yolov5.maps), gt)
    check_yolov5(found, case["yolov5"][which])
    if which == "second":  # the authors' code of YOLOv7 fails without any object
        found = losses(detector("YOLOv7", *OF_YOLOV5), yolov5_predictions(yolov5.maps), gt)
        check_yolov5(found, case["yolov7"][which])


# ---- Whole forwards


def image(seed: int, objects: int = 3, **kwargs: Any) -> dict[str, Any]:
    return image_dict(seed, 96, 64, objects=objects, **kwargs)


def forward(architecture: str, inputs: list[dict[str, Any]], *opts: Any) -> tuple[Any, Any, Any]:
    """Return the losses of a training forward, the head's output, and the detector."""
    model, heard = yolo(architecture, *opts).train(), []
    model.head.register_forward_hook(lambda *x: heard.append(x[2]))
    with EventStorage():
        found = model(inputs)
    return found, heard[0], model


def rows(maps: list[Tensor]) -> Any:
    """Return the (R, C) rows of one image in float64."""
    parts = [x[0].permute(1, 2, 0).flatten(0, 1) for x in maps]
    return torch.cat(parts).detach().double().numpy()


def cells(maps: list[Tensor]) -> tuple[Any, Any]:
    """Return the (R, 2) corners of the cells in pixels, and the (R,) strides."""
    corners = [(x * s, y * s) for m, s in zip(maps, STRIDES) for y, x in np.ndindex(*m.shape[2:])]
    strides = [s for m, s in zip(maps, STRIDES) for _ in range(m[0, 0].numel())]
    return np.array(corners, float), np.array(strides, float)


def truth(inputs: dict[str, Any]) -> tuple[Any, list[int]]:
    gt = inputs["instances"]
    return gt.gt_boxes.tensor.double().numpy(), gt.gt_classes.tolist()


def generalized(a: Any, b: Any) -> float:
    """Return the GIoU of two boxes of which neither is inverted."""
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    areas = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    union = areas / (1 + iou(a, b))
    return iou(a, b) - (hull - union) / hull


@for_each("seed", range(4))
def test_rtmdet_against_loops(seed: int) -> None:
    inputs = image(seed)
    found, output, _ = forward("RTMDet", [inputs])
    (logits, distances), (gt, labels) = map(rows, output), truth(inputs)
    points, strides = cells(output[0])
    boxes = np.concatenate([points, points], 1) + distances * strides[:, None] * [-1, -1, 1, 1]
    matched, quality = slow_soft_labels(logits, boxes, points, strides, gt, np.array(labels))
    total, classes, box = sum(quality), 0.0, 0.0
    for r, (j, q) in enumerate(zip(matched, quality)):
        for k, z in enumerate(logits[r]):
            t = q if j >= 0 and labels[j] == k else 0.0
            classes += entropy(sigmoid(z), t) * (t - sigmoid(z)) ** 2
        box += q * (1 - generalized(boxes[r], gt[j])) if j >= 0 else 0
    assert total > 0
    assert found["loss_cls"].item() == pytest.approx(classes / max(total, 1), rel=1e-4)
    assert found["loss_box_reg"].item() == pytest.approx(2 * box / max(total, 1), rel=1e-4)


@for_each("seed", range(4))
def test_yolox_against_loops(seed: int) -> None:
    inputs = image(seed)
    found, output, _ = forward("YOLOX", [inputs], *L1)
    (logits, deltas, objectness), (gt, labels) = map(rows, output), truth(inputs)
    corners, strides = cells(output[0])
    centres = corners + strides[:, None] / 2
    middles = centres + deltas[:, :2] * strides[:, None]
    sides = np.exp(deltas[:, 2:]) * strides[:, None]
    boxes = np.concatenate([middles - sides / 2, middles + sides / 2], 1)
    arrays = (boxes, centres, strides, gt, np.array(labels))
    matched, quality = slow_sim_ota(logits, objectness[:, 0], *arrays)
    sums = dict.fromkeys(("loss_cls", "loss_box_reg", "loss_obj", "loss_l1"), 0.0)
    for r, (j, q) in enumerate(zip(matched, quality)):
        sums["loss_obj"] += entropy(sigmoid(objectness[r, 0]), float(j >= 0))
        if j < 0:
            continue
        for k, z in enumerate(logits[r]):
            sums["loss_cls"] += entropy(sigmoid(z), q if labels[j] == k else 0.0)
        sums["loss_box_reg"] += 5 * (1 - iou(boxes[r], gt[j]) ** 2)
        x, y = (np.array(middle(gt[j])) - corners[r]) / strides[r]
        w, h = np.log((gt[j][2:] - gt[j][:2]) / strides[r])
        sums["loss_l1"] += np.abs(deltas[r] + [0.5, 0.5, 0, 0] - [x, y, w, h]).sum()
    number = max(sum(j >= 0 for j in matched), 1)
    assert found.keys() == sums.keys()
    for name, value in sums.items():
        assert found[name].item() == pytest.approx(value / number, rel=1e-4), name


def yolov5_maps(output: Any, number: int = 3) -> list[Tensor]:
    """Return the (N, A, H, W, 5 + K) maps of the output of the head."""
    logits, _, objectness, raw = output
    return [
        torch.cat([t.unflatten(1, (number, -1)), o[:, :, None], x.unflatten(1, (number, -1))], 2)
        .movedim(2, -1)
        .detach()
        .double()
        for x, o, t in zip(logits, objectness, raw)
    ]


@for_each("seed", range(4))
def test_yolov5_against_loops(seed: int) -> None:
    inputs = [image(seed), image(seed + 9, objects=2)]
    found, output, _ = forward("YOLOv5", inputs)
    maps = [x.numpy() for x in yolov5_maps(output)]
    gains = (0.05, 96 * 64 / 640**2, 0.5 * 3 / 80)
    expected = slow_yolov5_loss(
        maps, [truth(x) for x in inputs], np.array(ANCHORS), STRIDES, gains, (4, 1, 0.4)
    )
    for name, key in (("loss_box_reg", "box"), ("loss_obj", "obj"), ("loss_cls", "cls")):
        assert found[name].item() == pytest.approx(2 * expected[key], rel=1e-4), name


def test_yolov5_counts_the_images_of_all_processes() -> None:
    """DistributedDataParallel averages gradients; the authors sum them."""
    inputs = [image(0)]
    alone, _, _ = forward("YOLOv5", inputs)
    with patch("detectron2.utils.comm.get_world_size", return_value=2):
        both, _, _ = forward("YOLOv5", inputs)
    assert {k: 2 * v.item() for k, v in alone.items()} == {k: v.item() for k, v in both.items()}


@for_each("mean, divisor", [(0.25, 1.0), (8.0, 8.0)])
def test_rtmdet_bounds_the_mean_over_processes(mean: float, divisor: float) -> None:
    """The released code takes the mean first, so less than one object per process is one."""
    found = []
    for value in (1.0, mean):
        means = [patch(f"distill.nets.{x}.reduce_mean") for x in ("rtmdet", "rtmdet_ins")]
        with means[0] as first, means[1] as second:
            first.return_value = second.return_value = torch.tensor(value)
            found.append(forward("RTMDetIns", [image(0)])[0])
    for name, x in found[0].items():
        assert found[1][name].item() == pytest.approx(x.item() / divisor), name


def test_yolov5s_target_of_a_prediction() -> None:
    """The box with the largest CIoU wins."""
    anchors = torch.tensor([[[8.0, 8.0]]])
    prediction = torch.zeros(1, 1, 4, 4, 6)  # centre of the cell, side of the anchor
    exact = torch.tensor([[8.0, 8, 16, 16]])
    boxes, classes = torch.cat([exact + 1, exact, exact]), torch.zeros(3, dtype=torch.long)
    targets = [{"gt_boxes": boxes, "gt_classes": classes}]
    (found,) = yolov5_boxes([prediction], targets, anchors, [8])
    expected = torch.full((4, 4), -1)
    expected[1, 1] = 1  # the exact box, and of two equal ones the first
    expected[2, 1] = expected[1, 2] = 0  # only the shifted one is near them
    assert found[0, 0].tolist() == expected.tolist()
    targets = [{"gt_boxes": exact[:0], "gt_classes": torch.zeros(0, dtype=torch.long)}]
    (found,) = yolov5_boxes([prediction], targets, anchors, [8])
    assert found.eq(-1).all()


@pytest.mark.slow
@for_each("architecture", NETWORKS)
@for_each("objects", [(2, 0), (0, 0), (3, 1)])
def test_gradients_reach_all_parameters(architecture: str, objects: tuple[int, int]) -> None:
    inputs = [image(seed, objects=n) for seed, n in enumerate(objects)]
    found, _, model = forward(architecture, inputs, *(L1 if architecture == "YOLOX" else ()))
    assert all(x.isfinite() and x >= 0 and x.requires_grad for x in found.values())
    sum(found.values()).backward()
    for name, x in model.named_parameters():
        assert x.grad is not None and x.grad.isfinite().all(), name
    if not any(objects):
        zeros = {k for k, x in found.items() if x == 0}
        assert zeros >= {"loss_box_reg"} and zeros <= {
            "loss_box_reg",
            "loss_mask",
            "loss_cls",
            "loss_l1",
        }


@for_each("architecture", LOSSES)
def test_half_precision(architecture: str) -> None:
    """The losses are computed in float32, from the head's output in bfloat16."""
    model = yolo(architecture).train()
    found = []
    for enabled in (False, True):
        with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(model([image(0), image(1, objects=0)]))
    for name, x in found[0].items():
        assert found[1][name].dtype == torch.float32
        assert found[1][name].item() == pytest.approx(x.item(), rel=0.5, abs=0.1)
    sum(found[1].values()).backward()
    assert all(x.grad.isfinite().all() for x in model.parameters())


@for_each("architecture", LOSSES)
def test_no_waiting_for_the_device(architecture: str) -> None:
    inputs = [image(0), image(1, objects=0)]
    opts = L1 if architecture == "YOLOX" else ()
    _, output, model = forward(architecture, inputs, *opts)
    priors = model.anchor_generator(output[0])
    with EventStorage(), Recorder() as recorder:
        found = model.losses(priors, output, [x["instances"] for x in inputs])
        sum(found.values()).backward()
    assert not recorder.waits


def test_the_l1_loss_begins_late() -> None:
    model = yolo("YOLOX", "MODEL.YOLOX.L1_FROM_ITER", 7).train()
    for iteration, expected in ((6, False), (7, True), (8, True)):
        with EventStorage(iteration):
            assert ("loss_l1" in model([image(0)])) == expected


def test_polygons_are_masks() -> None:
    inputs = image(0)
    gt = inputs["instances"]
    polygons = []
    for x1, y1, x2, y2 in gt.gt_boxes.tensor.round().tolist():
        polygons.append([np.array([x1, y1, x2, y1, x2, y2, x1, y2])])
    gt.gt_masks = PolygonMasks(polygons)
    found, _, _ = forward("RTMDetIns", [inputs])
    gt.gt_masks = BitMasks.from_polygon_masks(gt.gt_masks, *gt.image_size)
    expected, _, _ = forward("RTMDetIns", [inputs])
    assert found["loss_mask"] > 0
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}


def test_objects_without_masks() -> None:
    inputs = image(0)
    inputs["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match=r"set MODEL\.MASK_ON to True"):
        forward("RTMDetIns", [inputs])


def test_levels_without_a_weight() -> None:
    with pytest.raises(
        ValueError, match=r"MODEL.YOLOV5.OBJ_BALANCE has 2 levels; the head reads 3"
    ):
        yolo("YOLOv5", "MODEL.YOLOV5.OBJ_BALANCE", [4.0, 1.0])

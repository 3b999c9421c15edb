"""Test YOLOv5: sizes, initialization, boxes by a literal reading, and detections by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor, nn

from distill.nets.config import NETS_KEYS
from tests.support.cases import for_each
from tests.support.yolo import CLASSES, Sizes, features, inference, sizes, yolo, yolo_cfg

ANCHORS = [  # pixels
    [(10, 13), (16, 30), (33, 23)],
    [(30, 61), (62, 45), (59, 119)],
    [(116, 90), (156, 198), (373, 326)],
]
STRIDES = (8, 16, 32)
COCO = {
    "nano": Sizes(1_872_157, 1_046_368, 710_784, 115_005, 2.234),
    "s": Sizes(7_235_389, 4_171_456, 2_834_688, 229_245, 8.217),
    "m": Sizes(21_190_557, 12_167_904, 8_679_168, 343_485, 24.436),
    "l": Sizes(46_563_709, 26_582_912, 19_523_072, 457_725, 54.497),
    "x": Sizes(86_749_405, 49_275_040, 36_902_400, 571_965, 102.724),
}
KITTI = {  # 3 classes
    "nano": (1_767_976, 2.068),
    "s": (7_027_720, 7.886),
    "m": (20_879_400, 23.939),
    "l": (46_149_064, 53.835),
    "x": (86_231_272, 101.896),
}


def check_sizes(size: str) -> None:
    found, expected = sizes("YOLOv5", size), COCO[size]
    assert found[:4] == expected[:4]
    assert found.gmac == pytest.approx(expected.gmac, rel=1e-3)
    total, gmac = KITTI[size]
    found = sizes("YOLOv5", size, classes=3)
    assert (found.total, found.gmac) == (total, pytest.approx(gmac, rel=1e-3))


def test_size_of_n() -> None:
    check_sizes("nano")


@pytest.mark.slow
@for_each("size", ["s", "m", "l", "x"])
def test_sizes(size: str) -> None:
    check_sizes(size)


def test_channels_are_multiples_of_8() -> None:
    model = yolo("YOLOv5", "MODEL.CSPDARKNET.WIDTH", 0.13)
    widths = {x.channels for x in model.backbone.output_shape().values()}
    assert widths == {40, 72, 136}


@for_each("classes", [80, 3, 1])
def test_initial_biases(classes: int) -> None:
    """PyTorch's random biases remain under the logits of objectness and classes."""
    torch.manual_seed(0)
    head = build_model(yolo_cfg("YOLOv5", classes=classes)).head
    for predictor, stride in zip(head.predictors, STRIDES):
        bias = predictor.bias.detach().view(3, 5 + classes).double()
        bias[:, 4] -= math.log(8 / (640 / stride) ** 2)
        bias[:, 5:] -= math.log(0.6 / (classes - 0.99999))
        bound = 1 / math.sqrt(predictor.in_channels)
        assert bias.abs().max() <= bound + 1e-5 and bias.std() > 0.3 * bound


def test_priors_are_anchors_in_the_middle_of_cells() -> None:
    model = yolo("YOLOv5")
    assert model.anchor_generator.offset == 0.5
    maps, _ = features(model, torch.zeros(1, 3, 32, 64))
    for priors, stride, anchors in zip(model.anchor_generator(maps), STRIDES, ANCHORS):
        rows = [
            [(x + 0.5) * stride - w / 2, (y + 0.5) * stride - h / 2, w, h]
            for y in range(32 // stride)
            for x in range(64 // stride)
            for w, h in anchors
        ]
        expected = torch.tensor(rows)
        expected[:, 2:] += expected[:, :2]
        assert torch.equal(priors.tensor, expected)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def test_boxes_and_scores_literally() -> None:
    """Check against the authors' form, anchor by anchor."""
    model = yolo("YOLOv5")
    raw: list[Any] = []
    for predictor in model.head.predictors:
        predictor.register_forward_hook(lambda *x: raw.append(x[2][0].double().numpy()))
    maps, predictions = features(model, torch.randn(1, 3, 64, 96))
    priors = torch.cat([x.tensor for x in model.anchor_generator(maps)])
    boxes = model.decoded(model.flat(predictions[1], 4)[0], priors).numpy()
    logits, objectness = (model.flat(predictions[k], n)[0] for k, n in ((0, CLASSES), (2, 1)))
    scores = model.scores(logits, objectness).numpy()
    kept = model.flat(predictions[3], 4)[0].numpy()
    row = 0
    for t, stride, anchors in zip(raw, STRIDES, ANCHORS):
        assert t.shape[0] == 3 * (5 + CLASSES)
        for y in range(t.shape[1]):
            for x in range(t.shape[2]):
                for a, (width, height) in enumerate(anchors):
                    own = t[a * (5 + CLASSES) : (a + 1) * (5 + CLASSES), y, x]
                    s = sigmoid(own)
                    cx, cy = (2 * s[0] - 0.5 + x) * stride, (2 * s[1] - 0.5 + y) * stride
                    w, h = (2 * s[2]) ** 2 * width, (2 * s[3]) ** 2 * height
                    box = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
                    np.testing.assert_allclose(boxes[row], box, rtol=1e-4, atol=1e-3)
                    np.testing.assert_allclose(scores[row], s[4] * s[5:], rtol=1e-4)
                    np.testing.assert_allclose(kept[row], own[:4], rtol=1e-5)
                    row += 1
    assert row == len(boxes)


def test_deltas_of_extreme_predictions() -> None:
    """A side is in [0, 4] anchors, and nothing is NaN or infinite."""
    head: Any = yolo("YOLOv5").head
    t = torch.tensor([-1e4, 1e4, 1e4, -1e4]).view(1, 1, 4, 1, 1).expand(1, 3, 4, 1, 1)
    t = t.clone().requires_grad_()
    deltas = head.deltas(t, 1)
    deltas.sum().backward()
    assert deltas.isfinite().all() and t.grad.isfinite().all()
    priors = torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in ANCHORS[1]])
    boxes = Box2BoxTransform((1.0, 1.0, 1.0, 1.0)).apply_deltas(deltas[0, :, :, 0, 0], priors)
    size = boxes[:, 2:] - boxes[:, :2]
    torch.testing.assert_close(size[:, 0], 4 * torch.tensor(ANCHORS[1])[:, 0].float())
    assert not size[:, 1].any()
    centres = (boxes[:, 2:] + boxes[:, :2]) / 2
    torch.testing.assert_close(centres, torch.tensor([[-16.0, 16.0]] * 3))


def scene() -> list[list[Tensor]]:
    """Maps of a 64 x 64 image with some boxes of the first anchor of 30 x 61 pixels."""
    sides = (8, 4, 2)
    maps = [[torch.full((1, 3 * n, s, s), -20.0) for s in sides] for n in (CLASSES, 4, 1)]
    for y, x, logits in (
        (1, 1, [2.0, 1.0, -9.0]),
        (1, 2, [3.0, -9.0, -9.0]),  # half of the box before
        (2, 1, [1.5, -9.0, -9.0]),  # IoU 0.58 with the first
    ):
        maps[0][1][0, :CLASSES, y, x] = torch.tensor(logits)
        maps[1][1][0, :4, y, x] = 0.0
        maps[2][1][0, 0, y, x] = 20.0
    return maps


@for_each(
    "threshold, most, expected",
    [
        (0.6, 100, [(0, 3.0), (0, 2.0), (0, 1.5), (1, 1.0)]),
        (0.55, 100, [(0, 3.0), (0, 2.0), (1, 1.0)]),
        (0.6, 2, [(0, 3.0), (0, 2.0)]),
    ],
)
def test_detections(threshold: float, most: int, expected: list[tuple[int, float]]) -> None:
    opts = ("MODEL.YOLOV5.NMS_THRESH_TEST", threshold, "TEST.DETECTIONS_PER_IMAGE", most)
    found = inference(yolo("YOLOv5", *opts), scene(), 64, 64)
    assert found.pred_classes.tolist() == [k for k, _ in expected]
    scores = [float(sigmoid(logit)) for _, logit in expected]
    np.testing.assert_allclose(found.scores.numpy(), scores, rtol=1e-5)
    np.testing.assert_allclose(found.pred_boxes.tensor[0].numpy(), [25, -6.5, 55, 54.5])


def test_other_anchors() -> None:
    with pytest.raises(ValueError, match=r"ANCHORS has 2 levels; the head reads 3: p3, p4, p5"):
        build_model(yolo_cfg("YOLOv5", "MODEL.YOLOV5.ANCHORS", [[[1, 2]], [[3, 4]]]))
    model = yolo("YOLOv5", "MODEL.YOLOV5.ANCHORS", [[[4, 8]], [[12, 16]], [[50.5, 60]]])
    assert [x.out_channels for x in model.head.predictors] == [5 + CLASSES] * 3
    assert list(model.anchor_generator.cell_anchors)[2].tolist() == [[-25.25, -30, 25.25, 30]]
    rule = NETS_KEYS["MODEL.YOLOV5.ANCHORS"].rule
    assert not any(map(rule.allows, ([], [[[1, 2]], [[1, 2], [3, 4]]], [[[1]]], [[[0, 1]]], 3)))


def test_default_thresholds() -> None:
    model = yolo("YOLOv5")
    assert model.multi_label and model.pad_value == 114
    found = (model.test_score_thresh, model.test_topk_candidates, model.test_nms_thresh)
    assert found == (0.001, 30000, 0.6)
    assert not any(isinstance(x, nn.BatchNorm2d) for x in model.head.modules())

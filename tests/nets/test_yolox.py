"""Test YOLOX: sizes, initialization, boxes by a literal reading, and detections by hand."""

import math

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from tests.support.cases import for_each
from tests.support.yolo import CLASSES, Sizes, features, inference, sizes, yolo, yolo_cfg

DEPTHWISE = ("MODEL.CSPDARKNET.DEPTHWISE", True, "MODEL.YOLOX.DEPTHWISE", True)
SMALL = [
    ("nano", Sizes(912_159, 459_968, 347_424, 104_767, 0.523), 416),
    ("tiny", Sizes(5_055_855, 2_372_304, 1_596_096, 1_087_455, 3.206), 416),
]
LARGE = [
    ("nano", Sizes(912_159, 459_968, 347_424, 104_767, 1.237), 640),
    ("tiny", Sizes(5_055_855, 2_372_304, 1_596_096, 1_087_455, 7.589), 640),
    ("s", Sizes(8_968_255, 4_212_672, 2_834_688, 1_920_895, 13.343), 640),
    ("m", Sizes(25_326_495, 12_352_992, 8_679_168, 4_294_335, 36.765), 640),
    ("l", Sizes(54_208_895, 27_075_968, 19_523_072, 7_609_855, 77.646), 640),
    ("x", Sizes(99_071_455, 50_301_600, 36_902_400, 11_867_455, 140.705), 640),
]


def check_sizes(size: str, expected: Sizes, side: int) -> None:
    found = sizes("YOLOX", size, *(DEPTHWISE if size == "nano" else ()), side=side)
    assert found[:4] == expected[:4]
    assert found.gmac == pytest.approx(expected.gmac, rel=1e-3)


@for_each("size, expected, side", SMALL[:1])
def test_size_of_nano(size: str, expected: Sizes, side: int) -> None:
    check_sizes(size, expected, side)


@pytest.mark.slow
@for_each("size, expected, side", SMALL[1:] + LARGE)
def test_sizes(size: str, expected: Sizes, side: int) -> None:
    check_sizes(size, expected, side)


def test_depthwise_convolutions() -> None:
    """All 3x3 convolutions are separable but those of the stem."""
    model = yolo("YOLOX", *DEPTHWISE)
    large = [
        k for k, x in model.named_modules() if isinstance(x, nn.Conv2d) and x.kernel_size[0] > 1
    ]
    dense = [k for k in large if model.get_submodule(k).groups == 1]
    assert dense == ["backbone.bottom_up.graph.c1.conv.conv"] and len(large) > 20


def test_initial_probabilities() -> None:
    head = build_model(yolo_cfg("YOLOX")).head
    for predictor in (*head.cls_score, *head.objectness):
        torch.testing.assert_close(predictor.bias.sigmoid(), torch.full_like(predictor.bias, 0.01))
    assert all(x.bias.abs().max() < 0.5 for x in head.bbox_pred)


def test_boxes_and_scores_literally() -> None:
    """Check against the authors' form: cells' corners, logarithms of sizes in strides."""
    model = yolo("YOLOX")
    raw: list[np.ndarray] = []
    for predictor in model.head.bbox_pred:
        predictor.register_forward_hook(lambda *x: raw.append(x[2][0].double().numpy()))
    maps, predictions = features(model, torch.randn(1, 3, 64, 96))
    priors = torch.cat([x.tensor for x in model.anchor_generator(maps)])
    boxes = model.decoded(model.flat(predictions[1], 4)[0], priors)
    rows = []
    for t, stride in zip(raw, (8, 16, 32)):
        for y in range(t.shape[1]):
            for x in range(t.shape[2]):
                cx, cy = (t[0, y, x] + x) * stride, (t[1, y, x] + y) * stride
                w, h = np.exp(t[2:, y, x]) * stride
                rows.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    np.testing.assert_allclose(boxes.numpy(), rows, rtol=1e-4, atol=1e-3)
    logits, objectness = (model.flat(predictions[k], n)[0] for k, n in ((0, CLASSES), (2, 1)))
    expected = 1 / (1 + np.exp(-logits.numpy())) / (1 + np.exp(-objectness.numpy()))
    np.testing.assert_allclose(model.scores(logits, objectness).numpy(), expected, rtol=1e-5)


def test_large_boxes_are_not_cut() -> None:
    model = yolo("YOLOX")
    prior, delta = torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([[0.0, 0.0, 7.0, 200.0]])
    box = model.decoded(delta, prior)[0]
    assert float(box[2] - box[0]) == pytest.approx(8 * math.exp(7), rel=1e-4)
    assert float(box[3] - box[1]) == pytest.approx(8 * 1e4, rel=1e-3)


Box = tuple[int, int, int, list[float], float, float]


def predictions_of(boxes: list[Box]) -> list[list[Tensor]]:
    """Maps of a 64 x 64 image; each box is level, y, x, class logits, objectness logit, size."""
    sides = (8, 4, 2)
    maps = [[torch.full((1, n, s, s), -20.0) for s in sides] for n in (CLASSES, 4, 1)]
    for level, y, x, logits, objectness, size in boxes:
        maps[0][level][0, :, y, x] = torch.tensor(logits)
        stride = 8 * 2**level
        maps[1][level][0, :, y, x] = torch.tensor([0.0, 0.0, *[math.log(size / stride)] * 2])
        maps[2][level][0, 0, y, x] = objectness
    return maps


SCENE = [
    (0, 2, 2, [3.0, 2.0, -9.0], 4.0, 16.0),  # centre (20, 20)
    (0, 2, 3, [2.0, -9.0, -9.0], 4.0, 16.0),  # centre (28, 20): IoU 1/3 with the first
    (1, 1, 1, [1.0, -9.0, -9.0], 4.0, 18.0),  # centre (24, 24)
    (2, 0, 0, [2.5, -9.0, -9.0], 4.0, 17.0),  # centre (16, 16)
    (0, 6, 6, [-9.0, -9.0, 3.0], -9.0, 16.0),  # score 1e-4: below the threshold
]


@for_each(
    "multi_label, threshold, expected",
    [
        (False, 0.65, [(0, 3.0), (0, 2.5), (0, 2.0), (0, 1.0)]),
        (True, 0.65, [(0, 3.0), (0, 2.5), (1, 2.0), (0, 2.0), (0, 1.0)]),
        (False, 0.35, [(0, 3.0), (0, 2.0)]),
        (True, 0.35, [(0, 3.0), (1, 2.0), (0, 2.0)]),
    ],
)
def test_detections(multi_label: bool, threshold: float, expected: list[tuple[int, float]]) -> None:
    """NMS works per class, and only the best class of a prior counts without multiple labels."""
    opts = ("MODEL.YOLOX.MULTI_LABEL_TEST", multi_label, "MODEL.YOLOX.NMS_THRESH_TEST", threshold)
    found = inference(yolo("YOLOX", *opts), predictions_of(SCENE), 64, 64)
    sure = 1 / (1 + math.exp(-4))
    scores = [sure / (1 + math.exp(-logit)) for _, logit in expected]
    assert sorted(found.pred_classes.tolist()) == sorted(k for k, _ in expected)
    np.testing.assert_allclose(found.scores.numpy(), scores, rtol=1e-5)
    np.testing.assert_allclose(found.pred_boxes.tensor[0].numpy(), [12, 12, 28, 28], atol=1e-4)


def test_default_thresholds() -> None:
    model = yolo("YOLOX")
    assert not model.multi_label and model.pad_value == 114
    found = (model.test_score_thresh, model.test_topk_candidates, model.test_nms_thresh)
    assert found == (0.001, 30000, 0.65)

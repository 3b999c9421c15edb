"""Test RTMDet and RTMDet-Ins: sizes, initialization, boxes, masks and detections."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torch import Tensor, nn

from distill.nets.assign import dynamic_masks
from distill.nets.cspnext import CSPNEXT
from distill.nets.rtmdet import DistanceTransform
from distill.nets.rtmdet_ins import ImageMasks, RTMDetInsHead
from tests.support.cases import for_each
from tests.support.yolo import CLASSES, Sizes, features, inference, sizes, yolo, yolo_cfg

STRIDES = (8, 16, 32)
RTMDET = {
    "rtmdet tiny": Sizes(4_896_168, 2_348_700, 2_188_944, 358_524, 8.036),
    "s": Sizes(8_886_924, 4_378_320, 3_883_200, 625_404, 14.761),
    "m": Sizes(24_709_188, 12_279_432, 11_049_408, 1_380_348, 39.066),
    "l": Sizes(52_315_804, 26_138_912, 23_746_688, 2_430_204, 79.899),
    "x": Sizes(94_855_572, 47_569_560, 43_511_040, 3_774_972, 141.190),
}
INS = {  # total, head, multiply-adds, channels of the neck
    "rtmdet tiny": (5_638_187, 1_100_543, 11.871, 96),
    "s": (10_183_311, 1_921_791, 21.516, 128),
    "m": (27_575_111, 4_246_271, 54.124, 192),
    "l": (57_365_663, 7_480_063, 106.542, 256),
    "x": (102_703_767, 11_623_167, 182.702, 320),
}
SEPARATE = ("MODEL.RTMDETINS.SHARED_BOX_BRANCH", False)


# ---- Sizes


def check_sizes(size: str) -> None:
    found, expected = sizes("RTMDet", size), RTMDET[size]
    assert found[:4] == expected[:4]
    assert found.gmac == pytest.approx(expected.gmac, rel=1e-3)


def check_sizes_with_masks(size: str) -> None:
    """The authors' code computes the shared branch twice, so its cost is that of two."""
    total, head, gmac, channels = INS[size]
    shared, separate = sizes("RTMDetIns", size), sizes("RTMDetIns", size, *SEPARATE)
    assert shared[:4] == (total, *RTMDET[size][1:3], head)
    assert separate.head == head + 2 * 9 * channels**2 + 12 * channels
    assert separate.gmac == pytest.approx(gmac, rel=1e-3)
    branch = 2 * 9 * channels**2 * (80**2 + 40**2 + 20**2) / 1e9
    assert shared.gmac == pytest.approx(gmac - branch, rel=1e-3)


def test_size_of_tiny() -> None:
    check_sizes("rtmdet tiny")


@pytest.mark.slow
@for_each("size", ["s", "m", "l", "x"])
def test_sizes(size: str) -> None:
    check_sizes(size)


@pytest.mark.slow
@for_each("size", INS)
def test_sizes_with_masks(size: str) -> None:
    check_sizes_with_masks(size)


# ---- Heads


@for_each("architecture", ["RTMDet", "RTMDetIns"])
def test_initialization(architecture: str) -> None:
    torch.manual_seed(0)
    head: Any = build_model(yolo_cfg(architecture)).head
    biases = {"cls_score": -math.log(99), "bbox_pred": float(architecture == "RTMDetIns")}
    for name, layer in head.named_modules():
        if isinstance(layer, nn.Conv2d):
            assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.25)
            expected = biases.get(name.split(".")[0], 0.0)
            assert layer.bias is None or (layer.bias - expected).abs().max() < 1e-5
        elif isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all() and not layer.bias.any()


@for_each("exp", [True, False])
def test_levels_share_convolutions_but_not_norms(exp: bool) -> None:
    head: Any = yolo("RTMDet", "MODEL.RTMDET.EXP_ON_REG", exp).head
    assert len(head.cls_tower.convs) == 2 and len(head.cls_tower.norms) == 3
    maps = [torch.randn(2, 32, s, s) for s in (8, 4, 2)]
    logits, distances = head(maps)
    for level, x in enumerate(maps):
        for tower, predictors, found in (
            (head.cls_tower, head.cls_score, logits),
            (head.reg_tower, head.bbox_pred, distances),
        ):
            y = x
            for k in range(2):
                norm = tower.norms[level][k]
                y = F.conv2d(y, tower.convs[k].weight, padding=1)
                args = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
                y = F.silu(F.batch_norm(y, *args, eps=1e-5))
            y = F.conv2d(y, predictors[level].weight, predictors[level].bias)
            y = y.exp() if exp and found is distances else y
            torch.testing.assert_close(found[level], y, rtol=1e-4, atol=1e-4)
    assert exp or min(x.min() for x in distances) < 0


def test_the_box_branch_of_rtmdet_ins() -> None:
    """It is the class branch in the released models; distances are never negative."""
    maps = [torch.randn(1, 32, s, s) for s in (8, 4, 2)]
    for shared in (True, False):
        opts = () if shared else SEPARATE
        head: Any = yolo("RTMDetIns", *opts).head
        assert (head.reg_tower is None) == shared
        logits, distances, kernels, (prototypes,) = head(maps)
        tower = head.cls_tower if shared else head.reg_tower
        expected = head.bbox_pred[1](tower(maps[1], 1)).relu()
        assert torch.equal(distances[1], expected) and expected.max() > 0
        assert [x.shape[1:] for x in kernels] == [(169, s, s) for s in (8, 4, 2)]
        assert [x.shape[1:] for x in logits] == [(CLASSES, s, s) for s in (8, 4, 2)]
        assert prototypes.shape == (1, 8, 8, 8)


def test_levels_of_different_channels() -> None:
    cfg = yolo_cfg("RTMDet")
    cfg.MODEL.BACKBONE.NAME = "build_yolox_pafpn_backbone"
    cfg.MODEL.CSPDARKNET.WIDTH = 0.125
    with pytest.raises(ValueError, match=r"equal channels; .* have \[32, 64, 128\]"):
        build_model(cfg)


# ---- Boxes


@for_each("exp", [True, False])
def test_boxes_literally(exp: bool) -> None:
    """Check against distances from the cells' top left corners."""
    model = yolo("RTMDet", "MODEL.RTMDET.EXP_ON_REG", exp)
    raw: list[Any] = []
    for predictor in model.head.bbox_pred:
        predictor.register_forward_hook(lambda *x: raw.append(x[2][0].double().numpy()))
    maps, predictions = features(model, torch.randn(1, 3, 64, 96))
    priors = torch.cat([x.tensor for x in model.anchor_generator(maps)])
    boxes = model.decoded(model.flat(predictions[1], 4)[0], priors)
    rows = []
    for t, stride in zip(raw, STRIDES):
        for y in range(t.shape[1]):
            for x in range(t.shape[2]):
                left, top, right, bottom = (np.exp(t[:, y, x]) if exp else t[:, y, x]) * stride
                px, py = x * stride, y * stride
                rows.append([px - left, py - top, px + right, py + bottom])
    np.testing.assert_allclose(boxes.numpy(), rows, rtol=1e-4, atol=1e-3)


def test_the_transform_inverts_itself() -> None:
    transform = DistanceTransform()
    priors = torch.tensor([[-4.0, -4.0, 4.0, 4.0], [8.0, 0.0, 24.0, 16.0]])
    boxes = torch.tensor([[-8.0, 2.0, 16.0, 4.0], [20.0, 8.0, 12.0, 40.0]])
    deltas = transform.get_deltas(priors, boxes)
    assert deltas.tolist() == [[1.0, -0.25, 2.0, 0.5], [-0.25, 0.0, -0.25, 2.0]]
    assert torch.equal(transform.apply_deltas(deltas, priors), boxes)


def scene() -> list[list[Tensor]]:
    """Maps of a 64 x 64 image with some boxes around points of stride 8."""
    maps = [[torch.full((1, n, s, s), -20.0) for s in (8, 4, 2)] for n in (CLASSES, 4)]
    for y, x, logits, sides in (
        (3, 3, [2.0, 1.0, -9.0], [1.0, 1.0, 1.0, 1.0]),  # 16 .. 32
        (3, 4, [3.0, -9.0, -9.0], [2.0, 1.0, 0.5, 1.0]),  # 16 .. 36 x 16 .. 32: IoU 0.8
        (3, 5, [-9.0, -9.0, 4.0], [1.0, 1.0, -1.5, 1.0]),  # its right side is left of the left one
        (7, 7, [1.5, -9.0, -9.0], [1.0, 1.0, 9.0, 9.0]),  # beyond the image: 48 .. 60
    ):
        maps[0][0][0, :, y, x] = torch.tensor(logits)
        maps[1][0][0, :, y, x] = torch.tensor(sides)
    return maps


@for_each(
    "threshold, expected",
    [(0.85, [(0, 3.0), (0, 2.0), (0, 1.5), (1, 1.0)]), (0.65, [(0, 3.0), (0, 1.5), (1, 1.0)])],
)
def test_detections(threshold: float, expected: list[tuple[int, float]]) -> None:
    """Boxes are clipped before NMS, and those without area are left out."""
    model = yolo("RTMDet", "MODEL.RTMDET.NMS_THRESH_TEST", threshold)
    found = inference(model, scene(), 60, 64)
    assert found.pred_classes.tolist() == [k for k, _ in expected]
    scores = [1 / (1 + math.exp(-logit)) for _, logit in expected]
    np.testing.assert_allclose(found.scores.numpy(), scores, rtol=1e-5)
    boxes = found.pred_boxes.tensor.tolist()
    assert boxes[0] == [16, 16, 36, 32] and boxes[-2] == [48, 48, 64, 60]


def test_default_thresholds() -> None:
    for architecture, expected in (
        ("RTMDet", (0.001, 30000, 0.65)),
        ("RTMDetIns", (0.05, 1000, 0.6)),
    ):
        model = yolo(architecture)
        assert model.multi_label and model.pad_value == 114
        found = (model.test_score_thresh, model.test_topk_candidates, model.test_nms_thresh)
        assert found == expected


# ---- Masks


def literal_mask(prototypes: Any, kernel: Any, point: Any, stride: float) -> Any:
    """Return the mask logits of one object, cell by cell."""
    w0, w1, w2 = kernel[:80].reshape(8, 10), kernel[80:144].reshape(8, 8), kernel[144:152]
    b0, b1, b2 = kernel[152:160], kernel[160:168], kernel[168]
    logits = np.empty(prototypes.shape[1:])
    for y, x in np.ndindex(*logits.shape):
        relative = [(point[0] - 8 * x) / (8 * stride), (point[1] - 8 * y) / (8 * stride)]
        hidden = np.maximum(w0 @ [*relative, *prototypes[:, y, x]] + b0, 0)
        logits[y, x] = w2 @ np.maximum(w1 @ hidden + b1, 0) + b2
    return logits


def test_masks_literally() -> None:
    torch.manual_seed(0)
    prototypes, kernels = torch.randn(8, 5, 7), torch.randn(3, 169)
    points = torch.tensor([[8.0, 0.0], [16.0, 32.0], [32.0, 0.0]])
    strides = torch.tensor(STRIDES)
    found = dynamic_masks(kernels, points, strides, prototypes)
    for mask, kernel, point, stride in zip(found, kernels, points, strides.tolist()):
        expected = literal_mask(prototypes.numpy(), kernel.numpy(), point.numpy(), stride)
        np.testing.assert_allclose(mask.numpy(), expected, rtol=1e-4, atol=1e-4)
    assert dynamic_masks(kernels[:0], points[:0], strides[:0], prototypes).shape == (0, 5, 7)


def test_prototypes_read_all_levels() -> None:
    shapes = [ShapeSpec(channels=4, stride=s) for s in STRIDES]
    style = CSPNEXT.style("BN")
    head = RTMDetInsHead(input_shape=shapes, num_classes=2, num_convs=1, style=style).eval()
    maps = [torch.randn(1, 4, s, s) for s in (8, 4, 2)]
    resized = [F.interpolate(x, (8, 8), mode="bilinear", align_corners=False) for x in maps]
    mask_convs: Any = head.mask_tower
    assert len(mask_convs) == 4
    expected = head.prototypes(mask_convs(head.fuse(torch.cat(resized, 1))))
    torch.testing.assert_close(head(maps)[3][0], expected)


def test_detections_have_the_masks_of_their_priors() -> None:
    """Kernel and point are those of the detection's own cell and level."""
    torch.manual_seed(0)
    model = yolo("RTMDetIns")
    maps, predictions = features(model, torch.randn(2, 3, 64, 64))
    for logits in predictions[0]:
        logits.fill_(-20.0)
    cells = [(0, 0, 2, 5), (0, 2, 1, 0), (0, 1, 3, 2)]  # image, level, y, x by score
    for k, (image, level, y, x) in enumerate(cells):
        predictions[0][level][image, k % CLASSES, y, x] = 3.0 - k
        predictions[1][level][image, :, y, x] = 1.0
    images = model.preprocess_image([{"image": torch.zeros(3, 64, 64)}] * 2)
    found, empty = model.forward_inference(images, maps, predictions)
    assert len(found) == 3 and len(empty) == 0
    assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes", "pred_masks"}
    for mask, (_, level, y, x) in zip(found.pred_masks.tensor, cells):
        stride = STRIDES[level]
        kernel = predictions[2][level][0, :, y, x].numpy()
        point = (x * stride, y * stride)
        expected = literal_mask(predictions[3][0][0].numpy(), kernel, point, stride)
        np.testing.assert_allclose(mask.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_masks_of_the_output() -> None:
    """Logits are enlarged to pixels, cut to the image, and then resized."""
    logits = torch.randn(2, 4, 8)
    masks = ImageMasks(logits, (30, 50), 8)[torch.tensor([False, True])]
    boxes = Boxes(torch.zeros(1, 4))
    pixels = F.interpolate(logits[1:, None], (32, 64), mode="bilinear", align_corners=False)
    same = masks.to_bitmasks(boxes, 30, 50).tensor
    assert torch.equal(same, pixels[:, 0, :30, :50] > 0)
    large = F.interpolate(pixels[..., :30, :50], (60, 90), mode="bilinear", align_corners=False)
    assert torch.equal(masks.to_bitmasks(boxes, 60, 90).tensor, large[:, 0].sigmoid() > 0.5)
    assert len(masks.to(torch.device("cpu"))) == 1
    assert masks[:0].to_bitmasks(boxes, 5, 6).tensor.shape == (0, 5, 6)

"""Test YOLOv3, YOLOv4 and YOLOv7: sizes, activations, fused convolutions and initial values.

The conversion of the authors' weights compares their outputs with literal forwards.
"""

import math
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from distill.engine import Trainer
from distill.export.graphs import exportable
from distill.nets.blocks import ConvStyle, RepConv
from distill.nets.config import NETS_KEYS
from distill.nets.yolov7 import ImplicitConv
from tests.support.cases import for_each
from tests.support.networks import tiny_cfg, tiny_model
from tests.support.yolo import Sizes, features, on_meta, parameters, sizes, yolo, yolo_cfg

COCO = {  # backbone -> sizes with 80 classes, then parameters with the 3 classes of KITTI
    "yolov3_fpn": (Sizes(61_949_149, 40_584_928, 20_906_496, 457_725, 77.946), 61_534_504),
    "yolov3_spp_fpn": (Sizes(62_998_749, 40_584_928, 21_956_096, 457_725, 78.365), 62_584_104),
    "yolov4_pafpn": (Sizes(64_363_101, 26_617_184, 37_288_192, 457_725, 71.130), 63_948_456),
    "yolov4_csp_pafpn": (Sizes(52_924_765, 26_596_192, 25_870_848, 457_725, 60.120), 52_510_120),
    "yolov7_pafpn": (Sizes(37_622_682, 13_371_808, 23_790_592, 460_282, 52.885), 37_207_344),
    "yolov7_tiny_pafpn": (Sizes(6_228_762, 2_464_416, 3_533_440, 230_906, 6.850), 6_020_400),
}
CASES = [
    pytest.param(name, marks=() if name == "yolov7_tiny_pafpn" else pytest.mark.slow)
    for name in COCO
]
VERSIONS = ("YOLOv3", "YOLOv4", "YOLOv7")


def chosen(backbone: str) -> tuple[str, str, str]:
    """Return the architecture of a backbone, and the override that chooses it."""
    return f"YOLOv{backbone[5]}", "MODEL.BACKBONE.NAME", f"build_{backbone}_backbone"


@pytest.mark.parametrize("backbone", CASES)
def test_sizes(backbone: str) -> None:
    """Multiply-adds with 3 classes have 77 fewer channels per anchor, which others test."""
    architecture, *opts = chosen(backbone)
    found, (expected, of_kitti) = sizes(architecture, "l", *opts), COCO[backbone]
    assert found[:4] == expected[:4]
    assert found.gmac == pytest.approx(expected.gmac, rel=1e-3)
    cfg = yolo_cfg(architecture, *opts, depth_width=(1.0, 1.0), classes=3)
    assert parameters(on_meta(cfg)) == of_kitti


@for_each(
    "backbone, bottom_up, neck",
    [
        ("yolov3_fpn", nn.SiLU, nn.SiLU),
        ("yolov4_pafpn", nn.Mish, nn.LeakyReLU),
        ("yolov4_csp_pafpn", nn.Mish, nn.Mish),
        ("yolov7_pafpn", nn.SiLU, nn.SiLU),
        ("yolov7_tiny_pafpn", nn.LeakyReLU, nn.LeakyReLU),
    ],
)
def test_activations(backbone: str, bottom_up: type[nn.Module], neck: type[nn.Module]) -> None:
    model = on_meta(yolo_cfg(*chosen(backbone)))
    for part, expected in ((model.backbone.bottom_up, bottom_up), (model.backbone.graph, neck)):
        kinds = {type(x) for x in part.modules() if isinstance(x, nn.SiLU | nn.Mish | nn.LeakyReLU)}
        assert kinds == {expected}
        slopes = {x.negative_slope for x in part.modules() if isinstance(x, nn.LeakyReLU)}
        assert slopes <= {0.1}


@for_each("architecture", VERSIONS)
def test_depthwise_and_other_widths(architecture: str) -> None:
    """The keys of the other backbones work for these, too."""
    plain = parameters(on_meta(yolo_cfg(architecture, depth_width=(0.33, 0.13))))
    cfg = yolo_cfg(architecture, "MODEL.CSPDARKNET.DEPTHWISE", True, depth_width=(0.33, 0.13))
    model = on_meta(cfg)
    assert parameters(model) < plain
    shapes = model.backbone.output_shape()
    assert [shapes[f"p{k}"].channels for k in (3, 4, 5)] == [40, 72, 136]


# ---- Fused convolutions


def trained(module: Any) -> Any:
    """Give norms the values of a training, and return the module for inference."""
    for x in module.modules():
        if isinstance(x, nn.BatchNorm2d):
            for value in (x.weight, x.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
            for value in (x.bias, x.running_mean):
                nn.init.normal_(value, std=0.3)
    return module.eval()


@for_each("norm", ["BN", "FrozenBN", ""])
@torch.no_grad()
def test_a_fused_rep_conv(norm: str) -> None:
    torch.manual_seed(0)
    layer = trained(RepConv(5, 8, ConvStyle(norm)))
    fused, x = layer.fused(), torch.randn(2, 5, 7, 6)
    assert [type(x) for x in fused] == [nn.Conv2d, nn.SiLU] and fused[0].weight.shape[2:] == (3, 3)
    torch.testing.assert_close(fused(x), layer(x), rtol=1e-5, atol=1e-5)


def test_norms_without_statistics_are_not_fused() -> None:
    layer = RepConv(5, 32, ConvStyle("GN"))
    assert layer.fused() is layer


@torch.no_grad()
def test_a_fused_implicit_convolution() -> None:
    torch.manual_seed(0)
    layer: Any = ImplicitConv(5, 8)
    nn.init.normal_(layer.added)
    nn.init.normal_(layer.factor)
    x = torch.randn(2, 5, 3, 4)
    expected = nn.functional.conv2d(x + layer.added, layer.weight, layer.bias) * layer.factor
    torch.testing.assert_close(layer(x), expected)
    fused = layer.fused()
    assert type(fused) is nn.Conv2d
    torch.testing.assert_close(fused(x), expected)


@torch.no_grad()
def test_an_export_has_one_convolution_for_each() -> None:
    model = trained(yolo("YOLOv7"))
    copy, pixels = exportable(model), torch.randn(1, 3, 64, 96)
    kinds = {type(x) for x in copy.modules()}
    assert not kinds & {RepConv, ImplicitConv}
    assert sum(isinstance(x, RepConv) for x in model.modules()) == 3
    for own, fused in zip(features(model, pixels)[1], features(copy, pixels)[1]):
        for a, b in zip(own, fused):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_fused_size_of_yolov7() -> None:
    """A norm after a convolution becomes its bias, as in the authors' count.

    They count 2 557 implicit parameters that their fused model does not use.
    """
    model = on_meta(yolo_cfg("YOLOv7", depth_width=(1.0, 1.0), classes=80))
    convs = [x for x in exportable(model).modules() if isinstance(x, nn.Conv2d)]
    assert sum(x.weight.numel() + x.out_channels for x in convs) == 36_907_898 - 2_557


# ---- Initial values, keys and groups of parameters


@for_each("classes", [80, 1])
def test_initial_values_of_yolov7(classes: int) -> None:
    torch.manual_seed(0)
    head = build_model(yolo_cfg("YOLOv7", classes=classes)).head
    for predictor, stride in zip(head.predictors, (8, 16, 32)):
        bias = predictor.bias.detach().view(3, 5 + classes).double()
        bias[:, 4] -= math.log(8 / (640 / stride) ** 2)
        bias[:, 5:] -= math.log(0.6 / (classes - 0.99))
        assert bias.abs().max() <= 1 / math.sqrt(predictor.in_channels) + 1e-5
    added = torch.cat([x.added.flatten() for x in head.predictors])
    factor = torch.cat([x.factor.flatten() for x in head.predictors])
    for values, mean in ((added, 0.0), (factor, 1.0)):
        error = 5 * 0.02 / math.sqrt(len(values))
        assert abs(values.mean() - mean) < error
        assert values.std().item() == pytest.approx(0.02, rel=0.5)


@for_each(
    "version, first, factors",
    [
        (3, [10, 13], (1.0, 0.5, 0.6)),
        (4, [12, 16], (1.0, 0.5, 0.6)),
        (7, [12, 16], (0.7, 0.3, 0.65)),
    ],
)
def test_defaults(version: int, first: list[int], factors: tuple[float, ...]) -> None:
    keys = {k: NETS_KEYS[f"MODEL.YOLOV{version}.{k}"].default for k in ("ANCHORS", *FACTORS)}
    assert keys["ANCHORS"][0][0] == first
    assert tuple(keys[k] for k in FACTORS) == factors


FACTORS = ("OBJ_LOSS_WEIGHT", "CLS_LOSS_WEIGHT", "NMS_THRESH_TEST")


def test_levels_without_anchors() -> None:
    with pytest.raises(ValueError, match=r"MODEL.YOLOV7.ANCHORS has 1 levels; the head reads 3"):
        build_model(yolo_cfg("YOLOv7", "MODEL.YOLOV7.ANCHORS", [[[1, 2]]]))


@for_each("factor", [-1.0, 10.0])
def test_implicit_parameters_decay_as_norms(factor: float) -> None:
    """They have the learning rate of weights, also where biases warm up on their own."""
    cfg = tiny_cfg("yolov7", "SOLVER.WEIGHT_DECAY", 0.05, "SOLVER.WARMUP_BIAS_FACTOR", factor)
    model: Any = tiny_model("yolov7")
    groups = Trainer.build_optimizer(cfg, model).param_groups
    found = {id(x): group for group in groups for x in group["params"]}
    assert len(found) == len(list(model.parameters())) == sum(len(x["params"]) for x in groups)
    for predictor in model.head.predictors:
        own = [found[id(x)] for x in (predictor.added, predictor.factor, predictor.weight)]
        assert [x["weight_decay"] for x in own] == [0, 0, 0.05]
        assert not any("extra_lr" in x for x in own)

"""Test the backbones, inputs and configs that RTMDet and YOLO share."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from torch import nn

from distill.config import get_distill_cfg, student_config
from distill.families import build_family
from distill.families.dense import decode_dense
from distill.heads import MSSD, FitNet
from distill.nets import add_nets_config
from distill.nets.blocks import (
    SPPF,
    ConvStyle,
    Focus,
    bottleneck,
    conv,
    csp,
    large_kernel,
    upsample,
)
from distill.nets.graph import Graph, Layer, Scaling
from tests.support.cases import for_each
from tests.support.networks import image_dict, network_info, tiny_model
from tests.support.yolo import CLASSES, NETWORKS, features, on_meta, parameters, yolo, yolo_cfg

_PAN, _INNER = ({f"{x}{k}": f"c{k}" for k in (3, 4, 5)} for x in "po")
_LATERAL = {"o3": "s3", "o4": "s4", "o5": "n5"}
MAPS = {  # architecture -> deep maps and their shallow maps
    **{"RTMDet": _INNER, "RTMDetIns": _INNER, "YOLOX": _PAN, "YOLOv3": _PAN, "YOLOv5": _PAN},
    **{"YOLOv4": _LATERAL, "YOLOv7": _LATERAL},
}
LATERAL = ("YOLOv4", "YOLOv7")


# ---- Tables of layers


def test_a_table_of_layers() -> None:
    """Maps go from row to row, or from named rows, which are concatenated in their order."""
    table = (
        Layer("a", conv(1), 4),
        Layer("b", conv(3, stride=2), 6),
        Layer("up", upsample),
        Layer("c", conv(1), 8, inputs=("up", "a")),
    )
    graph = Graph(table, {"image": 3}, Scaling(width=0.5), ConvStyle()).eval()
    assert graph.channels == {"image": 3, "a": 2, "b": 3, "up": 3, "c": 4}
    x = torch.rand(1, 3, 8, 8)
    maps = graph({"image": x})
    a = graph["a"](x)
    up = F.interpolate(graph["b"](a), scale_factor=2, mode="nearest")
    assert torch.equal(maps["c"], graph["c"](torch.cat([up, a], 1)))


@for_each(
    "scaling, channels, repeats",
    [
        (Scaling(), (3, 64, 1024), (1, 3, 6)),
        (Scaling(0.167, 0.375), (2, 24, 384), (1, 1, 1)),  # RTMDet tiny: 3 · 0.167 = 0.501
        (Scaling(0.33, 0.51, 8), (8, 40, 528), (1, 1, 2)),
        (Scaling(1.5, 1.25), (3, 80, 1280), (2, 4, 9)),  # 4.5 is rounded to the even number
    ],
)
def test_scaling(scaling: Scaling, channels: tuple[int, ...], repeats: tuple[int, ...]) -> None:
    assert tuple(map(scaling.channels, (3, 64, 1024))) == channels
    assert tuple(map(scaling.repeats, (1, 3, 6))) == repeats


def test_focus_stacks_the_pixels_of_a_square() -> None:
    focus = Focus(2, 3, ConvStyle())
    focus.conv = nn.Identity()
    x = torch.arange(32.0).view(1, 2, 4, 4)
    corners = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
    assert torch.equal(focus(x), torch.cat(corners, 1))  # top left, bottom left, right


# ---- Blocks


def test_the_pyramid_pools_of_yolox_and_rtmdet() -> None:
    """Chained 5x5 pools are the pools over 5, 9 and 13 cells."""
    block = SPPF(4, 6, ConvStyle()).eval()
    x = torch.randn(1, 4, 16, 20)
    first = block.first(x)
    pools = [F.max_pool2d(first, k, stride=1, padding=k // 2) for k in (5, 9, 13)]
    assert torch.equal(block(x), block.last(torch.cat([first, *pools], 1)))


@for_each(
    "branch, residual, attention",
    [
        (bottleneck, True, False),
        (bottleneck, False, False),
        (large_kernel, True, True),
        (large_kernel, False, True),
        (large_kernel, False, False),
    ],
)
def test_csp_layers(branch: Any, residual: bool, attention: bool) -> None:
    layer: Any = csp(branch, residual, attention)(5, 8, 2, ConvStyle()).eval()
    x = torch.randn(2, 5, 6, 6)
    y = layer.main(x)
    for block in layer.blocks:
        y = y + block.branch(y) if residual else block(y)
    y = torch.cat([y, layer.short(x)], 1)
    if attention:
        fc = layer.attention.fc
        mean = y.mean((2, 3))
        logits = mean @ fc.weight.flatten(1).T + fc.bias
        y = y * (F.relu6(logits + 3) / 6)[:, :, None, None]
    torch.testing.assert_close(layer(x), layer.last(y))


@for_each(
    "branch, depthwise, kernels",
    [
        (bottleneck, False, [(1, 1), (3, 1)]),
        (bottleneck, True, [(1, 1), (3, 4), (1, 1)]),
        (large_kernel, False, [(3, 1), (5, 4), (1, 1)]),
    ],
)
def test_branches(branch: Any, depthwise: bool, kernels: list[tuple[int, int]]) -> None:
    """Kernel and groups of each convolution; each has a norm and an activation."""
    module = branch(4, ConvStyle(depthwise=depthwise))
    convs = [x for x in module.modules() if isinstance(x, nn.Conv2d)]
    assert [(x.kernel_size[0], x.groups) for x in convs] == kernels
    for kind in (nn.BatchNorm2d, nn.SiLU):
        assert sum(isinstance(x, kind) for x in module.modules()) == len(kernels)


# ---- Backbones


@for_each("architecture", NETWORKS)
def test_outputs_are_as_announced(architecture: str) -> None:
    backbone = yolo(architecture).backbone
    maps, rtmdet = MAPS[architecture], architecture.startswith("RTM")
    assert backbone.size_divisibility == 32
    assert backbone.padding_constraints == {"size_divisibility": 32, "square_size": 0}
    assert backbone.shallow_features == maps
    shapes = backbone.output_shape()
    outer = {f"{x}{k}" for x in (["p", "conv_p"] if rtmdet else ["p"]) for k in (3, 4, 5)}
    assert set(shapes) == {*maps, *maps.values(), *outer}
    outputs = backbone(torch.rand(1, 3, 64, 96))
    assert set(outputs) == set(shapes)
    for name, shape in shapes.items():
        assert shape.stride == 2 ** int(name[-1])
        width = 256 if rtmdet and name in outer else 32 * 2 ** int(name[-1])
        half = 2 if architecture in LATERAL and name not in outer else 1
        assert shape.channels == width // half // 8
        assert outputs[name].shape == (1, shape.channels, 64 // shape.stride, 96 // shape.stride)


@for_each("architecture", ["RTMDet", "YOLOX", "YOLOv3", "YOLOv5"])
def test_shallow_maps_enter_the_top_down_path(architecture: str) -> None:
    """They are the bottom-up's maps, and none equals its deep map."""
    backbone = yolo(architecture).backbone
    x = torch.rand(1, 3, 64, 64)
    outputs, bottom_up = backbone(x), backbone.bottom_up(x)
    assert set(bottom_up) == {"c3", "c4", "c5"}
    for deep, shallow in backbone.shallow_features.items():
        assert torch.equal(outputs[shallow], bottom_up[shallow])
        assert outputs[deep].shape == outputs[shallow].shape
        assert (outputs[deep] - outputs[shallow]).abs().max() > 1e-3


@for_each("architecture", ["RTMDet", "YOLOX", "YOLOv5"])
def test_paths_of_the_neck(architecture: str) -> None:
    """The way up reads the reduced maps, not those of the backbone."""
    graph: Graph = yolo(architecture).backbone.graph
    fine, middle, coarse = MAPS[architecture]
    assert graph.sources[fine] == ("up4", "c3") and graph.sources["t4"] == ("up5", "c4")
    assert graph.sources[middle] == ("down3", "r4") and graph.sources[coarse] == ("down4", "r5")
    assert graph.sources["r5"] == ("c5",) and graph.sources["r4"] == ("t4",)


@for_each("architecture", LATERAL)
def test_laterals_of_the_neck(architecture: str) -> None:
    """Shallow maps enter the top-down path, and deep maps leave the way up."""
    graph: Graph = yolo(architecture).backbone.graph
    sources = {name: graph.sources[name] for name in ("n5", "r5", "n4", "r4", "o3", "o4", "o5")}
    assert sources == {
        "n5": ("c5",),
        "r5": ("n5",),
        "n4": ("s4", "up5"),
        "r4": ("n4",),
        "o3": ("s3", "up4"),
        "o4": ("down3", "n4"),
        "o5": ("down4", "n5"),
    }


@for_each(
    "architecture, eps, momentum",
    [
        *((k, 1e-5, 0.1) for k in ("RTMDet", "RTMDetIns")),
        *((k, 1e-3, 0.03) for k in ("YOLOX", "YOLOv3", "YOLOv5", "YOLOv7")),
        ("YOLOv4", 1e-4, 0.03),
    ],
)
def test_batch_norms(architecture: str, eps: float, momentum: float) -> None:
    norms = [x for x in yolo(architecture).modules() if isinstance(x, nn.BatchNorm2d)]
    assert {(x.eps, x.momentum) for x in norms} == {(eps, momentum)}
    convs = [x for x in yolo(architecture).backbone.modules() if isinstance(x, nn.Conv2d)]
    attention = 4 if architecture.startswith("RTM") else 0
    assert sum(x.bias is not None for x in convs) == attention


@for_each("norm", ["GN", "", "FrozenBN"])
def test_other_norms(norm: str) -> None:
    wide = {"depth_width": (0.33, 1.0)} if norm == "GN" else {}  # groups of 32 channels
    cfg = yolo_cfg("RTMDet", "MODEL.CSPNEXT.NORM", norm, "MODEL.RTMDET.NORM", norm, **wide)
    model = on_meta(cfg)
    assert not any(isinstance(x, nn.BatchNorm2d) for x in model.modules())
    assert all((x.bias is None) == bool(norm) for x in model.head.cls_tower.convs)


def test_backbones_without_a_neck() -> None:
    for name, section in (
        ("cspnext", "CSPNEXT"),
        ("yolox", "CSPDARKNET"),
        *((name, "CSPDARKNET") for name in ("yolov3", "yolov4", "yolov4_csp", "yolov5")),
    ):
        cfg = yolo_cfg("YOLOX", f"MODEL.{section}.WIDTH", 0.125)
        cfg.MODEL.BACKBONE.NAME = f"build_{name}_backbone"
        shapes = build_backbone(cfg).output_shape()
        assert {k: (v.channels, v.stride) for k, v in shapes.items()} == {
            "c3": (32, 8),
            "c4": (64, 16),
            "c5": (128, 32),
        }


def timm_cfg(name: str, width: float) -> Any:
    cfg = yolo_cfg("YOLOv5", "MODEL.TIMM.NAME", name, depth_width=(0.33, width))
    cfg.MODEL.BACKBONE.NAME = "build_timm_yolo_pafpn_backbone"
    return cfg


def test_yolov5s_neck_on_timm() -> None:
    backbone = build_backbone(timm_cfg("resnet10t", 0.125)).eval()
    outputs = backbone(torch.rand(1, 3, 64, 64))
    adapted = backbone.graph["c4"](backbone.bottom_up(torch.rand(1, 3, 64, 64))["res4"])
    assert adapted.shape == outputs["c4"].shape == outputs["p4"].shape == (1, 64, 4, 4)
    cfg = timm_cfg("resnet10t", 0.125)
    cfg.MODEL.TIMM.OUT_INDICES = (1, 2, 3)
    with pytest.raises(ValueError, match="'resnet10t' has no map res5 of stride 32"):
        build_backbone(cfg)


@pytest.mark.slow
def test_parameters_of_yolov5s_with_convnext_tiny() -> None:
    cfg = timm_cfg("convnext_tiny", 0.5)
    model = on_meta(cfg)
    adapters = sum(parameters(model.backbone.graph[name]) for name in ("c3", "c4", "c5"))
    neck = parameters(model.backbone.graph) - adapters
    found = (parameters(model.backbone.bottom_up), adapters, neck, parameters(model.head))
    assert found == (27_818_592, 517_888, 2_834_688, 21_576)


# ---- Inputs


@for_each("architecture", NETWORKS)
def test_padding_is_gray_before_normalization(architecture: str) -> None:
    model = yolo(
        architecture, "MODEL.PIXEL_MEAN", [10.0, 20.0, 30.0], "MODEL.PIXEL_STD", [2.0, 4.0, 8.0]
    )
    sizes = [(33, 70), (40, 50)]
    inputs = [{"image": torch.randint(0, 256, (3, *x), dtype=torch.uint8)} for x in sizes]
    images = model.preprocess_image(inputs)
    assert images.tensor.shape == (2, 3, 64, 96) and images.image_sizes == sizes
    mean, std = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([2.0, 4.0, 8.0])
    for pixels, x in zip(images.tensor, inputs):
        expected = torch.full((3, 64, 96), 114.0)
        expected[:, : x["image"].shape[1], : x["image"].shape[2]] = x["image"]
        torch.testing.assert_close(pixels, (expected - mean[:, None, None]) / std[:, None, None])
    raw = [x["image"] for x in inputs]
    asked = build_family(model).preprocess(raw, (64, 128))  # as a teacher
    assert torch.equal(asked[..., :96], images.tensor)
    assert torch.equal(asked[..., 96:], images.tensor[:, :, -1:, -1:].expand(2, 3, 64, 32))


def test_other_padding() -> None:
    opts = ("MODEL.RTMDET.PAD_VALUE", 0.0, "MODEL.CSPNEXT.SQUARE_PAD", 128)
    model = yolo("RTMDet", *opts)
    images = model.preprocess_image([{"image": torch.ones(3, 20, 30)}])
    assert images.tensor.shape == (1, 3, 128, 128)
    torch.testing.assert_close(images.tensor[0, :, -1, -1], -model.pixel_mean.flatten())
    with pytest.raises(ValueError, match="has 129 pixels, but images are padded to 128 x 128"):
        model.preprocess_image([{"image": torch.ones(3, 20, 129)}])


@for_each("architecture", NETWORKS)
def test_images_of_odd_sizes(architecture: str) -> None:
    """Boxes and masks are in the pixels of the requested size."""
    model = yolo(architecture)
    for height, width in ((51, 37), (64, 64)):
        inputs = {**image_dict(0, height, width), "height": 2 * height, "width": 3 * width}
        with torch.no_grad():
            found = model([inputs])[0]["instances"]
        assert found.image_size == (2 * height, 3 * width)
        assert 0 < len(found) <= 100
        boxes = found.pred_boxes.tensor
        assert (boxes >= 0).all() and (boxes[:, 2] <= 3 * width).all()
        assert (boxes[:, 3] <= 2 * height).all()
        if architecture == "RTMDetIns":
            assert found.pred_masks.shape == (len(found), 2 * height, 3 * width)
            assert 0 < found.pred_masks.float().mean() < 1


@pytest.mark.slow
@for_each("architecture, half", [(k, half) for k in NETWORKS for half in (False, True)])
def test_every_parameter_has_a_gradient(architecture: str, half: bool) -> None:
    """DistributedDataParallel requires it; boxes stay in full precision where they are scaled."""
    model = yolo(architecture).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        maps = model.backbone(torch.randn(2, 3, 64, 64))
        predictions = model.head([maps[name] for name in model.head_in_features])
    sum(x.float().square().mean() for level in predictions for x in level).backward()
    gradients = {name: x.grad for name, x in model.named_parameters()}
    assert not [k for k, x in gradients.items() if x is None or not x.isfinite().all()]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = model.eval()([image_dict(0)])[0]["instances"]
    assert found.pred_boxes.tensor.dtype == torch.float32


# ---- Configs and checkpoints


@for_each("architecture", NETWORKS)
def test_a_plain_yaml(architecture: str, tmp_path: Path) -> None:
    """Stock detectron2 builds the network from a file, and its state loads strictly."""
    backbone, section = NETWORKS[architecture]
    values = {
        "META_ARCHITECTURE": architecture,
        "DEVICE": "cpu",
        "BACKBONE": {"NAME": f"build_{backbone}_backbone"},
        section: {"DEPTH": 0.33, "WIDTH": 0.125},
        architecture.upper(): {"NUM_CLASSES": CLASSES},
    }
    path = tmp_path / "detector.yaml"
    path.write_text(yaml.safe_dump({"MODEL": values}))
    cfg = get_cfg()
    add_nets_config(cfg)
    cfg.merge_from_file(str(path))
    built, ours = build_model(cfg).eval(), yolo(architecture)
    built.load_state_dict(ours.state_dict())
    inputs = [image_dict(0)]
    with torch.no_grad():
        (a,), (b,) = built(inputs), ours(inputs)
    assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)


def test_a_students_yaml_has_only_the_keys_that_are_read() -> None:
    cfg = get_distill_cfg()
    cfg.MODEL.META_ARCHITECTURE = "YOLOX"
    cfg.MODEL.BACKBONE.NAME = "build_yolox_pafpn_backbone"
    node = student_config(cfg).MODEL
    assert "YOLOX" in node and "CSPDARKNET" in node
    assert not {"YOLOV5", "RTMDET", "CSPNEXT", "TIMM", "FCOS"} & set(node)


@for_each("architecture", NETWORKS)
def test_a_family_reads_the_dense_outputs(architecture: str) -> None:
    """The boxes that it decodes are those of the detector."""
    model = yolo(architecture)
    info = network_info("teacher", model)
    assert info.dense is not None and info.dense.strides == [8, 16, 32]
    assert info.shallow == tuple(model.backbone.shallow_features)
    maps, predictions = features(model, torch.randn(2, 3, 64, 96))
    family: Any = build_family(model)
    outputs = type("Outputs", (), {"dense": family._dense(predictions), "dense_boxes": []})()
    decode_dense(model, outputs, {"dense_boxes"})
    priors = torch.cat([x.tensor for x in model.anchor_generator(maps)])
    flat = model.flat(predictions[1], 4)
    torch.testing.assert_close(
        torch.cat(outputs.dense_boxes, 1), model.decoded(flat, priors.expand(2, -1, 4))
    )


@for_each("architecture", ["RTMDet", "YOLOX", "YOLOv3", "YOLOv5", "YOLOv7"])
def test_heads_find_the_levels(architecture: str) -> None:
    """Feature heads compare the neck's outputs; MSSD compares the maps of equal channels."""
    model = yolo(architecture)
    own, fpn = network_info("student", model), network_info("teacher", tiny_model("retinanet"))
    deep = list(MAPS[architecture])
    convs = [f"conv_p{k}" for k in (3, 4, 5)] if architecture == "RTMDet" else []
    assert list(own.inner) == ([*deep, *convs] if deep[0] == "o3" else [])
    cfg = get_distill_cfg()
    for student, teacher in ((own, own), (own, fpn), (fpn, own)):
        levels = FitNet.from_config(cfg, student, teacher)["levels"]
        pairs = {(x.student, x.teacher) for x in levels}
        assert pairs == {(f"p{k}", f"p{k}") for k in (3, 4, 5)}
    cfg.MODEL.DISTILL.FITNET.IN_FEATURES = deep
    levels = FitNet.from_config(cfg, own, own)["levels"]
    assert [(x.student, x.teacher) for x in levels] == [(k, k) for k in deep]
    assert MSSD.problem(own, None) is None
    assert MSSD.from_config(cfg, own, None)["levels"] == deep
    outputs = model.backbone(torch.rand(1, 3, 64, 64))
    for name, shallow in model.backbone.shallow_features.items():
        assert outputs[name].shape == outputs[shallow].shape


def test_builders_are_registered() -> None:
    for name in ("cspnext", "yolox", "yolov4", "yolov4_csp", "yolov5", "yolov7", "timm_yolo"):
        assert f"build_{name}_pafpn_backbone" in BACKBONE_REGISTRY
    assert "build_yolov3_fpn_backbone" in BACKBONE_REGISTRY  # it has no way up
    assert "build_yolov3_pafpn_backbone" not in BACKBONE_REGISTRY
    builder = BACKBONE_REGISTRY.get("build_cspnext_pafpn_backbone")
    gray = builder(yolo_cfg("RTMDet"), ShapeSpec(channels=1))
    assert gray.bottom_up.graph["stem1"].conv.in_channels == 1

"""Each family provides what heads may know of its networks."""

import copy

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear

from distill.heads import FGFI, LGD, MasKD
from distill.nets.dense import CellTransform
from distill.nets.gfl import Integral
from distill.nets.rtmdet import DistanceTransform
from tests.support.networks import (
    FAMILIES,
    PAFPN,
    YOLO,
    network_info,
    outspoken_model,
    tiny_fcos,
    tiny_model,
)

LEVELS = ["p2", "p3", "p4", "p5", "p6"]
STRIDES = [4, 8, 16, 32, 64]
R_CNN = ("faster", "mask", "cascade", "panoptic")
DENSE = ("retinanet", "fcos", "atss", "gfl", "reppoints", *YOLO)
KINDS = {
    **{k: ["GeneralizedRCNN"] for k in ("faster", "mask", "cascade")},
    "panoptic": ["PanopticFPN", "GeneralizedRCNN"],
    "retinanet": ["RetinaNet", "DenseDetector"],
    "fcos": ["FCOS", "FCOS", "DenseDetector"],  # ours and detectron2's
    **{k: [v, "PriorDetector", "DenseDetector"] for k, v in (("atss", "ATSS"), ("gfl", "GFL"))},
    "reppoints": ["RepPoints", "PriorDetector", "DenseDetector"],
    "rtmdet": ["RTMDet", "DynamicDetector", "PriorDetector", "DenseDetector"],
    "rtmdet_ins": ["RTMDetIns", "RTMDet", "DynamicDetector", "PriorDetector", "DenseDetector"],
    "yolox": ["YOLOX", "ObjectnessDetector", "DynamicDetector", "PriorDetector", "DenseDetector"],
    "yolov5": ["YOLOv5", "ObjectnessDetector", "PriorDetector", "DenseDetector"],
    "yolov7": ["YOLOv7", "YOLOv5", "ObjectnessDetector", "PriorDetector", "DenseDetector"],
    "semantic": ["SemanticSegmentor"],
}


def info_of(family, *opts):
    return network_info("student", tiny_model(family, *opts))


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_are_the_networks_class_and_its_bases(family):
    info = info_of(family)
    assert list(info.kinds[: len(KINDS[family])]) == KINDS[family]
    assert info.kinds[-2:] == ("Module", "object") and info.kind == KINDS[family][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_is_there_where_its_outputs_are(family):
    info = info_of(family)
    assert (info.dense is not None) == ("dense" in info.outputs)
    assert (info.last_layers is not None) == ("head_features" in info.outputs)
    assert (info.detector_losses is not None) == info.has_boxes == bool(info.detector_levels)
    assert bool(info.box_in_features) == ("rois" in info.outputs)
    assert info.shallow == () and not info.use_sigmoid_ce


@pytest.mark.parametrize("family", (*R_CNN, *DENSE))
def test_the_layout_of_the_dense_head(family):
    layout = info_of(family).dense
    assert layout.objectness == (family in R_CNN)
    part = slice(1, 4) if family in YOLO else slice(None)
    assert layout.levels == LEVELS[part] and layout.strides == STRIDES[part]
    number = 3 if family in (*R_CNN, "retinanet", "yolov5", "yolov7") else 1
    assert [x.shape for x in layout.anchors] == [(number, 4)] * len(layout.levels)
    assert all(x.device.type == "cpu" and not x.requires_grad for x in layout.anchors)
    expected = {"reppoints": (0.4, 0.5), **dict.fromkeys(R_CNN, (0.3, 0.7))}
    assert layout.thresholds == expected.get(family, (0.4, 0.5))
    corner = family in (*R_CNN, "retinanet", "rtmdet", "rtmdet_ins")
    assert layout.offset == (0.0 if corner else 0.5)


def test_values_of_the_layout_are_the_configs():
    opts = ("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5, "MODEL.RETINANET.IOU_THRESHOLDS", [0.3, 0.6])
    layout = info_of("retinanet", *opts).dense
    assert layout.offset == 0.5 and layout.thresholds == (0.3, 0.6)
    assert info_of("gfl", "MODEL.GFL.CANDIDATES", 5).dense.candidates == 5
    assert info_of("gfl", "MODEL.GFL.REG_MAX", 7).dense.reg_max == 7


@pytest.mark.parametrize(
    ("family", "encoding", "box_dim"),
    [
        ("faster", (Box2BoxTransform, (1.0, 1.0, 1.0, 1.0)), 4),
        ("retinanet", (Box2BoxTransform, (1.0, 1.0, 1.0, 1.0)), 4),
        ("atss", (Box2BoxTransform, (10.0, 10.0, 5.0, 5.0)), 4),
        ("fcos", (Box2BoxTransformLinear, None), 4),
        ("reppoints", (CellTransform, None), 4),
        ("rtmdet", (DistanceTransform, None), 4),
        ("yolox", (Box2BoxTransform, (1.0, 1.0, 1.0, 1.0)), 4),
        ("yolov5", (Box2BoxTransform, (1.0, 1.0, 1.0, 1.0)), 4),
        ("gfl", None, 68),
    ],
)
def test_the_encoding_of_a_box(family, encoding, box_dim):
    layout = info_of(family).dense
    assert layout.box_encoding == encoding and layout.box_dim == box_dim
    assert (layout.reg_max is None) == (family != "gfl")
    if family == "gfl":
        assert isinstance(layout.box2box_transform, Integral) and layout.reg_max == 16


@pytest.mark.parametrize(
    ("family", "channels", "centerness"),
    [
        ("retinanet", ([16], [16]), False),
        ("gfl", ([16], [16]), False),
        ("fcos", ([16], [16]), True),
        ("atss", ([16], [16]), True),
        ("reppoints", None, False),
        *((family, None, False) for family in YOLO),
        ("faster", None, False),
    ],
)
def test_the_subnets_of_the_dense_head(family, channels, centerness):
    layout = info_of(family).dense
    assert layout.subnet_channels == channels and layout.centerness == centerness


def test_subnets_of_several_convolutions():
    opts = ("MODEL.FCOS.NUM_CONVS", 3, "MODEL.FCOS.NORM", "GN")
    assert info_of("fcos", *opts, "MODEL.FPN.OUT_CHANNELS", 32).dense.subnet_channels == (
        [32] * 3,
        [32] * 3,
    )


@pytest.mark.parametrize("family", ["retinanet", "fcos", "atss", "gfl"])
@pytest.mark.parametrize("convs", [0, 1, 2])
def test_the_last_layers_predict_what_the_head_does(family, convs):
    model = outspoken_model(family, f"MODEL.{family.upper()}.NUM_CONVS", 3)
    held: dict[str, list[torch.Tensor]] = {"cls_subnet": [], "bbox_subnet": []}
    for name, maps in held.items():
        subnet = getattr(model.head, name)
        before = [k - 1 for k, x in enumerate(subnet) if isinstance(x, torch.nn.ReLU)]
        subnet[before[-1 - convs]].register_forward_hook(
            lambda *call, maps=maps: maps.append(call[-1].clone())  # the activation is in-place
        )
    g = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 16, n, n + 1, generator=g) for n in (6, 5, 3, 2, 1)]
    with torch.no_grad():
        expected = model.head(features)
        found = network_info("teacher", model).last_layers(convs)(list(held.values()))
    anchors = 3 if family == "retinanet" else 1
    for maps, rows in zip(expected, found):
        assert len(maps) == 5 and rows.shape[:2] == (2, anchors * (42 + 30 + 12 + 6 + 2))
        flat = [x.flatten(2).transpose(1, 2).reshape(2, -1, rows.shape[2]) for x in maps]
        assert torch.equal(rows, torch.cat(flat, 1))


def test_the_levels_of_an_rcnns_boxes_and_losses():
    info = info_of("mask")
    assert info.box_in_features == ("p2", "p3", "p4", "p5")
    assert info.detector_levels == ("p2", "p3", "p4", "p5", "p6")


@pytest.mark.parametrize("family", ["faster", "cascade"])
def test_boxes_scored_by_sigmoids(family):
    opts = ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)
    assert info_of("faster", *opts).use_sigmoid_ce and not info_of(family).use_sigmoid_ce


def test_shallow_maps_of_a_neck():
    assert set(info_of("retinanet", *PAFPN).shallow) == {"p2", "p3", "p4", "p5"}


def test_a_dense_detector_without_a_config():
    info = network_info("student", tiny_fcos())
    assert info.kind == "FCOS" and info.dense.subnet_channels == ([16], [16])


def test_without_an_rpn_there_is_no_dense_head_and_its_heads_say_so():
    info = info_of("faster", "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    assert info.dense is None and info.detector_losses is None and info.has_boxes
    assert FGFI.problem(info, info) == "the student has no anchors"
    assert LGD.problem(info, None).startswith("the student has no RPN")
    assert MasKD.problem(info, info).startswith("the teacher has no RPN")


def test_it_holds_no_module():
    """Its callables refer to the network; a copy of both refers to the copied one."""
    model = tiny_model("faster")
    info, twin = copy.deepcopy((network_info("student", model), model))
    assert info.detector_losses.detector is twin

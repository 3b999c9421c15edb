"""Test FPN + PAN: names, strides, sizes and pathways."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, RetinaNet
from detectron2.utils.events import EventStorage

from distill.nets import PAFPN
from tests.support.networks import (
    STOCK_P3_P7,
    distilled,
    image_dict,
    tiny_cfg,
    tiny_fcos,
    tiny_model,
)

BUILDERS = {
    "build_shallow_resnet_pafpn_backbone": ((), 6, range(2, 6)),
    "build_resnet_pafpn_backbone": (
        ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
        6,
        range(2, 6),
    ),
    "build_retinanet_resnet_pafpn_backbone": (STOCK_P3_P7, 7, range(3, 6)),
}


def backbone(name, norm=""):
    cfg = tiny_cfg("retinanet", *BUILDERS[name][0], "MODEL.FPN.NORM", norm)
    torch.manual_seed(0)
    return BACKBONE_REGISTRY.get(name)(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize("name", BUILDERS)
def test_outputs_are_as_announced(name):
    neck = backbone(name)
    _, last, own = BUILDERS[name]
    names = {f"p{k}" for k in range(own[0], last + 1)}
    assert neck.shallow_features == {f"p{k}": f"fpn_p{k}" for k in own}
    shapes = neck.output_shape()
    assert set(shapes) == names | {f"fpn_p{k}" for k in own}
    outputs = neck(torch.rand(1, 3, 64, 96))
    assert set(outputs) == set(shapes)
    for key, shape in shapes.items():
        height, width = outputs[key].shape[2:]
        assert shape.stride == 2 ** int(key[-1])
        assert (height, width) == (-(-64 // shape.stride), -(-96 // shape.stride))
        assert outputs[key].shape[1] == shape.channels == 16


@pytest.mark.parametrize("name", BUILDERS)
def test_every_deep_map_differs_from_its_shallow_one(name):
    neck = backbone(name)
    outputs = neck(torch.rand(1, 3, 64, 64))
    for deep, shallow in neck.shallow_features.items():
        assert (outputs[deep] - outputs[shallow]).abs().max() > 1e-3


def test_the_shallow_maps_are_the_fpns():
    neck = backbone("build_shallow_resnet_pafpn_backbone").eval()
    x = torch.rand(1, 3, 64, 64)
    outputs = neck(x)
    for name, value in neck.fpn(x).items():
        assert torch.equal(outputs[f"fpn_{name}"], value)


def test_the_pathway_leads_from_fine_to_coarse():
    neck = backbone("build_shallow_resnet_pafpn_backbone").eval()
    x = torch.rand(1, 3, 64, 64)
    before = neck(x)
    with torch.no_grad():
        neck.down_convs["p4"].weight.mul_(2)
    after = neck(x)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"p4", "p5", "p6"}


@pytest.mark.parametrize("norm, bias", [("", True), ("BN", False)])
def test_norm_replaces_the_bias(norm, bias):
    neck = backbone("build_shallow_resnet_pafpn_backbone", norm)
    convs = [*neck.down_convs.values(), *neck.output_convs.values()]
    assert len(convs) == 7
    assert all((c.bias is not None) == bias and (c.norm is None) == bias for c in convs)


def test_padding_is_the_fpns():
    neck = backbone("build_shallow_resnet_pafpn_backbone")
    assert isinstance(neck, PAFPN)
    assert neck.size_divisibility == 32
    assert neck.padding_constraints == neck.fpn.padding_constraints


@pytest.mark.parametrize("family", ["faster", "mask", "retinanet"])
def test_detectors_read_the_deep_maps(family):
    model = tiny_model(family, "MODEL.BACKBONE.NAME", "build_shallow_resnet_pafpn_backbone")
    with EventStorage():
        sum(model([image_dict(0)]).values()).backward()
    grads = [m.weight.grad for m in model.backbone.output_convs.values()]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)
    if isinstance(model, RetinaNet):
        assert all(not name.startswith("fpn_") for name in model.head_in_features)


def test_an_fcos_teaches_itself():
    student = tiny_fcos(backbone="build_shallow_resnet_pafpn_backbone")
    model = distilled("retinanet", ["MSSD"], student=student)
    with EventStorage():
        losses = model([image_dict(0), image_dict(1)])
    assert sum(k.startswith("loss_mssd") for k in losses) == 8
    sum(losses.values()).backward()

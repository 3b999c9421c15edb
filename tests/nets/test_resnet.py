"""Test dilated ResNets: output strides, names, and outputs compared with detectron2's ResNets."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model

from distill.config import building
from distill.errors import ConfigError
from tests.support.networks import image_dict, tiny_cfg

DEPTHS = (18, 34, 50, 101)
DILATIONS = {32: (1, 1), 16: (1, 2), 8: (2, 4)}  # output stride -> dilations of res4, res5
OURS, STOCK = "build_dilated_resnet_backbone", "build_resnet_backbone"


def config(depth, stride=32, *opts):
    """Return a config of a ResNet as narrow as detectron2 allows."""
    res4, res5 = DILATIONS[stride]
    return tiny_cfg(
        "semantic",
        *("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64 if depth in (18, 34) else 16),
        *("MODEL.RESNETS.RES4_DILATION", res4, "MODEL.RESNETS.RES5_DILATION", res5),
        *("MODEL.RESNETS.STEM_TYPE", "basic", "MODEL.RESNETS.RES5_MULTI_GRID", [1, 1, 1]),
        *opts,
    )


def backbone(cfg, name=OURS, training=False):
    torch.manual_seed(0)
    return BACKBONE_REGISTRY.get(name)(cfg, ShapeSpec(channels=3)).train(training)


@pytest.mark.parametrize("stem", ["basic", "deeplab"])
@pytest.mark.parametrize("stride", DILATIONS)
@pytest.mark.parametrize("depth", [10, *(pytest.param(x, marks=pytest.mark.slow) for x in DEPTHS)])
def test_outputs_are_as_announced(depth, stride, stem):
    net = backbone(config(depth, stride, "MODEL.RESNETS.STEM_TYPE", stem))
    assert net.size_divisibility == stride
    shapes = net.output_shape()
    assert [x.stride for x in shapes.values()] == [min(2**k, stride) for k in range(2, 6)]
    for height, width in ((64, 96), (33, 71)):
        for name, x in net(torch.rand(1, 3, height, width)).items():
            cells = tuple(-(-size // shapes[name].stride) for size in (height, width))
            assert x.shape == (1, shapes[name].channels, *cells)


@pytest.mark.parametrize("depth", DEPTHS)
def test_without_dilation_it_is_detectron2s(depth):
    ours, stock = backbone(config(depth)), backbone(config(depth), STOCK)
    assert list(ours.state_dict()) == list(stock.state_dict())
    x = torch.rand(1, 3, 64, 96)
    for name, expected in stock(x).items():  # built with the same seed
        assert torch.equal(ours(x)[name], expected)


@pytest.mark.parametrize("stride", DILATIONS)
@pytest.mark.parametrize("depth", [18, 50])
def test_names_are_detectron2s_whatever_the_dilation(depth, stride):
    ours, stock = backbone(config(depth, stride)), backbone(config(depth), STOCK)
    shapes = {k: v.shape for k, v in stock.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == shapes


@pytest.mark.parametrize("in_1x1", [True, False])
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("depth", [10, 18, 50])
def test_dilated_it_says_the_same_where_the_strided_network_has_cells(depth, stride, in_1x1):
    opts = ("MODEL.RESNETS.STRIDE_IN_1X1", in_1x1)
    dilated, strided = backbone(config(depth, stride, *opts)), backbone(config(depth, 32, *opts))
    x = torch.rand(1, 3, 65, 97)
    maps, expected = dilated(x), strided(x)
    for name in ("res4", "res5"):
        step = strided.output_shape()[name].stride // dilated.output_shape()[name].stride
        torch.testing.assert_close(maps[name][..., ::step, ::step], expected[name])


@pytest.mark.parametrize("stride", [8, 16])
def test_multi_grid_is_deeplabs(stride):
    opts = ("MODEL.RESNETS.RES5_MULTI_GRID", [1, 2, 4], "MODEL.RESNETS.STEM_TYPE", "deeplab")
    cfg = config(50, stride, *opts)
    ours, stock = backbone(cfg), backbone(cfg, "build_resnet_deeplab_backbone")
    assert list(ours.state_dict()) == list(stock.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(ours(x)["res5"], stock(x)["res5"])


@pytest.mark.parametrize("stem", ["basic", "deeplab"])
def test_freezing_is_detectron2s(stem):
    cfg = config(18, 8, "MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.RESNETS.STEM_TYPE", stem)
    cfg.MODEL.RESNETS.NORM = "BN"
    net = backbone(cfg, training=True)
    frozen = {k.split(".")[0] for k, p in net.named_parameters() if not p.requires_grad}
    trained = {k.split(".")[0] for k, p in net.named_parameters() if p.requires_grad}
    assert frozen <= {"stem", "res2"} and trained == {"res3", "res4", "res5"}
    assert isinstance(net.stem.conv1.norm, FrozenBatchNorm2d)


def test_stages_behind_the_last_output_are_not_built():
    net = backbone(config(18, 8, "MODEL.RESNETS.OUT_FEATURES", ["res3"]))
    assert not any(k.startswith("res4") for k in net.state_dict())


@pytest.mark.parametrize(
    "opts, words",
    [
        (("MODEL.RESNETS.DEPTH", 20), ["DEPTH is 20", "18, 34"]),
        (("MODEL.RESNETS.STEM_TYPE", "deep"), ["STEM_TYPE is deep", "basic"]),
        (("MODEL.RESNETS.RES4_DILATION", 2), ["RES5_DILATION) is (2, 1)", "(2, 4)"]),
        (("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False] * 3 + [True]), ["DEFORM_ON_PER_STAGE"]),
    ],
)
def test_what_it_does_not_have_is_one_sentence(opts, words):
    with pytest.raises(ConfigError) as e, building("student"):
        backbone(config(18, 32, *opts))
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)


def test_images_of_odd_sizes_are_padded_to_cells():
    opts = ("MODEL.BACKBONE.NAME", OURS, "MODEL.SEM_SEG_HEAD.NAME", "PSPHead")
    opts += ("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res5"])
    model = build_model(config(10, 8, *opts)).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with torch.no_grad():
        (result,) = model([image_dict(0, 57, 83)])
    assert seen == [(1, 3, 64, 88)] and result["sem_seg"].shape[1:] == (57, 83)

"""Test timm backbones with detectron2's necks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone
from safetensors.torch import save_file
from torch import nn

from distill.config import building, student_config
from distill.errors import ConfigError
from distill.nets.necks import BOTTOM_UPS
from distill.nets.timm import build_timm_backbone
from tests.support.networks import STOCK_P3_P7, tiny_cfg

MODELS = ("resnet18", "mobilenetv3_large_100", "efficientnet_b0", "convnext_tiny", "cspdarknet53")


def config(name: str, builder: str = "build_timm_fpn_backbone", *opts: Any) -> CfgNode:
    return tiny_cfg("faster", "MODEL.BACKBONE.NAME", builder, "MODEL.TIMM.NAME", name, *opts)


def built(cfg: CfgNode) -> Any:
    with building("student"):
        return build_backbone(cfg)


def bottom_up_state(backbone: Any) -> dict[str, torch.Tensor]:
    return backbone.bottom_up.features.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_an_fpn_on_top(name: str) -> None:
    backbone = built(config(name)).eval()
    shapes = backbone.output_shape()
    assert {k: v.stride for k, v in shapes.items()} == {f"p{k}": 2**k for k in range(2, 7)}
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    for k, v in shapes.items():
        assert maps[k].shape == (1, 16, 64 // v.stride, -(-96 // v.stride))


P3_P7 = ("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"])


@pytest.mark.parametrize("bottom_up", BOTTOM_UPS)
@pytest.mark.parametrize("neck", ["fpn", "pafpn"])
@pytest.mark.parametrize("family", ["", "retinanet_", "fcos_"])
def test_every_neck(bottom_up: str, neck: str, family: str) -> None:
    if (family, neck) == ("fcos_", "pafpn"):
        pytest.skip("a dense PAFPN always has P6 of P5")
    opts = (*STOCK_P3_P7, *P3_P7) if bottom_up == "resnet" else P3_P7 if family else ()
    opts = opts if family or bottom_up != "resnet" else STOCK_P3_P7[:6]
    cfg = tiny_cfg("faster", *opts)
    builder = BACKBONE_REGISTRY.get(f"build_{family}{bottom_up}_{neck}_backbone")
    backbone = builder(cfg, ShapeSpec(channels=3)).eval()
    levels = range(3, 8) if family else range(2, 7)
    strides = {k: v.stride for k, v in backbone.output_shape().items() if k.startswith("p")}
    assert strides == {f"p{k}": 2**k for k in levels}
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 128, 128))
    assert all(maps[k].shape == (1, 16, 128 // s, 128 // s) for k, s in strides.items())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_a_local_file(name: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = timm.create_model(name)
    path = str(tmp_path / f"weights.{suffix}")
    save_file(whole.state_dict(), path) if suffix == "safetensors" else torch.save(
        whole.state_dict(), path
    )
    torch.manual_seed(2)
    backbone = built(config(name, "build_timm_fpn_backbone", "MODEL.TIMM.WEIGHTS", path)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.eval().forward_features(x)
        torch.testing.assert_close(backbone.bottom_up(x)["res5"], expected)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    missing = ("MODEL.TIMM.WEIGHTS", str(tmp_path / "gone.pth"))
    with pytest.raises(ConfigError, match=r"'.*gone.pth' does not exist"):
        built(config("resnet18", "build_timm_fpn_backbone", *missing))
    other = timm.create_model("resnet10t")
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"does not hold weights of resnet18 .*size mismatch"):
        _loaded(tmp_path / "other.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:1000])
    with pytest.raises(ConfigError, match="does not hold weights of resnet18"):
        _loaded(tmp_path / "torn.pth")
    state = timm.create_model("resnet18").state_dict()
    del state["layer3.0.conv1.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ConfigError, match=r"lacks 1 of .* such as layer3.0.conv1.weight"):
        _loaded(tmp_path / "part.pth")


def _loaded(path: Path) -> Any:
    return built(config("resnet18", "build_timm_fpn_backbone", "MODEL.TIMM.WEIGHTS", str(path)))


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(ConfigError, match=r"of resnet18 cannot be downloaded \(no route to host\)"):
        built(config("resnet18", "build_timm_fpn_backbone", "MODEL.TIMM.PRETRAINED", True))


def test_an_unknown_model() -> None:
    with pytest.raises(
        ConfigError, match=r"'resnet81' is not a model of timm; nearest: .*resnet18"
    ):
        built(config("resnet81"))


def test_a_name_with_the_tag_of_its_weights() -> None:
    assert built(config("resnet18.a1_in1k")).bottom_up.output_shape()["res5"].stride == 32


def test_images_of_one_channel(tmp_path: Path) -> None:
    """timm adapts the first convolution. Other missing weights are still found."""
    path = str(tmp_path / "weights.pth")
    state = timm.create_model("resnet18").state_dict()
    torch.save(state, path)
    cfg = config("resnet18", "build_timm_fpn_backbone", "MODEL.TIMM.WEIGHTS", path)
    features: Any = build_timm_backbone(cfg, ShapeSpec(channels=1)).features
    colours = state["conv1.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(features.conv1.weight.detach(), colours)
    del state["layer1.0.conv1.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"lacks 1 of .* such as layer1.0.conv1.weight"):
        build_timm_backbone(cfg, ShapeSpec(channels=1))


def test_a_model_for_images_of_one_size() -> None:
    with pytest.raises(
        ConfigError, match=r"swin_tiny.* accepts only images of one size \(Input height"
    ):
        built(config("swin_tiny_patch4_window7_224"))


@pytest.mark.parametrize(
    "strides, channels_last, message",
    [
        ([16, 16], False, r"maps of strides \[16, 16\]; a neck needs"),
        ([4, 12], False, r"maps of strides \[4, 12\]; a neck needs"),
        ([4, 8], True, r"maps of shapes \[\(32, 48, 5\)"),
    ],
)
def test_maps_that_no_neck_takes(
    strides: list[int], channels_last: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Features(nn.Module):
        feature_info = SimpleNamespace(reduction=lambda: strides, channels=lambda: [5, 5])

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            maps = [torch.zeros(1, 5, x.shape[2] // s, x.shape[3] // s) for s in strides]
            return [m.permute(0, 2, 3, 1) if channels_last else m for m in maps]

    monkeypatch.setattr("timm.create_model", lambda *_, **__: Features())
    with pytest.raises(ConfigError, match=message):
        built(config("resnet18"))


def test_norms_that_keep_their_statistics() -> None:
    for keep in (False, True):
        opts = ("MODEL.TIMM.NORM_EVAL", keep)
        backbone = built(config("resnet18", "build_timm_fpn_backbone", *opts)).train()
        norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and all(m.training != keep for m in norms)


def test_other_maps() -> None:
    opts = ("MODEL.TIMM.OUT_INDICES", (2, 3, 4), "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"])
    backbone = built(config("resnet18", "build_retinanet_timm_fpn_backbone", *opts))
    assert sorted(backbone.bottom_up.output_shape()) == ["res3", "res4", "res5"]


def test_a_students_yaml_asks_for_no_download() -> None:
    opts = ("MODEL.TIMM.PRETRAINED", True, "MODEL.TIMM.WEIGHTS", "somewhere.pth")
    node = student_config(config("resnet18", "build_timm_fpn_backbone", *opts)).MODEL.TIMM
    assert (node.NAME, node.PRETRAINED, node.WEIGHTS) == ("resnet18", False, "")
    assert "TIMM" not in student_config(tiny_cfg("faster")).MODEL

"""Layers that integers can compute, found by how a network is connected."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from torch import Tensor, nn

from distill.modeling.layer_graph import LAYERS, LayerGraph, Site, layer_graph
from tests.support.networks import FAMILIES, tiny_model

RPN = ["proposal_generator.rpn_head.objectness_logits", "proposal_generator.rpn_head.anchor_deltas"]
BOX = ["roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"]
STAGES = [f"roi_heads.box_predictor.{k}.{x}" for k in range(3) for x in ("cls_score", "bbox_pred")]
MASK = ["roi_heads.mask_head.predictor"]
DENSE = ["head.cls_score", "head.bbox_pred"]
UNREAD = ["backbone.fpn_output2"]  # the head does not read this level
PER_LEVEL = [f"{name}.{k}" for name in DENSE for k in range(3)]
FLOAT = {
    "faster": RPN + BOX,
    "mask": RPN + BOX + MASK,
    "cascade": RPN + STAGES + MASK,
    "panoptic": [*RPN, *BOX, *MASK, "sem_seg_head.predictor"],
    "retinanet": DENSE,
    "fcos": [*DENSE, "head.ctrness"],
    "atss": [*DENSE, "head.ctrness"],
    "gfl": DENSE,
    "reppoints": ["head.init_points", "head.refine_points", "head.cls_score"],
    "rtmdet": UNREAD + PER_LEVEL,
    "rtmdet_ins": [
        *(UNREAD + PER_LEVEL),
        *(f"head.kernel_pred.{k}" for k in range(3)),
        "head.prototypes",
    ],
    "yolox": UNREAD + PER_LEVEL + [f"head.objectness.{k}" for k in range(3)],
    **dict.fromkeys(("yolov5", "yolov7"), UNREAD + [f"head.predictors.{k}" for k in range(3)]),
    "semantic": ["sem_seg_head.predictor"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_predictors_keep_their_precision(family: str) -> None:
    model = tiny_model(family)
    found = layer_graph(model)
    layers = {name for name, x in model.named_modules() if isinstance(x, LAYERS)}
    assert layers - set(found.layers) == set(FLOAT[family])
    assert len({x.name for x in found.sites}) == len(found.sites)
    modules = dict(model.named_modules())
    assert all(x.module in modules for x in found.sites)


def test_the_network_is_not_changed() -> None:
    model = tiny_model("faster", norm="BN")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    layer_graph(model)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and all(x.training for x in model.modules())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    hooks = [x for m in model.modules() for x in (m._forward_hooks, m._forward_pre_hooks)]
    assert not any(hooks)


class Backbone(nn.Module):
    size_divisibility = 32


class Network(nn.Module):
    """A network with the call of a detectron2 network."""

    def __init__(self, **layers: nn.Module):
        super().__init__()
        self.backbone = Backbone()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        return self.run(batched_inputs[0]["image"][None])

    def run(self, x: Tensor) -> Any:
        raise NotImplementedError


def conv(inputs: int = 2, **kw: Any) -> Conv2d:
    return Conv2d(inputs, 2, 1, **kw)


def named(graph: LayerGraph) -> dict[str, bool]:
    """Names of the sites, with True for those that are rectified."""
    return {site.name: site.rectified for site in graph.sites}


def test_a_relu_alone_makes_a_tensor_rectified() -> None:
    class Chain(Network):
        def run(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu_(self.a(x)), 2)
            y = self.b(x)
            z = self.c(F.relu(y))
            return self.last(F.silu(z) + y)

    model = Chain(a=conv(3), b=conv(), c=conv(), last=conv())
    found = layer_graph(model)
    assert found.layers == ("a", "b", "c")
    assert named(found) == {
        "a.input": False,
        "a.output": True,  # only a ReLU reads it, and after a pool its values are the same
        "b.output": False,  # a sum reads it, too
        "c.input": False,  # which is why the ReLU of it is another tensor
        "c.output": False,
    }


def test_a_norm_that_can_be_folded_ends_a_layer() -> None:
    class Norms(Network):
        def run(self, x: Tensor) -> Tensor:
            x = self.grouped(self.inside(x))
            return self.last(F.relu(self.frozen(self.after(self.shared(x)))) + self.shared(x))

    model = Norms(
        inside=conv(3, norm=get_norm("BN", 2), activation=F.silu),
        grouped=conv(norm=nn.GroupNorm(1, 2), activation=F.relu),
        shared=conv(activation=F.relu),
        after=nn.Conv2d(2, 2, 1),
        frozen=get_norm("FrozenBN", 2),
        last=conv(),
    )
    assert named(layer_graph(model)) == {
        "inside.input": False,
        "inside.norm.output": False,
        "grouped.input": False,
        "grouped.norm.input": False,
        "shared.input": False,
        "shared.output": False,  # its ReLU is inside
        "frozen.output": True,
    }


def test_layers_with_another_activation_inside_keep_their_precision() -> None:
    class Inside(Network):
        def run(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x)))

    model = Inside(first=conv(3), middle=conv(activation=F.silu), last=conv())
    assert layer_graph(model).layers == ("first",)


def test_positions_do_not_connect_layers() -> None:
    """The first points of RepPoints say where a later layer reads: they are predictions."""
    found = layer_graph(tiny_model("reppoints"))
    assert "head.init_points" not in found.layers and "head.init_conv" in found.layers


def test_a_network_without_inner_layers() -> None:
    class One(Network):
        def run(self, x: Tensor) -> Tensor:
            return self.only(x)

    assert layer_graph(One(only=conv(3))) == LayerGraph((), ())
    assert Site("a", is_input=True).name == "a.input"

"""Layers of a network that integers can compute, found by how they are connected.

The network runs once on noise, and autograd then knows which operation reads which tensor. So no
layer has to be named for any architecture.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import DeformConv2d

LAYERS = nn.Conv2d, nn.Linear
FOLDED = _BatchNorm, FrozenBatchNorm2d
"""Norms that are a factor and a bias per channel in evaluation, and so a part of a layer."""
RELU, MAX_POOL = "ReluBackward0", "MaxPool2DWithIndicesBackward0"
SIDE = 128  # pixels of the noise, at least

Node = Any
"""An operation in autograd's graph."""


class Site(NamedTuple):
    """A tensor to quantize.

    Attributes:
        module: name of the module that has the tensor.
        is_input: True for the input of the module, False for its output.
        rectified: True if only ReLUs read the tensor, so that negative values do not count.
    """

    module: str
    is_input: bool
    rectified: bool = False

    @property
    def name(self) -> str:
        return f"{self.module}.{'input' if self.is_input else 'output'}"


class LayerGraph(NamedTuple):
    """Layers that integers compute.

    Attributes:
        layers: names of convolutions and linear layers.
        sites: inputs and outputs of these layers. An input that is the output of another of them
            is not repeated.
    """

    layers: tuple[str, ...]
    sites: tuple[Site, ...]


@dataclass
class Call:
    """A call of a layer in a forward pass.

    Attributes:
        layer: name of the layer.
        source: node of its input, or None if that depends on no other layer.
        site: the place of its output, after a norm that can be folded.
        result: node of that output; None until it is known.
    """

    layer: str
    source: Node
    site: Site
    result: Node = None

    def end(self, site: Site, x: Tensor) -> None:
        self.site, self.result = site, x.grad_fn


def layer_graph(model: nn.Module) -> LayerGraph:
    """Return the layers of a detectron2 network that integers can compute.

    These are the convolutions and linear layers whose outputs other layers read. So the last
    layers, which predict scores, boxes and masks, keep their precision. Layers that inference does
    not run are left out, too.
    """
    calls = recorded_calls(model)
    owners = {call.result: call for call in calls}
    readers = readers_of(calls, owners)
    layers = dict.fromkeys(call.layer for call in calls if call.result in readers)
    relus: dict[Site, bool] = defaultdict(lambda: True)
    for node, names in readers.items():
        relus[owners[node].site] &= names == {RELU}
    sites = {site._replace(rectified=relu): None for site, relu in relus.items()}
    for call in calls:
        if call.layer in layers and not on_grid(call.source, owners, relus):
            sites[Site(call.layer, is_input=True)] = None
    return LayerGraph(tuple(layers), tuple(sites))


def on_grid(source: Node, owners: Mapping[Node, Call], relus: Mapping[Site, bool]) -> bool:
    """Return True if an input has no other values than the quantized output of a layer.

    Args:
        source: node of the input.
        owners: the calls by the nodes of their outputs.
        relus: by the places of the quantized outputs, True if these are rectified.
    """
    rectified = False
    while source is not None and source not in owners and source.name() in (RELU, MAX_POOL):
        rectified |= source.name() == RELU
        source = source.next_functions[0][0]
    call = owners.get(source)
    return call is not None and call.site in relus and (relus[call.site] or not rectified)


def readers_of(calls: Sequence[Call], owners: Mapping[Node, Call]) -> dict[Node, set[str]]:
    """Return the operations that read the output of a layer on the way to another layer.

    Args:
        calls: all calls of layers.
        owners: the calls by the nodes of their outputs.

    Returns:
        Names of operations by the node of an output. Outputs that lead to no layer are left out.
    """
    readers: dict[Node, set[str]] = defaultdict(set)
    edges = [(call.layer, call.source) for call in calls]
    seen: set[Node] = set()
    while edges:
        reader, node = edges.pop()
        if node in owners:
            readers[node].add(reader)
        elif node is not None and node not in seen:
            seen.add(node)
            edges += [(node.name(), below) for below, _ in node.next_functions]
    return dict(readers)


# ---- The forward pass.


def recorded_calls(model: nn.Module) -> list[Call]:
    """Run a copy of the network on noise, and return the calls of its layers in their order."""
    copy: Any = deepcopy(model).eval().requires_grad_(True)
    calls: list[Call] = []
    for name, module in copy.named_modules():
        if isinstance(module, ROIPooler | DeformConv2d):
            module.register_forward_pre_hook(without_positions)
        elif isinstance(module, FOLDED):
            module.register_forward_hook(norm_recorder(calls, name))
        elif isinstance(module, LAYERS) and ends_before_activation(module):
            record_layer(calls, name, module)
    side = max(SIDE, 2 * copy.backbone.size_divisibility)
    noise = 255 * torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        copy([{"image": noise.requires_grad_()}])
    return calls


def ends_before_activation(layer: nn.Module) -> bool:
    """Return True unless a layer has an activation inside that cannot follow integers."""
    if not isinstance(layer, Conv2d) or layer.norm is not None:
        return True
    activation = layer.activation
    return activation in (None, F.relu, F.relu_, torch.relu) or isinstance(activation, nn.ReLU)


def record_layer(calls: list[Call], name: str, layer: nn.Module) -> None:
    """Let a layer append its calls.

    detectron2's ``Conv2d`` may have a norm inside. If that cannot be folded, the output of the
    layer is the input of the norm.
    """

    own = Site(name, is_input=False)

    def start(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append(Call(name, args[0].grad_fn, own))

    def before_norm(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls[-1].end(Site(f"{name}.norm", is_input=True), args[0])

    def end(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if calls[-1].result is None:
            calls[-1].end(own, output)

    layer.register_forward_pre_hook(start)
    norm = getattr(layer, "norm", None)
    if norm is not None and not isinstance(norm, FOLDED):
        norm.register_forward_pre_hook(before_norm)
    layer.register_forward_hook(end)


def norm_recorder(calls: list[Call], name: str) -> Callable[..., None]:
    """Return a hook by which a norm becomes the end of the layer before it."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inside = [x for x in calls[-1:] if x.result is None]  # detectron2's Conv2d has it
        before = args[0].grad_fn
        for call in inside or [x for x in calls if x.result is before is not None]:
            call.end(Site(name, is_input=False), output)

    return hook


def without_positions(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cut the gradient of the positions at which features are sampled: they are predictions."""
    features, positions, *others = args
    if isinstance(positions, Tensor):
        return features, positions.detach(), *others
    return features, [Boxes(x.tensor.detach()) for x in positions], *others

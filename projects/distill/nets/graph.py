"""Networks from tables of layers, and detectron2 backbones made of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from .blocks import Block, ConvStyle

COARSEST = 32
"""Largest stride of the networks here, to whose multiples images are padded."""


class Layer(NamedTuple):
    """A row of a table of layers.

    Attributes:
        name: name of the layer and of its output. That of an output of a backbone ends with log2 of
            its stride, as "p3".
        block: builder of the layer.
        channels: output channels at width 1; 0: as many as the input has.
        repeats: repeats inside the block at depth 1.
        inputs: names of the maps that are concatenated along the channels; empty: the row above.
    """

    name: str
    block: Block
    channels: int = 0
    repeats: int = 1
    inputs: tuple[str, ...] = ()


class Scaling(NamedTuple):
    """Multiples of depth and width.

    Attributes:
        depth: multiple of the repeats, which are rounded (half to even) and at least 1.
        width: multiple of the channels.
        divisor: channels are rounded up to a multiple of it; 1: they are rounded down.
    """

    depth: float = 1.0
    width: float = 1.0
    divisor: int = 1

    def channels(self, at_width_1: int) -> int:
        scaled = at_width_1 * self.width
        if self.divisor == 1:
            return max(int(scaled), 2)  # CSP layers halve them
        return math.ceil(scaled / self.divisor) * self.divisor

    def repeats(self, at_depth_1: int) -> int:
        return max(round(at_depth_1 * self.depth), 1)


class Graph(nn.ModuleDict):
    """Layers by name, run in the order of a table.

    Args:
        table: the layers.
        inputs: channels of the maps that :meth:`forward` gets, by name.
        scaling: multiples of depth and width.
        style: style of the convolutions.
        exposed: names of layers of one convolution whose output before norm and activation is a map
            too, "conv_p3" of a layer "p3".

    Attributes:
        channels: channels of every map by name, with those of the inputs.
    """

    def __init__(
        self,
        table: Sequence[Layer],
        inputs: Mapping[str, int],
        scaling: Scaling,
        style: ConvStyle,
        exposed: Sequence[str] = (),
    ):
        super().__init__()
        self.channels = dict(inputs)
        self.sources: dict[str, tuple[str, ...]] = {}
        above = next(iter(inputs))
        for layer in table:
            sources = layer.inputs or (above,)
            before = sum(self.channels[name] for name in sources)
            after = scaling.channels(layer.channels) if layer.channels else before
            self[layer.name] = layer.block(before, after, scaling.repeats(layer.repeats), style)
            self.channels[layer.name] = after
            self.sources[layer.name] = sources
            above = layer.name
        self.exposed = {name: f"conv_{name}" for name in exposed}
        self.channels |= {inner: self.channels[name] for name, inner in self.exposed.items()}

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the maps (N, C, H, W) of all layers by name, with the inputs."""
        maps = dict(maps)
        for name, sources in self.sources.items():
            parts = [maps[source] for source in sources]
            x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            if name in self.exposed:
                maps[self.exposed[name]], maps[name] = _in_two_steps(self[name], x)
            else:
                maps[name] = self[name](x)
        return maps


def _in_two_steps(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maps of a convolution and of the whole layer (:meth:`ConvStyle.conv`)."""
    inner = layer.conv(x)
    normalized = layer.norm(inner)
    # The activation works in place, and without a norm both are one tensor.
    return inner, layer.act(normalized.clone() if normalized is inner else normalized)


class GraphBackbone(Backbone):
    """A backbone from a table of layers, or a neck from a table on top of another backbone.

    Images are padded to multiples of 32, or to a square.

    Args:
        graph: the layers. They read a map "image", or the outputs of ``bottom_up``.
        out_features: names of the outputs.
        bottom_up: backbone of which ``graph`` is the neck.
        shallow_features: names of shallow maps by the names of the deep ones, see
            :class:`~distill.nets.PAFPN`. These are outputs too.
        square_pad: side in pixels of the square that images are padded to, at least that of the
            largest image; 0: multiples of 32.
    """

    def __init__(
        self,
        graph: Graph,
        out_features: Sequence[str],
        *,
        bottom_up: Backbone | None = None,
        shallow_features: Mapping[str, str] | None = None,
        square_pad: int = 0,
    ):
        super().__init__()
        self.bottom_up = bottom_up
        self.graph = graph
        self.shallow_features = dict(shallow_features or {})
        """Name of the shallow map of each level, by the name of the deep map."""
        deep = (k for k in self.shallow_features if k not in out_features)
        self.inner_features = (*deep, *graph.exposed.values())
        """Maps inside the neck, which methods compare only by name."""
        self.square_pad = square_pad
        # Heads pair the last maps of a stride, which are therefore the outputs of the neck.
        levels = (*self.shallow_features.values(), *self.inner_features, *out_features)
        self._out_features = list(dict.fromkeys(levels))
        self._out_feature_channels = {name: graph.channels[name] for name in self._out_features}
        self._out_feature_strides = {name: 2 ** int(name[-1]) for name in self._out_features}

    @property
    def size_divisibility(self) -> int:
        return COARSEST

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": COARSEST, "square_size": self.square_pad}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return all outputs by name, (N, C, H / stride, W / stride), for images (N, 3, H, W)."""
        maps = self.graph({"image": x} if self.bottom_up is None else self.bottom_up(x))
        return {name: maps[name] for name in self._out_features}

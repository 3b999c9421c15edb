"""Blocks of YOLO networks: convolutions with norm and activation, CSP layers, pools and stems.

A block is a function that builds a module. Its arguments are the channels before and after the
module, the number of repeats, and the style of the convolutions. These start with PyTorch's own
initialization.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import get_norm
from torch import Tensor, nn

Activation = Callable[[], nn.Module]
"""Builder of an activation."""


def silu() -> nn.Module:
    """Build an activation x · sigmoid(x) that works in place."""
    return nn.SiLU(inplace=True)


def mish() -> nn.Module:
    """Build an activation x · tanh(log(1 + exp(x))) that works in place."""
    return nn.Mish(inplace=True)


def leaky_relu() -> nn.Module:
    """Build a leaky ReLU with the slope 0.1 that works in place."""
    return nn.LeakyReLU(0.1, inplace=True)


@dataclass(frozen=True)
class ConvStyle:
    """Norm and activation of the convolutions of a network.

    Attributes:
        norm: a name of :func:`detectron2.layers.get_norm`; "": a bias instead of a norm.
        eps, momentum: values of batch norms, in PyTorch's convention.
        activation: function that builds an activation.
        depthwise: True if :meth:`spatial` convolutions are depthwise separable.
    """

    norm: str = "BN"
    eps: float = 1e-5
    momentum: float = 0.1
    activation: Activation = silu
    depthwise: bool = False

    @property
    def dense(self) -> "ConvStyle":
        """The same style without depthwise separable convolutions."""
        return replace(self, depthwise=False)

    def build_norm(self, channels: int) -> nn.Module:
        """Build a norm, or the identity if there is no norm."""
        norm = get_norm(self.norm, channels)
        if norm is None:
            return nn.Identity()
        if hasattr(norm, "momentum"):
            norm.momentum = self.momentum
        if hasattr(norm, "eps"):
            norm.eps = self.eps
        return norm

    def conv(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
    ) -> nn.Sequential:
        """Build convolution, norm and activation, as modules ``conv``, ``norm`` and ``act``.

        Args:
            padding: by default half the kernel, so that stride 1 keeps the size.
        """
        pad = kernel // 2 if padding is None else padding
        conv = nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups, bias=not self.norm)
        parts = {"conv": conv, "norm": self.build_norm(outputs), "act": self.activation()}
        return nn.Sequential(OrderedDict(parts))

    def plain(self, inputs: int, outputs: int) -> nn.Conv2d:
        """Build a 1x1 convolution whose norm comes later, so that it has no bias."""
        return nn.Conv2d(inputs, outputs, 1, bias=not self.norm)

    def norm_act(self, channels: int) -> nn.Sequential:
        """Build norm and activation without a convolution."""
        return nn.Sequential(self.build_norm(channels), self.activation())

    def separable(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1
    ) -> nn.Sequential:
        """Build a depthwise and a 1x1 convolution, each with norm and activation."""
        depthwise = self.conv(inputs, inputs, kernel, stride, groups=inputs)
        return nn.Sequential(depthwise, self.conv(inputs, outputs))

    def spatial(self, inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
        """Build a 3x3 convolution, which ``depthwise`` makes separable."""
        if self.depthwise:
            return self.separable(inputs, outputs, stride=stride)
        return self.conv(inputs, outputs, 3, stride)


Block = Callable[[int, int, int, ConvStyle], nn.Module]
"""Builder of a module from input channels, output channels, repeats and style."""


def conv(kernel: int, stride: int = 1, padding: int | None = None) -> Block:
    """Return the block of one convolution, which is never depthwise."""
    return lambda inputs, outputs, _, style: style.conv(
        inputs, outputs, kernel, stride, padding=padding
    )


def down(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
    """Build a 3x3 convolution of stride 2."""
    return style.spatial(inputs, outputs, stride=2)


def upsample(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
    """Build a nearest-neighbour upsampling by 2, which keeps the channels."""
    return nn.Upsample(scale_factor=2, mode="nearest")


class Residual(nn.Module):
    """A branch that is added to its input.

    Args:
        branch: module that keeps the shape.
    """

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def bottleneck(channels: int, style: ConvStyle) -> nn.Module:
    """Build the branch of YOLO's CSP layers: convolutions 1x1 and 3x3."""
    return nn.Sequential(style.conv(channels, channels), style.spatial(channels, channels))


def large_kernel(channels: int, style: ConvStyle) -> nn.Module:
    """Build the branch of CSPNeXt's layers: convolutions 3x3 and separable 5x5."""
    convs = style.spatial(channels, channels), style.separable(channels, channels, 5)
    return nn.Sequential(*convs)


class ChannelAttention(nn.Module):
    """Factor in [0, 1] per channel: a hard sigmoid of a linear layer of the channels' means."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class CSPLayer(nn.Module):
    """Cross stage partial layer (Wang et al., CSPNet): two halves, one of them with a subnet.

    Args:
        main: module before the subnet.
        short: module of the other half.
        blocks: the subnet.
        last: module on the concatenated halves.
        attention: module on them before ``last``.
    """

    def __init__(
        self,
        *,
        main: nn.Module,
        short: nn.Module,
        blocks: nn.Module,
        last: nn.Module,
        attention: nn.Module | None = None,
    ):
        super().__init__()
        self.main = main
        self.short = short
        self.blocks = blocks
        self.attention = nn.Identity() if attention is None else attention
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.cat([self.blocks(self.main(x)), self.short(x)], 1)
        return self.last(self.attention(halves))


def csp(
    branch: Callable[[int, ConvStyle], nn.Module], residual: bool = True, attention: bool = False
) -> Block:
    """Return the block of a CSP layer (YOLO's C3, CSPNeXt's layer).

    Args:
        branch: builder of each repeated branch: :func:`bottleneck` or :func:`large_kernel`.
        residual: True if a branch is added to its input.
        attention: True for a :class:`ChannelAttention`.
    """

    def build(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
        half = outputs // 2
        branches = [branch(half, style) for _ in range(repeats)]
        return CSPLayer(
            blocks=nn.Sequential(*(Residual(x) if residual else x for x in branches)),
            attention=ChannelAttention(2 * half) if attention else None,
            main=style.conv(inputs, half),
            short=style.conv(inputs, half),
            last=style.conv(2 * half, outputs),
        )

    return build


def narrow(inputs: int, outputs: int, style: ConvStyle) -> nn.Sequential:
    """Build Darknet's branch: convolutions 1x1 to half of the output channels, and 3x3."""
    half = outputs // 2
    return nn.Sequential(style.conv(inputs, half), style.spatial(half, outputs))


def darknet(residual: bool = True) -> Block:
    """Return the block of a stage of Darknet-53: :func:`narrow` branches.

    Args:
        residual: True if a branch is added to its input, so that the block keeps the channels.
    """

    def build(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
        branches = [narrow(a, b, style) for a, b in pairwise([inputs] + [outputs] * repeats)]
        return nn.Sequential(*(Residual(x) if residual else x for x in branches))

    return build


def darknet_csp(first: bool = False) -> Block:
    """Return the block of a stage of CSPDarknet53: a CSP layer whose subnet ends with a 1x1.

    Args:
        first: True for the first stage, whose halves have all channels and whose branches are
            :func:`narrow`.
    """

    def build(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
        half = outputs if first else outputs // 2
        branches = (
            narrow(half, half, style) if first else bottleneck(half, style) for _ in range(repeats)
        )
        return CSPLayer(
            main=style.conv(inputs, half),
            short=style.conv(inputs, half),
            blocks=nn.Sequential(nn.Sequential(*map(Residual, branches)), style.conv(half, half)),
            last=style.conv(2 * half, outputs),
        )

    return build


def norm_csp(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
    """Build a stage of YOLOv4-CSP: a CSP layer with one norm for both halves."""
    half = outputs // 2
    branches = (Residual(bottleneck(half, style)) for _ in range(repeats))
    return CSPLayer(
        main=style.conv(inputs, half),
        short=style.plain(inputs, half),
        blocks=nn.Sequential(nn.Sequential(*branches), style.plain(half, half)),
        last=nn.Sequential(style.norm_act(2 * half), style.conv(2 * half, outputs)),
    )


def norm_csp_neck(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
    """Build a layer of YOLOv4-CSP's neck: both halves read the output of one convolution."""
    layer = CSPLayer(
        main=nn.Identity(),
        short=style.plain(outputs, outputs),
        blocks=nn.Sequential(*(bottleneck(outputs, style) for _ in range(repeats))),
        last=nn.Sequential(style.norm_act(2 * outputs), style.conv(2 * outputs, outputs)),
    )
    return nn.Sequential(style.conv(inputs, outputs), layer)


def chain(inputs: int, outputs: int, convs: int, style: ConvStyle) -> nn.Sequential:
    """Build convolutions that are 1x1 and 3x3 in turn; the 3x3 have twice the output channels.

    Args:
        convs: number of convolutions, an odd one.
    """
    layers, before = [], inputs
    for k in range(convs):
        layers.append(style.spatial(before, 2 * outputs) if k % 2 else style.conv(before, outputs))
        before = 2 * outputs if k % 2 else outputs
    return nn.Sequential(*layers)


def five_convs(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
    """Build a layer of YOLOv4's neck, a :func:`chain` of five convolutions."""
    return chain(inputs, outputs, 5, style)


class ELAN(nn.Module):
    """Efficient layer aggregation (Wang et al., "YOLOv7", Fig. 2c).

    Stages follow each other. The maps of all of them, and of two 1x1 convolutions of the input, are
    concatenated, the last one first.

    Args:
        inputs, outputs: channels.
        branch: channels of the two 1x1 convolutions.
        width: channels of a stage.
        stages: number of stages.
        convs: 3x3 convolutions in a stage.
        style: style of the convolutions.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        branch: int,
        width: int,
        stages: int,
        convs: int,
        style: ConvStyle,
    ):
        super().__init__()
        self.short = style.conv(inputs, branch)
        self.main = style.conv(inputs, branch)
        channels = [branch] + [width] * (stages * convs)
        layers = [style.spatial(a, b) for a, b in pairwise(channels)]
        self.stages = nn.ModuleList(
            nn.Sequential(*layers[k : k + convs]) for k in range(0, len(layers), convs)
        )
        self.last = style.conv(2 * branch + stages * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.short(x), self.main(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return self.last(torch.cat(maps[::-1], 1))


def elan(branch: float, width: float, convs: int = 1) -> Block:
    """Return the block of an :class:`ELAN` whose stages are the repeats of its row.

    Args:
        branch, width: channels over the output channels.
        convs: 3x3 convolutions in a stage.
    """
    return lambda inputs, outputs, repeats, style: ELAN(
        inputs,
        outputs,
        branch=int(outputs * branch),
        width=int(outputs * width),
        stages=repeats,
        convs=convs,
        style=style,
    )


def pool(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
    """Build a maximum over 2x2 cells of stride 2, which keeps the channels."""
    return nn.MaxPool2d(2)


class PoolDown(nn.Module):
    """YOLOv7's downsampling: a strided convolution next to a maximum over 2x2 cells.

    Args:
        inputs, outputs: channels; each part has half of the outputs.
        style: style of the convolutions.
    """

    def __init__(self, inputs: int, outputs: int, style: ConvStyle):
        super().__init__()
        half = outputs // 2
        self.pooled = nn.Sequential(nn.MaxPool2d(2), style.conv(inputs, half))
        self.strided = nn.Sequential(style.conv(inputs, half), style.spatial(half, half, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.strided(x), self.pooled(x)], 1)


def pool_down(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
    """Build a :class:`PoolDown`."""
    return PoolDown(inputs, outputs, style)


class RepConv(nn.Module):
    """Sum of a 3x3 and a 1x1 convolution, each with a norm, then the activation.

    It is RepVGG's layer (Ding et al.) without the identity, as YOLOv7 uses it. :meth:`fused` is one
    convolution with the same output.
    """

    def __init__(self, inputs: int, outputs: int, style: ConvStyle):
        super().__init__()
        self.spatial = nn.Conv2d(inputs, outputs, 3, padding=1, bias=not style.norm)
        self.spatial_norm = style.build_norm(outputs)
        self.point = style.plain(inputs, outputs)
        self.point_norm = style.build_norm(outputs)
        self.act = style.activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.spatial_norm(self.spatial(x)) + self.point_norm(self.point(x)))

    @torch.no_grad()
    def fused(self) -> nn.Module:
        """Return a 3x3 convolution and the activation, for inference.

        Norms without running statistics cannot be fused: then it is this layer.
        """
        if not all(
            isinstance(x, nn.Identity) or hasattr(x, "running_var")
            for x in (self.spatial_norm, self.point_norm)
        ):
            return self
        weight, bias = _folded(self.spatial, self.spatial_norm)
        point, shift = _folded(self.point, self.point_norm)
        conv = nn.Conv2d(self.spatial.in_channels, len(weight), 3, padding=1)
        conv.to(weight).load_state_dict(
            {"weight": weight + F.pad(point, (1, 1, 1, 1)), "bias": bias + shift}
        )
        return nn.Sequential(OrderedDict(conv=conv, act=self.act))


def rep_conv(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
    """Build a :class:`RepConv`."""
    return RepConv(inputs, outputs, style)


def _folded(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Any]:
    """Return weight and bias of a convolution with its norm in evaluation mode."""
    if isinstance(norm, nn.Identity):
        return conv.weight, conv.bias
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


class Pyramid(nn.Module):
    """A map next to its maxima over 5x5, 9x9 and 13x13 cells.

    Three chained 5x5 pools have the same values as pools of these sizes.

    Args:
        descending: True to put the largest pool first and the map itself last.
    """

    def __init__(self, descending: bool = False):
        super().__init__()
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.descending = descending

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return torch.cat(maps[::-1] if self.descending else maps, 1)


class SPPF(nn.Module):
    """Spatial pyramid pooling: two 1x1 convolutions around a :class:`Pyramid`.

    YOLOX and RTMDet pool over 5x5, 9x9 and 13x13 cells, which has the same values and parameters.
    """

    def __init__(self, inputs: int, outputs: int, style: ConvStyle):
        super().__init__()
        half = inputs // 2
        self.first = style.conv(inputs, half)
        self.pyramid = Pyramid()
        self.last = style.conv(4 * half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pyramid(self.first(x)))


def sppf(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
    """Build an :class:`SPPF`."""
    return SPPF(inputs, outputs, style)


def spp_convs(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
    """Build YOLOv4's pooling: a :class:`Pyramid` between two :func:`chain` of three."""
    after = chain(4 * outputs, outputs, 3, style)
    return nn.Sequential(chain(inputs, outputs, 3, style), Pyramid(descending=True), after)


def spp_csp(norm: bool) -> Block:
    """Return the pooling of YOLOv4-CSP and of YOLOv7: a CSP layer around a :class:`Pyramid`.

    Args:
        norm: True for one norm of both halves (YOLOv4-CSP), False for one of each (YOLOv7).
    """

    def build(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
        first, middle = style.conv(inputs, outputs), style.spatial(outputs, outputs)
        after = style.conv(4 * outputs, outputs), style.spatial(outputs, outputs)
        last = style.conv(2 * outputs, outputs)
        return CSPLayer(
            main=nn.Sequential(first, middle, style.conv(outputs, outputs)),
            short=style.plain(inputs, outputs) if norm else style.conv(inputs, outputs),
            blocks=nn.Sequential(Pyramid(), *after),
            last=nn.Sequential(style.norm_act(2 * outputs), last) if norm else last,
        )

    return build


def spp_tiny(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
    """Build the pooling of YOLOv7-tiny: a CSP layer around a :class:`Pyramid`."""
    pools = Pyramid(descending=True)
    return CSPLayer(
        main=style.conv(inputs, outputs),
        short=style.conv(inputs, outputs),
        blocks=nn.Sequential(pools, style.conv(4 * outputs, outputs)),
        last=style.conv(2 * outputs, outputs),
    )


class Focus(nn.Module):
    """YOLOX's stem: the four pixels of each 2x2 square as channels, then a 3x3 convolution."""

    def __init__(self, inputs: int, outputs: int, style: ConvStyle):
        super().__init__()
        self.conv = style.conv(4 * inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[..., dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)]
        return self.conv(torch.cat(corners, 1))


def focus(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
    """Build a :class:`Focus`."""
    return Focus(inputs, outputs, style)

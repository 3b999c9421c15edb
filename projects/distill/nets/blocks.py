"""Blocks of YOLO networks: convolutions with norm and activation, CSP layers, pools and stems.

A block is a function that builds a module. Its arguments are the channels before and after the
module, the number of repeats, and the style of the convolutions. These start with PyTorch's own
initialization.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from detectron2.layers import get_norm
from torch import Tensor, nn


def silu() -> nn.Module:
    """Build an activation x · sigmoid(x) that works in place."""
    return nn.SiLU(inplace=True)


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
    activation: Callable[[], nn.Module] = silu
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
        inputs, outputs: channels.
        blocks: the subnet, which keeps ``outputs`` // 2 channels.
        attention: module on both halves before the last convolution.
        style: style of the convolutions.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        blocks: nn.Module,
        attention: nn.Module,
        style: ConvStyle,
    ):
        super().__init__()
        half = outputs // 2
        self.main = style.conv(inputs, half)
        self.short = style.conv(inputs, half)
        self.blocks = blocks
        self.attention = attention
        self.last = style.conv(2 * half, outputs)

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
            inputs,
            outputs,
            blocks=nn.Sequential(*(Residual(x) if residual else x for x in branches)),
            attention=ChannelAttention(2 * half) if attention else nn.Identity(),
            style=style,
        )

    return build


class SPPF(nn.Module):
    """Spatial pyramid pooling: the map next to its maxima over 5x5, 9x9 and 13x13 cells.

    Three chained 5x5 pools have the same values as pools of these sizes, which YOLOX and RTMDet
    use. The parameters are the same too.
    """

    def __init__(self, inputs: int, outputs: int, style: ConvStyle):
        super().__init__()
        half = inputs // 2
        self.first = style.conv(inputs, half)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.last = style.conv(4 * half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.first(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.last(torch.cat(maps, 1))


def sppf(inputs: int, outputs: int, repeats: int, style: ConvStyle) -> nn.Module:
    """Build an :class:`SPPF`."""
    return SPPF(inputs, outputs, style)


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

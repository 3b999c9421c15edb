"""Literal forwards of the released networks, from tensors by their authors' names.

They follow the block lists of the papers and of the released files, layer by layer, without a
module. A tensor is drawn when a forward asks for it first. So a forward also lists the names and
shapes of all tensors of its network.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = (8, 16, 32)
Maps = list[list[Tensor]]


class Released:
    """Tensors of a network, and the layers that all of these networks have.

    Args:
        eps: ε of batch norms.
        depth, width: multiples of blocks and channels.
        device: "meta" to list names and shapes only.
    """

    def __init__(self, eps: float, depth: float, width: float, device: str = "cpu"):
        self.eps, self.depth, self.width, self.device = eps, depth, width, device
        self.generator = torch.Generator().manual_seed(0)
        self.state: dict[str, Tensor] = {}

    def draw(self, *shape: int) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, device="meta")
        return torch.randn(shape, generator=self.generator)

    def kernel(self, out: int, inputs: int, k: int) -> Tensor:
        return self.draw(out, inputs, k, k) * math.sqrt(2 / (inputs * k * k))

    def keep(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if name not in self.state:
            self.state[name] = make()
        return self.state[name]

    def shared(self, name: str, original: str) -> None:
        """Give the tensors of a layer a second name, as modules in two places have."""
        same = {k: x for k, x in self.state.items() if k.startswith(f"{original}.")}
        self.state |= {name + k.removeprefix(original): x for k, x in same.items()}

    def times(self, blocks: int) -> int:
        return max(round(blocks * self.depth), 1)

    def conv(self, name: str, x: Tensor, out: int, k: int = 1, bias: bool = True) -> Tensor:
        weight = self.keep(f"{name}.weight", lambda: self.kernel(out, x.shape[1], k))
        bias_of = self.keep(f"{name}.bias", lambda: self.draw(out)) if bias else None
        return F.conv2d(x, weight, bias_of, padding=k // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Normalize with statistics that are near those of the first input, as after a training.

        The variance is not too small: pools make small maps constant, which rounding would spoil.
        """
        c = x.shape[1]
        mean = self.keep(f"{name}.running_mean", lambda: x.mean((0, 2, 3)) + 0.1 * self.draw(c))
        var = self.keep(f"{name}.running_var", lambda: x.var((0, 2, 3)).clamp(min=0.1))
        weight = self.keep(f"{name}.weight", lambda: 1 + 0.3 * self.draw(c))
        bias = self.keep(f"{name}.bias", lambda: 0.3 * self.draw(c))
        self.keep(f"{name}.num_batches_tracked", lambda: torch.tensor(7, device=self.device))
        return F.batch_norm(x, mean, var, weight, bias, eps=self.eps)

    def cbs(
        self,
        name: str,
        x: Tensor,
        out: int,
        k: int = 1,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
    ) -> Tensor:
        """Convolution, batch norm and SiLU: ``<name>.conv`` and ``<name>.bn``."""
        inputs = x.shape[1] // groups
        weight = self.keep(f"{name}.conv.weight", lambda: self.kernel(out, inputs, k))
        x = F.conv2d(x, weight, None, stride, k // 2 if padding is None else padding, 1, groups)
        return self.act(self.norm(f"{name}.bn", x))

    def act(self, x: Tensor) -> Tensor:
        return F.silu(x)


def cat(*maps: Tensor) -> Tensor:
    return torch.cat(maps, 1)


def up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def pools(x: Tensor) -> list[Tensor]:
    """Return the maxima over 5x5, 9x9 and 13x13 cells."""
    return [F.max_pool2d(x, k, 1, k // 2) for k in (5, 9, 13)]


# ---- YOLOX


class YOLOX(Released):
    """YOLOX; nano has depthwise convolutions."""

    def __init__(self, depth: float, width: float, depthwise: bool = False, device: str = "cpu"):
        super().__init__(1e-3, depth, width, device)
        self.depthwise = depthwise

    def any3x3(self, name: str, x: Tensor, out: int, stride: int = 1) -> Tensor:
        if not self.depthwise:
            return self.cbs(name, x, out, 3, stride)
        x = self.cbs(f"{name}.dconv", x, x.shape[1], 3, stride, groups=x.shape[1])
        return self.cbs(f"{name}.pconv", x, out)

    def csp(self, name: str, x: Tensor, out: int, blocks: int, add: bool = True) -> Tensor:
        main = self.cbs(f"{name}.conv1", x, out // 2)
        short = self.cbs(f"{name}.conv2", x, out // 2)
        for i in range(blocks):
            y = self.cbs(f"{name}.m.{i}.conv1", main, out // 2)
            y = self.any3x3(f"{name}.m.{i}.conv2", y, out // 2)
            main = main + y if add else y
        return self.cbs(f"{name}.conv3", cat(main, short), out)

    def forward(self, image: Tensor, classes: int) -> Maps:
        """Return class logits, raw boxes and objectness of each level."""
        b, n, p = int(64 * self.width), self.times(3), "backbone.backbone"
        rows = image[..., ::2, :], image[..., 1::2, :]
        corners = [row[..., x::2] for x in (0, 1) for row in rows]
        x = self.cbs(f"{p}.stem.conv", cat(*corners), b, 3)
        maps = []
        for k, blocks in ((2, n), (3, 3 * n), (4, 3 * n)):
            x = self.any3x3(f"{p}.dark{k}.0", x, b * 2 ** (k - 1), 2)
            x = self.csp(f"{p}.dark{k}.1", x, b * 2 ** (k - 1), blocks)
            maps.append(x)
        x = self.any3x3(f"{p}.dark5.0", x, 16 * b, 2)
        x = self.cbs(f"{p}.dark5.1.conv1", x, 8 * b)
        x = cat(x, *(F.max_pool2d(x, k, 1, k // 2) for k in (5, 9, 13)))
        x = self.cbs(f"{p}.dark5.1.conv2", x, 16 * b)
        x = self.csp(f"{p}.dark5.2", x, 16 * b, n, add=False)
        return self.head(self.neck(maps[1], maps[2], x, b, n), int(256 * self.width), classes)

    def neck(self, c3: Tensor, c4: Tensor, c5: Tensor, b: int, n: int) -> list[Tensor]:
        l5 = self.cbs("backbone.lateral_conv0", c5, 8 * b)
        t4 = self.csp("backbone.C3_p4", cat(up(l5), c4), 8 * b, n, add=False)
        l4 = self.cbs("backbone.reduce_conv1", t4, 4 * b)
        p3 = self.csp("backbone.C3_p3", cat(up(l4), c3), 4 * b, n, add=False)
        x = self.any3x3("backbone.bu_conv2", p3, 4 * b, 2)
        p4 = self.csp("backbone.C3_n3", cat(x, l4), 8 * b, n, add=False)
        x = self.any3x3("backbone.bu_conv1", p4, 8 * b, 2)
        return [p3, p4, self.csp("backbone.C3_n4", cat(x, l5), 16 * b, n, add=False)]

    def head(self, maps: list[Tensor], width: int, classes: int) -> Maps:
        found: Maps = [[], [], []]
        for k, x in enumerate(maps):
            x = self.cbs(f"head.stems.{k}", x, width)
            kinds, places = x, x
            for i in range(2):
                kinds = self.any3x3(f"head.cls_convs.{k}.{i}", kinds, width)
                places = self.any3x3(f"head.reg_convs.{k}.{i}", places, width)
            found[0].append(self.conv(f"head.cls_preds.{k}", kinds, classes))
            found[1].append(self.conv(f"head.reg_preds.{k}", places, 4))
            found[2].append(self.conv(f"head.obj_preds.{k}", places, 1))
        return found


# ---- YOLOv5


class Numbered(Released):
    """A network whose layers are numbered."""

    def __init__(self, depth: float, width: float, device: str = "cpu"):
        super().__init__(1e-3, depth, width, device)

    def channels(self, number: int) -> int:
        return math.ceil(number * self.width / 8) * 8

    def layer(self, k: int | str, x: Tensor, out: int, kernel: int = 1, stride: int = 1) -> Tensor:
        return self.cbs(f"model.{k}", x, self.channels(out), kernel, stride)

    def down(self, k: int, x: Tensor, out: int) -> Tensor:
        return self.layer(k, x, out, 3, 2)

    def bottlenecks(
        self, name: str, x: Tensor, out: int, number: int, add: bool, wide: bool = False
    ) -> Tensor:
        """Convolutions 1x1 and 3x3 of ``out`` channels; the first has half as many if not wide."""
        for i in range(number):
            one = name if number == 1 and not wide else f"{name}.{i}"
            y = self.cbs(f"{one}.cv1", x, out if wide else out // 2)
            y = self.cbs(f"{one}.cv2", y, out, 3)
            x = x + y if add else y
        return x

    def detect(self, k: int, maps: Sequence[Tensor], classes: int) -> Maps:
        """Return the outputs of the last layer, and keep the anchors in strides."""
        self.keep(f"model.{k}.anchors", lambda: self.anchors().to(self.device))
        out = 3 * (5 + classes)
        return [[self.conv(f"model.{k}.m.{i}", x, out) for i, x in enumerate(maps)]]

    @staticmethod
    def anchors() -> Tensor:
        pixels = (
            (10, 13, 16, 30, 33, 23),
            (30, 61, 62, 45, 59, 119),
            (116, 90, 156, 198, 373, 326),
        )
        return in_strides(pixels)


def in_strides(pixels: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(pixels).view(3, 3, 2) / torch.tensor(LEVELS).view(3, 1, 1)


class YOLOv5(Numbered):
    """YOLOv5, with C3 layers."""

    def c3(self, k: int, x: Tensor, out: int, blocks: int, add: bool = True) -> Tensor:
        name, half = f"model.{k}", self.channels(out) // 2
        main = self.cbs(f"{name}.cv1", x, half)
        short = self.cbs(f"{name}.cv2", x, half)
        for i in range(self.times(blocks)):
            y = self.cbs(f"{name}.m.{i}.cv2", self.cbs(f"{name}.m.{i}.cv1", main, half), half, 3)
            main = main + y if add else y
        return self.cbs(f"{name}.cv3", cat(main, short), 2 * half)

    def forward(self, image: Tensor, classes: int) -> Maps:
        """Return the outputs of the last layer, and keep the anchors in strides."""
        x = self.cbs("model.0", image, self.channels(64), 6, 2, padding=2)
        x = self.c3(2, self.down(1, x, 128), 128, 3)
        n4 = self.c3(4, self.down(3, x, 256), 256, 6)
        n6 = self.c3(6, self.down(5, n4, 512), 512, 9)
        x = self.c3(8, self.down(7, n6, 1024), 1024, 3)
        x = self.cbs("model.9.cv1", x, self.channels(1024) // 2)
        pools = [x]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        x = self.cbs("model.9.cv2", cat(*pools), self.channels(1024))
        n10 = self.cbs("model.10", x, self.channels(512))
        n13 = self.c3(13, cat(up(n10), n6), 512, 3, add=False)
        n14 = self.cbs("model.14", n13, self.channels(256))
        n17 = self.c3(17, cat(up(n14), n4), 256, 3, add=False)
        n20 = self.c3(20, cat(self.down(18, n17, 256), n14), 512, 3, add=False)
        n23 = self.c3(23, cat(self.down(21, n20, 512), n10), 1024, 3, add=False)
        return self.detect(24, (n17, n20, n23), classes)


# ---- YOLOv3


class YOLOv3(Numbered):
    """YOLOv3, or YOLOv3-SPP, whose repeats are fixed."""

    def __init__(self, depth: float, width: float, spp: bool = False, device: str = "cpu"):
        super().__init__(depth, width, device)
        self.spp = spp

    def stage(self, k: int, x: Tensor, out: int, number: int = 1, add: bool = True) -> Tensor:
        return self.bottlenecks(f"model.{k}", x, self.channels(out), number, add)

    def forward(self, image: Tensor, classes: int) -> Maps:
        x = self.layer(0, image, 32, 3)
        x = self.stage(2, self.down(1, x, 64), 64)
        x = self.stage(4, self.down(3, x, 128), 128, 2)
        n6 = self.stage(6, self.down(5, x, 256), 256, 8)
        n8 = self.stage(8, self.down(7, n6, 512), 512, 8)
        x = self.stage(10, self.down(9, n8, 1024), 1024, 4)
        x = self.stage(11, x, 1024, add=False)
        if self.spp:
            x = self.cbs("model.12.cv1", x, x.shape[1] // 2)
            x = self.layer("12.cv2", cat(x, *pools(x)), 512)
        else:
            x = self.layer(12, x, 512)
        n14 = self.layer(14, self.layer(13, x, 1024, 3), 512)
        n15 = self.layer(15, n14, 1024, 3)
        x = cat(up(self.layer(16, n14, 256)), n8)
        x = self.stage(20, self.stage(19, x, 512, add=False), 512, add=False)
        n21 = self.layer(21, x, 256)
        n22 = self.layer(22, n21, 512, 3)
        x = self.stage(26, cat(up(self.layer(23, n21, 128)), n6), 256, add=False)
        n27 = self.bottlenecks("model.27", x, self.channels(256), 2, False)
        return self.detect(28, (n27, n22, n15), classes)


# ---- YOLOv4


class YOLOv4(Released):
    """YOLOv4, whose layers have the numbers of Darknet, and its repeats."""

    def __init__(self, depth: float, width: float, device: str = "cpu"):
        super().__init__(1e-4, 1.0, width, device)
        self.act: Any = F.mish

    def layer(self, k: int, x: Tensor, out: int, kernel: int = 1, stride: int = 1) -> Tensor:
        """Convolution, batch norm and activation: ``Conv2d`` and ``BatchNorm2d``."""
        name = f"module_list.{k}"
        weight = self.keep(f"{name}.Conv2d.weight", lambda: self.kernel(out, x.shape[1], kernel))
        x = F.conv2d(x, weight, None, stride, kernel // 2)
        return self.act(self.norm(f"{name}.BatchNorm2d", x))

    def stage(self, k: int, x: Tensor, out: int, number: int) -> Tensor:
        """A CSP stage of a strided convolution ``k`` and what follows it."""
        half, inner = out if number == 1 else out // 2, out // 2
        x = self.layer(k, x, out, 3, 2)
        a, y = self.layer(k + 1, x, half), self.layer(k + 3, x, half)
        for i in range(number):
            first = k + 4 + 3 * i
            y = y + self.layer(first + 1, self.layer(first, y, inner), half, 3)
        y = self.layer(k + 4 + 3 * number, y, half)
        return self.layer(k + 6 + 3 * number, cat(y, a), out)

    def chain(self, k: int, x: Tensor, out: int, number: int) -> Tensor:
        for i in range(number):
            x = self.layer(k + i, x, *((2 * out, 3) if i % 2 else (out, 1)))
        return x

    def forward(self, image: Tensor, classes: int) -> Maps:
        c = [math.ceil(n * self.width / 8) * 8 for n in (32, 64, 128, 256, 512, 1024)]
        x = self.layer(0, image, c[0], 3)
        x = self.stage(11, self.stage(1, x, c[1], 1), c[2], 2)
        c3 = self.stage(24, x, c[3], 8)
        c4 = self.stage(55, c3, c[4], 8)
        c5 = self.stage(86, c4, c[5], 4)
        self.act = lambda x: F.leaky_relu(x, 0.1)
        x = self.chain(105, c5, c[4], 3)
        n5 = self.chain(114, cat(*pools(x)[::-1], x), c[4], 3)
        x = cat(self.layer(120, c4, c[3]), up(self.layer(117, n5, c[3])))
        n4 = self.chain(122, x, c[3], 5)
        x = cat(self.layer(130, c3, c[2]), up(self.layer(127, n4, c[2])))
        o3 = self.chain(132, x, c[2], 5)
        o4 = self.chain(143, cat(self.layer(141, o3, c[3], 3, 2), n4), c[3], 5)
        o5 = self.chain(154, cat(self.layer(152, o4, c[4], 3, 2), n5), c[4], 5)
        found = []
        for k, x, out in ((137, o3, c[3]), (148, o4, c[4]), (159, o5, c[5])):
            name = f"module_list.{k + 1}.Conv2d"
            found.append(self.conv(name, self.layer(k, x, out, 3), 3 * (5 + classes)))
        return [found]


class YOLOv4CSP(Numbered):
    """YOLOv4-CSP."""

    def act(self, x: Tensor) -> Tensor:
        return F.mish(x)

    def bare(self, name: str, x: Tensor, out: int) -> Tensor:
        return self.conv(name, x, self.channels(out), bias=False)

    def csp(self, k: int, x: Tensor, out: int, number: int) -> Tensor:
        half = self.channels(out) // 2
        y = self.layer(f"{k}.cv1", x, out // 2)
        y = self.bottlenecks(f"model.{k}.m", y, half, self.times(number), True, wide=True)
        y = cat(self.bare(f"model.{k}.cv3", y, out // 2), self.bare(f"model.{k}.cv2", x, out // 2))
        return self.layer(f"{k}.cv4", self.act(self.norm(f"model.{k}.bn", y)), out)

    def csp2(self, k: int, x: Tensor, out: int) -> Tensor:
        x = self.layer(f"{k}.cv1", x, out)
        number = self.times(2)
        y = self.bottlenecks(f"model.{k}.m", x, self.channels(out), number, False, wide=True)
        y = cat(y, self.bare(f"model.{k}.cv2", x, out))
        return self.layer(f"{k}.cv3", self.act(self.norm(f"model.{k}.bn", y)), out)

    def forward(self, image: Tensor, classes: int) -> Maps:
        x = self.down(1, self.layer(0, image, 32, 3), 64)
        x = self.bottlenecks("model.2", x, self.channels(64), 1, True)
        x = self.csp(4, self.down(3, x, 128), 128, 2)
        n6 = self.csp(6, self.down(5, x, 256), 256, 8)
        n8 = self.csp(8, self.down(7, n6, 512), 512, 8)
        n10 = self.csp(10, self.down(9, n8, 1024), 1024, 4)
        x = self.layer("11.cv3", self.layer("11.cv1", n10, 512), 512, 3)
        x = self.layer("11.cv4", x, 512)
        x = self.layer("11.cv6", self.layer("11.cv5", cat(x, *pools(x)), 512), 512, 3)
        x = self.act(self.norm("model.11.bn", cat(x, self.bare("model.11.cv2", n10, 512))))
        n11 = self.layer("11.cv7", x, 512)
        n16 = self.csp2(16, cat(self.layer(14, n8, 256), up(self.layer(12, n11, 256))), 256)
        n21 = self.csp2(21, cat(self.layer(19, n6, 128), up(self.layer(17, n16, 128))), 128)
        n24 = self.csp2(24, cat(self.down(22, n21, 256), n16), 256)
        n27 = self.csp2(27, cat(self.down(25, n24, 512), n11), 512)
        pixels = (12, 16, 19, 36, 40, 28), (36, 75, 76, 55, 72, 146), (142, 110, 192, 243, 459, 401)
        self.keep("model.34.anchors", lambda: in_strides(pixels).to(self.device))
        found = []
        for k, x, out in ((32, n21, 256), (30, n24, 512), (28, n27, 1024)):
            found.append(self.conv(f"model.{k + 1}", self.layer(k, x, out, 3), 3 * (5 + classes)))
        return [found]


# ---- YOLOv7


class YOLOv7(Numbered):
    """YOLOv7, whose repeats are fixed."""

    def elan(self, k: int, x: Tensor, out: int, wide: int, thin: int, convs: int) -> Tensor:
        """ELAN from layer ``k`` on: two 1x1 of ``wide``, then four 3x3 of ``thin`` channels."""
        maps = [self.layer(k, x, wide), self.layer(k + 1, x, wide)]
        y = maps[1]
        for i in range(4):
            y = self.layer(k + 2 + i, y, thin, 3)
            if (i + 1) % convs == 0:
                maps.append(y)
        return self.layer(k + 7, cat(*maps[::-1]), out)

    def half(self, k: int, x: Tensor, out: int) -> Tensor:
        """A maximum, number ``k``, next to a strided convolution."""
        pooled = self.layer(k + 1, F.max_pool2d(x, 2), out)
        return cat(self.down(k + 3, self.layer(k + 2, x, out), out), pooled)

    def rep(self, k: int, x: Tensor, out: int) -> Tensor:
        parts = []
        for name, kernel in (("dense", 3), ("1x1", 1)):
            branch = f"model.{k}.rbr_{name}"
            y = self.conv(f"{branch}.0", x, self.channels(out), kernel, bias=False)
            parts.append(self.norm(f"{branch}.1", y))
        return self.act(sum(parts))

    def detect(self, k: int, maps: Sequence[Tensor], classes: int) -> Maps:
        names = [f"model.{k}.{{}}.{i}.implicit" for i in range(3)]
        moved = [x + self.implicit(n.format("ia"), x) for n, x in zip(names, maps)]
        (found,) = super().detect(k, moved, classes)
        return [[x * self.implicit(n.format("im"), x) for n, x in zip(names, found)]]

    def implicit(self, name: str, x: Tensor) -> Tensor:
        return self.keep(name, lambda: self.draw(1, x.shape[1], 1, 1))

    @staticmethod
    def anchors() -> Tensor:
        pixels = (12, 16, 19, 36, 40, 28), (36, 75, 76, 55, 72, 146), (142, 110, 192, 243, 459, 401)
        return in_strides(pixels)

    def forward(self, image: Tensor, classes: int) -> Maps:
        x = self.layer(2, self.down(1, self.layer(0, image, 32, 3), 64), 64, 3)
        x = self.elan(4, self.down(3, x, 128), 256, 64, 64, 2)
        n24 = self.elan(17, self.half(12, x, 128), 512, 128, 128, 2)
        n37 = self.elan(30, self.half(25, n24, 256), 1024, 256, 256, 2)
        n50 = self.elan(43, self.half(38, n37, 512), 1024, 256, 256, 2)
        x = self.layer("51.cv3", self.layer("51.cv1", n50, 512), 512, 3)
        x = self.layer("51.cv4", x, 512)
        x = self.layer("51.cv6", self.layer("51.cv5", cat(x, *pools(x)), 512), 512, 3)
        n51 = self.layer("51.cv7", cat(x, self.layer("51.cv2", n50, 512)), 512)
        x = cat(self.layer(54, n37, 256), up(self.layer(52, n51, 256)))
        n63 = self.elan(56, x, 256, 256, 128, 1)
        x = cat(self.layer(66, n24, 128), up(self.layer(64, n63, 128)))
        n75 = self.elan(68, x, 128, 128, 64, 1)
        n88 = self.elan(81, cat(self.half(76, n75, 128), n63), 256, 256, 128, 1)
        n101 = self.elan(94, cat(self.half(89, n88, 256), n51), 512, 512, 256, 1)
        maps = self.rep(102, n75, 256), self.rep(103, n88, 512), self.rep(104, n101, 1024)
        return self.detect(105, maps, classes)


class YOLOv7Tiny(YOLOv7):
    """YOLOv7-tiny."""

    anchors = staticmethod(Numbered.anchors)

    def act(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.1)

    def small(self, k: int, x: Tensor, out: int) -> Tensor:
        """ELAN with two 3x3 convolutions from layer ``k`` on."""
        half = self.channels(out) // 2
        a, b = self.cbs(f"model.{k}", x, half), self.cbs(f"model.{k + 1}", x, half)
        d = self.cbs(f"model.{k + 2}", b, half, 3)
        e = self.cbs(f"model.{k + 3}", d, half, 3)
        return self.layer(k + 5, cat(e, d, b, a), out)

    def forward(self, image: Tensor, classes: int) -> Maps:
        x = self.small(2, self.down(1, self.down(0, image, 32), 64), 64)
        n14 = self.small(9, F.max_pool2d(x, 2), 128)
        n21 = self.small(16, F.max_pool2d(n14, 2), 256)
        n28 = self.small(23, F.max_pool2d(n21, 2), 512)
        a, b = self.layer(29, n28, 256), self.layer(30, n28, 256)
        n37 = self.layer(37, cat(self.layer(35, cat(*pools(b)[::-1], b), 256), a), 256)
        n47 = self.small(42, cat(self.layer(40, n21, 128), up(self.layer(38, n37, 128))), 128)
        n57 = self.small(52, cat(self.layer(50, n14, 64), up(self.layer(48, n47, 64))), 64)
        n65 = self.small(60, cat(self.down(58, n57, 128), n47), 128)
        n73 = self.small(68, cat(self.down(66, n65, 256), n37), 256)
        layers = ((74, n57, 128), (75, n65, 256), (76, n73, 512))
        return self.detect(77, [self.layer(k, x, out, 3) for k, x, out in layers], classes)


# ---- RTMDet


class RTMDet(Released):
    """RTMDet, or RTMDet-Ins as released, whose box branch is the class branch."""

    def __init__(self, depth: float, width: float, masks: bool = False, device: str = "cpu"):
        super().__init__(1e-5, depth, width, device)
        self.masks = masks

    def csp(self, name: str, x: Tensor, out: int, blocks: int, add: bool, attend: bool) -> Tensor:
        half = out // 2
        short = self.cbs(f"{name}.short_conv", x, half)
        main = self.cbs(f"{name}.main_conv", x, half)
        for i in range(blocks):
            part = f"{name}.blocks.{i}"
            y = self.cbs(f"{part}.conv1", main, half, 3)
            y = self.cbs(f"{part}.conv2.depthwise_conv", y, half, 5, groups=half)
            y = self.cbs(f"{part}.conv2.pointwise_conv", y, half)
            main = main + y if add else y
        x = cat(main, short)
        if attend:
            means = self.conv(f"{name}.attention.fc", x.mean((2, 3), keepdim=True), out)
            x = x * F.hardsigmoid(means)
        return self.cbs(f"{name}.final_conv", x, out)

    def forward(self, image: Tensor, classes: int) -> Maps:
        """Return class logits and raw distances; with masks, also kernels and prototypes."""
        c = [int(n * self.width) for n in (32, 64, 128, 256, 512, 1024)]
        x = self.cbs("backbone.stem.0", image, c[0], 3, 2)
        x = self.cbs("backbone.stem.1", x, c[0], 3)
        x = self.cbs("backbone.stem.2", x, c[1], 3)
        maps = []
        for k, blocks in ((1, 3), (2, 6), (3, 6)):
            x = self.cbs(f"backbone.stage{k}.0", x, c[k + 1], 3, 2)
            x = self.csp(f"backbone.stage{k}.1", x, c[k + 1], self.times(blocks), True, True)
            maps.append(x)
        x = self.cbs("backbone.stage4.0", x, c[5], 3, 2)
        x = self.cbs("backbone.stage4.1.conv1", x, c[5] // 2)
        x = cat(x, *(F.max_pool2d(x, k, 1, k // 2) for k in (5, 9, 13)))
        x = self.cbs("backbone.stage4.1.conv2", x, c[5])
        x = self.csp("backbone.stage4.2", x, c[5], self.times(3), False, True)
        return self.head(self.neck(maps[1], maps[2], x, c[3:]), c[3], classes)

    def neck(self, c3: Tensor, c4: Tensor, c5: Tensor, c: list[int]) -> list[Tensor]:
        def csp(name: str, a: Tensor, b: Tensor, out: int) -> Tensor:
            return self.csp(f"neck.{name}", cat(a, b), out, self.times(3), False, False)

        r5 = self.cbs("neck.reduce_layers.0", c5, c[1])
        t4 = csp("top_down_blocks.0", up(r5), c4, c[1])
        r4 = self.cbs("neck.reduce_layers.1", t4, c[0])
        o3 = csp("top_down_blocks.1", up(r4), c3, c[0])
        o4 = csp("bottom_up_blocks.0", self.cbs("neck.downsamples.0", o3, c[0], 3, 2), r4, c[1])
        o5 = csp("bottom_up_blocks.1", self.cbs("neck.downsamples.1", o4, c[1], 3, 2), r5, c[2])
        return [self.cbs(f"neck.out_convs.{k}", x, c[0], 3) for k, x in enumerate((o3, o4, o5))]

    def head(self, maps: list[Tensor], width: int, classes: int) -> Maps:
        found: Maps = [[], [], []]
        for k, x in enumerate(maps):
            kinds, places, masks = x, x, x
            for i in range(2):
                kinds = self.branch("cls", k, i, kinds)
                if self.masks:
                    first = f"bbox_head.cls_convs.{k}.{i}"
                    self.shared(f"bbox_head.reg_convs.{k}.{i}", first)
                    masks = self.cbs(f"bbox_head.kernel_convs.{k}.{i}", masks, width, 3)
                else:
                    places = self.branch("reg", k, i, places)
            places = kinds if self.masks else places
            found[0].append(self.conv(f"bbox_head.rtm_cls.{k}", kinds, classes))
            found[1].append(self.conv(f"bbox_head.rtm_reg.{k}", places, 4))
            if self.masks:
                found[2].append(self.conv(f"bbox_head.rtm_kernel.{k}", masks, 169))
        return [*found, [self.prototypes(maps, width)]] if self.masks else found[:2]

    def branch(self, kind: str, k: int, i: int, x: Tensor) -> Tensor:
        """A convolution whose weight is that of level 0, with a norm of its own."""
        name = f"bbox_head.{kind}_convs"
        if k:
            self.shared(f"{name}.{k}.{i}.conv", f"{name}.0.{i}.conv")
        return self.cbs(f"{name}.{k}.{i}", x, x.shape[1], 3)

    def prototypes(self, maps: list[Tensor], width: int) -> Tensor:
        name, size = "bbox_head.mask_head", maps[0].shape[2:]
        x = cat(*(F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps))
        x = self.conv(f"{name}.fusion_conv", x, width)
        for i in range(4):
            x = self.cbs(f"{name}.stacked_convs.{i}", x, width, 3)
        return self.conv(f"{name}.projection", x, 8)

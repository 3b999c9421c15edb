"""Backbones from tables of layers, with the necks that YOLO and RTMDet share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone

from ..section import POSITIVE, SWITCH, TEXT, WHOLE, Key, Section
from .blocks import Activation, Block, ConvStyle, conv, down, silu, upsample
from .graph import Graph, GraphBackbone, Layer, Scaling

DEEP = ("p3", "p4", "p5")
SHALLOW = ("c3", "c4", "c5")
_CONV_3 = conv(3)

CSP_SECTION = Section(
    DEPTH=Key(1.0, "multiple of the blocks per stage", POSITIVE),
    WIDTH=Key(1.0, "multiple of the channels", POSITIVE),
    NORM=Key("BN", "norm of the convolutions", TEXT),
    SQUARE_PAD=Key(
        0,
        "side in pixels of the square that images are padded to, at least that of the largest "
        "image; 0: to multiples of 32",
        WHOLE,
    ),
)
"""Keys of the backbones here."""

CSPDARKNET_SECTION = Section(
    DEPTHWISE=Key(False, "depthwise separable 3x3 convolutions, as in YOLOX nano", SWITCH)
).on_top_of(CSP_SECTION)
"""Keys of the backbones of all versions of YOLO."""


def pan_table(csp: Block, outputs: Sequence[str] = DEEP) -> tuple[Layer, ...]:
    """Return the table of the neck: top-down, then bottom-up.

    Bottom-up layers read the *reduced* maps r4 and r5. In each concatenation the map of the other
    level is first, then the map of the same level.

    Args:
        csp: block of a CSP layer.
        outputs: names of the outputs of strides 8, 16 and 32.
    """
    fine, middle, coarse = outputs
    return (
        Layer("r5", conv(1), 512, inputs=("c5",)),
        Layer("up5", upsample),
        Layer("t4", csp, 512, 3, ("up5", "c4")),
        Layer("r4", conv(1), 256),
        Layer("up4", upsample),
        Layer(fine, csp, 256, 3, ("up4", "c3")),
        Layer("down3", down, 256),
        Layer(middle, csp, 512, 3, ("down3", "r4")),
        Layer("down4", down, 512),
        Layer(coarse, csp, 1024, 3, ("down4", "r5")),
    )


def lateral_pan_table(
    spp: Block,
    layer: Block,
    repeats: int = 1,
    down: Block = down,
    output: Block = _CONV_3,
    width: int = 512,
) -> tuple[Layer, ...]:
    """Return the table of the neck of YOLOv4 and YOLOv7: top-down, then bottom-up.

    The maps s3, s4 and n5 enter the top-down path, and o3, o4 and o5 leave the bottom-up path. Both
    have the same channels. In each concatenation the map of the same level is first on the way
    down, and last on the way up.

    Args:
        spp: block of n5.
        layer: block of n4, o3, o4 and o5.
        repeats: repeats inside ``layer``.
        down: block that halves the size on the way up.
        output: block of p3, p4 and p5.
        width: channels of n5.
    """
    coarse, middle, fine = width, width // 2, width // 4
    return (
        Layer("n5", spp, coarse, inputs=("c5",)),
        Layer("r5", conv(1), middle),
        Layer("up5", upsample),
        Layer("s4", conv(1), middle, inputs=("c4",)),
        Layer("n4", layer, middle, repeats, ("s4", "up5")),
        Layer("r4", conv(1), fine),
        Layer("up4", upsample),
        Layer("s3", conv(1), fine, inputs=("c3",)),
        Layer("o3", layer, fine, repeats, ("s3", "up4")),
        Layer("down3", down, middle),
        Layer("o4", layer, middle, repeats, ("down3", "n4")),
        Layer("down4", down, coarse),
        Layer("o5", layer, coarse, repeats, ("down4", "n5")),
        Layer("p3", output, middle, inputs=("o3",)),
        Layer("p4", output, coarse, inputs=("o4",)),
        Layer("p5", output, 2 * coarse, inputs=("o5",)),
    )


LATERAL_SHALLOW, LATERAL_DEEP = ("s3", "s4", "n5"), ("o3", "o4", "o5")
"""Shallow and deep maps of :func:`lateral_pan_table`, by level."""


class CSPNetwork(NamedTuple):
    """A network as data.

    Attributes:
        name: name in the names of its builders.
        section: name of its config section.
        bottom_up: layers of the backbone, with outputs c3, c4 and c5.
        neck: layers of the neck, with outputs p3, p4 and p5.
        neck_kind: name of the neck in the name of its builder.
        deep: names of the maps at the end of the neck. They differ from p3, p4 and p5 if the neck
            has output convolutions.
        shallow: names of the maps that enter the top-down pathway.
        exposed: outputs whose convolution's output, before norm and activation, is a map too.
        activations: those of the backbone and of the neck.
        eps, momentum: values of the batch norms.
        divisor: as in :class:`~distill.nets.graph.Scaling`.
    """

    name: str
    section: str
    bottom_up: tuple[Layer, ...]
    neck: tuple[Layer, ...]
    neck_kind: str = "pafpn"
    deep: tuple[str, ...] = DEEP
    shallow: tuple[str, ...] = SHALLOW
    exposed: tuple[str, ...] = ()
    activations: tuple[Activation, Activation] = (silu, silu)
    eps: float = 1e-3
    momentum: float = 0.03
    divisor: int = 1

    def scaling(self, cfg: CfgNode) -> Scaling:
        node = cfg.MODEL[self.section]
        return Scaling(node.DEPTH, node.WIDTH, self.divisor)

    def style(self, norm: str, depthwise: bool = False, activation: Activation = silu) -> ConvStyle:
        """Return the style of the convolutions of a part: backbone, neck or head."""
        return ConvStyle(norm, self.eps, self.momentum, activation, depthwise)

    def graph(
        self,
        cfg: CfgNode,
        table: tuple[Layer, ...],
        inputs: dict[str, int],
        activation: Activation,
        exposed: tuple[str, ...] = (),
    ) -> Graph:
        """Build layers as the config describes them.

        Args:
            inputs: channels of the maps that the layers read, by name.
            activation: that of the convolutions.
            exposed: as in :class:`~distill.nets.graph.Graph`.
        """
        node = cfg.MODEL[self.section]
        style = self.style(node.NORM, node.get("DEPTHWISE", False), activation)
        return Graph(table, inputs, self.scaling(cfg), style, exposed)

    def build_bottom_up(self, cfg: CfgNode, input_shape: ShapeSpec) -> GraphBackbone:
        """Build the backbone without a neck, with outputs c3, c4 and c5."""
        image = {"image": input_shape.channels}
        graph = self.graph(cfg, self.bottom_up, image, self.activations[0])
        return GraphBackbone(graph, SHALLOW, **self._padding(cfg))

    def build(self, cfg: CfgNode, input_shape: ShapeSpec) -> GraphBackbone:
        """Build the backbone with its neck."""
        return self.build_neck(cfg, self.build_bottom_up(cfg, input_shape))

    def build_neck(
        self, cfg: CfgNode, bottom_up: Backbone, adapters: tuple[Layer, ...] = ()
    ) -> GraphBackbone:
        """Build the neck on top of a backbone.

        Args:
            adapters: layers before the neck, which make c3, c4 and c5 of the backbone's outputs.
        """
        inputs = {name: shape.channels for name, shape in bottom_up.output_shape().items()}
        layers = adapters + self.neck
        graph = self.graph(cfg, layers, inputs, self.activations[1], self.exposed)
        shallow = dict(zip(self.deep, self.shallow))
        return GraphBackbone(
            graph, DEEP, bottom_up=bottom_up, shallow_features=shallow, **self._padding(cfg)
        )

    def _padding(self, cfg: CfgNode) -> dict[str, Any]:
        return {"square_pad": cfg.MODEL[self.section].SQUARE_PAD}

    def register(self) -> "CSPNetwork":
        """Register ``build_<name>_backbone`` and the one with the neck; return self.

        The latter is ``build_<name>_pafpn_backbone``, or has the name of another ``neck_kind``.
        Neither reads ``MODEL.BACKBONE.FREEZE_AT``.
        """

        def with_neck(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
            return self.build(cfg, input_shape)

        def without(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
            return self.build_bottom_up(cfg, input_shape)

        for build, suffix in ((with_neck, f"{self.neck_kind}_backbone"), (without, "backbone")):
            build.__name__ = build.__qualname__ = f"build_{self.name}_{suffix}"
            BACKBONE_REGISTRY.register(build)
        return self

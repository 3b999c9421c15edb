"""Backbones of CSP layers with the FPN + PAN neck that YOLO and RTMDet share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone

from ..section import POSITIVE, SWITCH, TEXT, WHOLE, Key, Section
from .blocks import Block, ConvStyle, conv, down, upsample
from .graph import Graph, GraphBackbone, Layer, Scaling

DEEP = ("p3", "p4", "p5")
SHALLOW = ("c3", "c4", "c5")

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


class CSPNetwork(NamedTuple):
    """A network as data.

    Attributes:
        name: name in the names of its builders.
        section: name of its config section.
        bottom_up: layers of the backbone, with outputs c3, c4 and c5.
        neck: layers of the neck, with outputs p3, p4 and p5.
        deep: names of the maps at the end of the bottom-up pathway. They differ from p3, p4 and p5
            if the neck has output convolutions.
        exposed: outputs whose convolution's output, before norm and activation, is a map too.
        eps, momentum: values of the batch norms.
        divisor: as in :class:`~distill.nets.graph.Scaling`.
    """

    name: str
    section: str
    bottom_up: tuple[Layer, ...]
    neck: tuple[Layer, ...]
    deep: tuple[str, ...] = DEEP
    exposed: tuple[str, ...] = ()
    eps: float = 1e-3
    momentum: float = 0.03
    divisor: int = 1

    def scaling(self, cfg: CfgNode) -> Scaling:
        node = cfg.MODEL[self.section]
        return Scaling(node.DEPTH, node.WIDTH, self.divisor)

    def style(self, norm: str, depthwise: bool = False) -> ConvStyle:
        """Return the style of the convolutions of backbone, neck and head."""
        return ConvStyle(norm, self.eps, self.momentum, depthwise=depthwise)

    def graph(
        self,
        cfg: CfgNode,
        table: tuple[Layer, ...],
        inputs: dict[str, int],
        exposed: tuple[str, ...] = (),
    ) -> Graph:
        """Build layers as the config describes them.

        Args:
            inputs: channels of the maps that the layers read, by name.
            exposed: as in :class:`~distill.nets.graph.Graph`.
        """
        node = cfg.MODEL[self.section]
        style = self.style(node.NORM, node.get("DEPTHWISE", False))
        return Graph(table, inputs, self.scaling(cfg), style, exposed)

    def build_bottom_up(self, cfg: CfgNode, input_shape: ShapeSpec) -> GraphBackbone:
        """Build the backbone without a neck, with outputs c3, c4 and c5."""
        graph = self.graph(cfg, self.bottom_up, {"image": input_shape.channels})
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
        graph = self.graph(cfg, adapters + self.neck, inputs, self.exposed)
        shallow = dict(zip(self.deep, SHALLOW))
        return GraphBackbone(
            graph, DEEP, bottom_up=bottom_up, shallow_features=shallow, **self._padding(cfg)
        )

    def _padding(self, cfg: CfgNode) -> dict[str, Any]:
        return {"square_pad": cfg.MODEL[self.section].SQUARE_PAD}

    def register(self) -> "CSPNetwork":
        """Register ``build_<name>_backbone`` and ``build_<name>_pafpn_backbone``; return self.

        Neither reads ``MODEL.BACKBONE.FREEZE_AT``.
        """

        def with_neck(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
            return self.build(cfg, input_shape)

        def without(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
            return self.build_bottom_up(cfg, input_shape)

        for build, suffix in ((with_neck, "pafpn_backbone"), (without, "backbone")):
            build.__name__ = build.__qualname__ = f"build_{self.name}_{suffix}"
            BACKBONE_REGISTRY.register(build)
        return self

"""YOLOv7 (Wang et al., "YOLOv7: trainable bag-of-freebies sets new state-of-the-art for real-time
object detectors"): the base model and tiny.

    build_yolov7_pafpn_backbone        p3, p4, p5 of 256, 512, 1024 · width channels
    build_yolov7_tiny_pafpn_backbone   128, 256, 512 · width channels
    build_yolov7_backbone, build_yolov7_tiny_backbone    without a neck: c3, c4, c5

All read ``MODEL.CSPDARKNET``. The authors' sizes have depth and width 1; the depth multiplies the
stages of ELAN layers.

Shallow maps are the 1x1 convolutions of c3 and c4, and n5 after the pools. They have as many
channels as the maps o3, o4 and o5 before the neck's last convolutions.
"""

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..section import Section
from .blocks import conv, down, elan, leaky_relu, pool, pool_down, rep_conv, spp_csp, spp_tiny
from .csp_pan import LATERAL_DEEP, LATERAL_SHALLOW, CSPNetwork, lateral_pan_table
from .graph import Layer
from .yolov4 import YOLOv4
from .yolov5 import YOLOv5, YOLOv5Head

SPREAD = 0.02  # standard deviation of new implicit parameters

_ELAN, _WIDE_ELAN, _TINY_ELAN = elan(1 / 4, 1 / 4, convs=2), elan(1, 1 / 2), elan(1 / 2, 1 / 2)

CSPNetwork(
    name="yolov7",
    section="CSPDARKNET",
    bottom_up=(
        Layer("stem", conv(3), 32),
        Layer("down0", down, 64),
        Layer("c1", conv(3), 64),
        Layer("down1", down, 128),
        Layer("c2", _ELAN, 256, 2),
        Layer("down2", pool_down, 256),
        Layer("c3", _ELAN, 512, 2),
        Layer("down3", pool_down, 512),
        Layer("c4", _ELAN, 1024, 2),
        Layer("down4", pool_down, 1024),
        Layer("c5", _ELAN, 1024, 2),
    ),
    neck=lateral_pan_table(spp_csp(norm=False), _WIDE_ELAN, 4, pool_down, rep_conv),
    deep=LATERAL_DEEP,
    shallow=LATERAL_SHALLOW,
    divisor=8,
).register()

CSPNetwork(
    name="yolov7_tiny",
    section="CSPDARKNET",
    bottom_up=(
        Layer("stem", conv(3, stride=2), 32),
        Layer("down1", down, 64),
        Layer("c2", _TINY_ELAN, 64, 2),
        Layer("down2", pool),
        Layer("c3", _TINY_ELAN, 128, 2),
        Layer("down3", pool),
        Layer("c4", _TINY_ELAN, 256, 2),
        Layer("down4", pool),
        Layer("c5", _TINY_ELAN, 512, 2),
    ),
    neck=lateral_pan_table(spp_tiny, _TINY_ELAN, 2, width=256),
    deep=LATERAL_DEEP,
    shallow=LATERAL_SHALLOW,
    activations=(leaky_relu, leaky_relu),
    divisor=8,
).register()


class ImplicitConv(nn.Conv2d):
    """1x1 convolution with implicit knowledge: m · (W (x + a) + b), with learned a and m.

    The vectors a and m have a value per input and output channel (Wang et al., "You only learn one
    representation"). :meth:`fused` is an ordinary convolution with the same output.
    """

    implicit = ("added", "factor")
    """Names of the parameters with the weight decay of norms, see ``solver.split_implicit``."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1):
        super().__init__(inputs, outputs, kernel)
        self.added = nn.Parameter(SPREAD * torch.randn(1, inputs, 1, 1))
        self.factor = nn.Parameter(1 + SPREAD * torch.randn(1, outputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.added) * self.factor

    @torch.no_grad()
    def fused(self) -> nn.Conv2d:
        """Return the convolution without implicit parameters, for inference."""
        conv = nn.Conv2d(self.in_channels, self.out_channels, 1).to(self.weight)
        bias = super().forward(self.added) * self.factor
        weight = self.weight * self.factor.transpose(0, 1)
        conv.load_state_dict({"weight": weight, "bias": bias.flatten()})
        return conv


class YOLOv7Head(YOLOv5Head):
    """YOLOv5's head with implicit knowledge in its convolutions."""

    predictor = ImplicitConv
    other_classes = 0.99


@META_ARCH_REGISTRY.register()
class YOLOv7(YOLOv5):
    """YOLOv7: YOLOv5's anchors, boxes and losses, with targets that depend on predictions.

    :func:`~distill.nets.assign.ota_assign` selects a part of YOLOv5's targets. Tiny has YOLOv5's
    anchors (``ANCHORS``) and factors (``OBJ_LOSS_WEIGHT``, ``CLS_LOSS_WEIGHT``).
    """

    section_name = "YOLOV7"
    section = Section(
        NMS_THRESH_TEST=0.65,
        OBJ_LOSS_WEIGHT=0.7,
        CLS_LOSS_WEIGHT=0.3,
        ANCHORS=YOLOv4.section["ANCHORS"].default,
    ).on_top_of(YOLOv5.section)
    head_class = YOLOv7Head
    ota = True

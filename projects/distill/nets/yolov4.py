"""YOLOv4 (Bochkovskiy et al., "YOLOv4: optimal speed and accuracy of object detection") and
YOLOv4-CSP (Wang et al., "Scaled-YOLOv4"), trained as YOLOv5.

    build_yolov4_pafpn_backbone        CSPDarknet53 with SPP and PAN
    build_yolov4_csp_pafpn_backbone    the CSP form of both, with Mish everywhere
    build_yolov4_backbone, build_yolov4_csp_backbone    without a neck: c3, c4, c5

p3, p4 and p5 have 256, 512 and 1024 channels at width 1. All read ``MODEL.CSPDARKNET``. The
authors' sizes have depth and width 1.

Shallow maps are the 1x1 convolutions of c3 and c4, and n5 after the pools. They have as many
channels as the maps o3, o4 and o5 before the neck's last convolutions.
"""

from detectron2.modeling import META_ARCH_REGISTRY

from ..section import Section
from .blocks import (
    conv,
    darknet,
    darknet_csp,
    down,
    five_convs,
    leaky_relu,
    mish,
    norm_csp,
    norm_csp_neck,
    spp_convs,
    spp_csp,
)
from .csp_pan import LATERAL_DEEP, LATERAL_SHALLOW, CSPNetwork, lateral_pan_table
from .graph import Layer
from .yolov5 import YOLOv5

_STAGE = darknet_csp()

CSPNetwork(
    name="yolov4",
    section="CSPDARKNET",
    bottom_up=(
        Layer("stem", conv(3), 32),
        Layer("down0", down, 64),
        Layer("c1", darknet_csp(first=True), 64),
        Layer("down1", down, 128),
        Layer("c2", _STAGE, 128, 2),
        Layer("down2", down, 256),
        Layer("c3", _STAGE, 256, 8),
        Layer("down3", down, 512),
        Layer("c4", _STAGE, 512, 8),
        Layer("down4", down, 1024),
        Layer("c5", _STAGE, 1024, 4),
    ),
    neck=lateral_pan_table(spp_convs, five_convs),
    deep=LATERAL_DEEP,
    shallow=LATERAL_SHALLOW,
    activations=(mish, leaky_relu),
    eps=1e-4,
    divisor=8,
).register()

CSPNetwork(
    name="yolov4_csp",
    section="CSPDARKNET",
    bottom_up=(
        Layer("stem", conv(3), 32),
        Layer("down0", down, 64),
        Layer("c1", darknet(), 64),
        Layer("down1", down, 128),
        Layer("c2", norm_csp, 128, 2),
        Layer("down2", down, 256),
        Layer("c3", norm_csp, 256, 8),
        Layer("down3", down, 512),
        Layer("c4", norm_csp, 512, 8),
        Layer("down4", down, 1024),
        Layer("c5", norm_csp, 1024, 4),
    ),
    neck=lateral_pan_table(spp_csp(norm=True), norm_csp_neck, 2),
    deep=LATERAL_DEEP,
    shallow=LATERAL_SHALLOW,
    activations=(mish, mish),
    divisor=8,
).register()


@META_ARCH_REGISTRY.register()
class YOLOv4(YOLOv5):
    """YOLOv4 with anchors of its own, and YOLOv5's boxes, targets and losses.

    One of its authors trains it so (PyTorch_YOLOv4, ScaledYOLOv4). Darknet's own losses are not
    implemented.
    """

    section_name = "YOLOV4"
    section = Section(
        ANCHORS=[
            [[12, 16], [19, 36], [40, 28]],
            [[36, 75], [76, 55], [72, 146]],
            [[142, 110], [192, 243], [459, 401]],
        ],
    ).on_top_of(YOLOv5.section)

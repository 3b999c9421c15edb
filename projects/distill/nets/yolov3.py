"""YOLOv3 (Redmon and Farhadi, "YOLOv3: an incremental improvement"), trained as YOLOv5.

    build_yolov3_fpn_backbone        Darknet-53 and its neck: p3, p4, p5 of 256, 512, 1024 · width
    build_yolov3_spp_fpn_backbone    same, with spatial pyramid pooling
    build_yolov3_backbone, build_yolov3_spp_backbone    Darknet-53: c3, c4, c5

All read ``MODEL.CSPDARKNET``. The authors' size has depth and width 1.

The neck has no bottom-up path. Its outputs have as many channels as c3, c4 and c5, which are their
shallow maps. The activation is SiLU as in ultralytics' code; Darknet has a leaky ReLU.
"""

from detectron2.modeling import META_ARCH_REGISTRY

from .blocks import Block, conv, darknet, down, sppf, upsample
from .csp_pan import CSPNetwork
from .graph import Layer
from .yolov5 import YOLOv5

_STAGE, _PLAIN = darknet(), darknet(residual=False)

DARKNET53 = (
    Layer("stem", conv(3), 32),
    Layer("down0", down, 64),
    Layer("c1", _STAGE, 64),
    Layer("down1", down, 128),
    Layer("c2", _STAGE, 128, 2),
    Layer("down2", down, 256),
    Layer("c3", _STAGE, 256, 8),
    Layer("down3", down, 512),
    Layer("c4", _STAGE, 512, 8),
    Layer("down4", down, 1024),
    Layer("c5", _STAGE, 1024, 4),
)


def fpn_table(pooled: Block) -> tuple[Layer, ...]:
    """Return the table of the neck.

    Args:
        pooled: block of the first reduction to 512 channels.
    """
    return (
        Layer("t5", _PLAIN, 1024, inputs=("c5",)),
        Layer("pooled", pooled, 512),
        Layer("wide", conv(3), 1024),
        Layer("b5", conv(1), 512),
        Layer("p5", conv(3), 1024),
        Layer("r5", conv(1), 256, inputs=("b5",)),
        Layer("up5", upsample),
        Layer("t4", _PLAIN, 512, 2, ("up5", "c4")),
        Layer("b4", conv(1), 256),
        Layer("p4", conv(3), 512),
        Layer("r4", conv(1), 128, inputs=("b4",)),
        Layer("up4", upsample),
        Layer("p3", _PLAIN, 256, 3, ("up4", "c3")),
    )


for _name, _pooled in (("yolov3", conv(1)), ("yolov3_spp", sppf)):
    CSPNetwork(
        name=_name,
        section="CSPDARKNET",
        bottom_up=DARKNET53,
        neck=fpn_table(_pooled),
        neck_kind="fpn",
        divisor=8,
    ).register()


@META_ARCH_REGISTRY.register()
class YOLOv3(YOLOv5):
    """YOLOv3 with YOLOv5's anchors, boxes, targets and losses, as ultralytics trains it.

    Darknet's own losses are not implemented. Its maintainers report 3 to 4 AP less for them.
    """

    section_name = "YOLOV3"

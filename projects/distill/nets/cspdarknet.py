"""CSPDarknet and its PAFPN, the backbones of YOLOX (Ge et al., "YOLOX: exceeding YOLO series in
2021") and of YOLOv5 (ultralytics, v6.0 to v7.0).

    build_yolox_pafpn_backbone         with the neck: p3, p4, p5 of 256, 512, 1024 · width channels
    build_yolov5_pafpn_backbone        same, with another backbone; the necks are the same
    build_timm_yolo_pafpn_backbone     YOLOv5's neck on ``MODEL.TIMM``
    build_yolox_backbone, build_yolov5_backbone    without a neck: c3, c4, c5

All read ``MODEL.CSPDARKNET``. ``DEPTH`` and ``WIDTH`` are 0.33 and 0.25 (YOLOv5 n, YOLOX nano),
0.33 and 0.375 (YOLOX tiny), 0.33 and 0.5 (s), 0.67 and 0.75 (m), 1 and 1 (l), or 1.33 and 1.25 (x).
YOLOX nano also has ``DEPTHWISE``.

YOLOX multiplies round(3 · depth) by 1 or 3 where this rounds 3 · depth or 9 · depth. Both agree at
all these depths.
"""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone

from .blocks import bottleneck, conv, csp, down, focus, sppf
from .csp_pan import SHALLOW, CSPNetwork, pan_table
from .graph import Layer
from .timm import build_timm_backbone

_C3 = csp(bottleneck)
_PLAIN_C3 = csp(bottleneck, residual=False)
_NECK = pan_table(_PLAIN_C3)

YOLOX_NETWORK = CSPNetwork(
    name="yolox",
    section="CSPDARKNET",
    bottom_up=(
        Layer("c1", focus, 64),
        Layer("down1", down, 128),
        Layer("c2", _C3, 128, 3),
        Layer("down2", down, 256),
        Layer("c3", _C3, 256, 9),
        Layer("down3", down, 512),
        Layer("c4", _C3, 512, 9),
        Layer("down4", down, 1024),
        Layer("spp", sppf, 1024),
        Layer("c5", _PLAIN_C3, 1024, 3),
    ),
    neck=_NECK,
).register()

YOLOV5_NETWORK = CSPNetwork(
    name="yolov5",
    section="CSPDARKNET",
    bottom_up=(
        Layer("c1", conv(6, stride=2, padding=2), 64),
        Layer("down1", down, 128),
        Layer("c2", _C3, 128, 3),
        Layer("down2", down, 256),
        Layer("c3", _C3, 256, 6),
        Layer("down3", down, 512),
        Layer("c4", _C3, 512, 9),
        Layer("down4", down, 1024),
        Layer("csp", _C3, 1024, 3),
        Layer("c5", sppf, 1024),
    ),
    neck=_NECK,
    divisor=8,
).register()


@BACKBONE_REGISTRY.register()
def build_timm_yolo_pafpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build YOLOv5's neck on the maps of strides 8, 16 and 32 of a timm model.

    A 1x1 convolution gives each map the channels of YOLOv5's own backbone. MSSD's YOLOv5 with a
    ConvNeXt (Table 4) is one; the paper does not describe how it joins them.

    Raises:
        ValueError: if the model lacks one of these strides.
    """
    bottom_up = build_timm_backbone(cfg, input_shape)
    names = ("res3", "res4", "res5")
    missing = [name for name in names if name not in bottom_up.output_shape()]
    if missing:
        raise ValueError(
            f"MODEL.TIMM.NAME '{cfg.MODEL.TIMM.NAME}' has no map {missing[0]} of stride "
            f"{2 ** int(missing[0][-1])}, which build_timm_yolo_pafpn_backbone needs"
        )
    channels = (256, 512, 1024)
    adapters = (Layer(c, conv(1), n, inputs=(r,)) for c, n, r in zip(SHALLOW, channels, names))
    return YOLOV5_NETWORK.build_neck(cfg, bottom_up, tuple(adapters))

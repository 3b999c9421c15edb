"""FPN + PAN: a top-down and then a bottom-up pathway (Liu et al., "Path aggregation network")."""

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from .resnet import build_shallow_resnet_backbone


class PAFPN(Backbone):
    """detectron2's FPN followed by a bottom-up pathway.

    Outputs are the deep maps under the FPN's own names ("p3", ...), which detectors read, the
    coarser ones of ``top_block`` included, and the FPN's maps as "fpn_p3", .... Every level, the
    finest included, has an output convolution of its own, so that no deep map is its shallow one.
    A dense detector that is built by hand, FCOS for one, must name its ``head_in_features``: by
    default it reads every output.

    Args:
        fpn: without a top block.
        top_block: makes the coarsest levels of the deepest deep map; as of detectron2's FPN.
        norm: of the convolutions of the bottom-up pathway.
    """

    def __init__(self, fpn: FPN, top_block: nn.Module | None = None, norm: str = ""):
        super().__init__()
        self.fpn = fpn
        self.top_block = top_block
        shapes = fpn.output_shape()
        self.levels = sorted(shapes, key=lambda name: shapes[name].stride)
        channels = shapes[self.levels[0]].channels
        self.down_convs = nn.ModuleDict(
            {name: _conv(channels, norm, stride=2) for name in self.levels[1:]}
        )
        self.output_convs = nn.ModuleDict({name: _conv(channels, norm) for name in self.levels})
        self.shallow_features = {name: f"fpn_{name}" for name in self.levels}
        """Names of the FPN's maps by the name of the deep map of their level."""
        strides = {name: shapes[name].stride for name in self.levels}
        strides |= {name: 2 ** int(name[1:]) for name in self._coarser_names()}
        strides |= {self.shallow_features[name]: strides[name] for name in self.levels}
        self._out_features = list(strides)
        self._out_feature_strides = strides
        self._out_feature_channels = dict.fromkeys(strides, channels)

    def _coarser_names(self) -> list[str]:
        """Outputs of the top block: detectron2's FPN numbers levels by log2 of the stride."""
        first = int(self.levels[-1][1:]) + 1
        number = getattr(self.top_block, "num_levels", 0)
        return [f"p{k}" for k in range(first, first + number)]

    @property
    def size_divisibility(self) -> int:
        return self.fpn.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return self.fpn.padding_constraints

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (N, C, H / stride, W / stride) of every output for (N, 3, H, W) pictures."""
        shallow = self.fpn(x)
        outputs = {self.shallow_features[name]: shallow[name] for name in self.levels}
        path = None
        for name in self.levels:
            below = 0 if path is None else F.relu(self.down_convs[name](path))
            path = shallow[name] + below
            outputs[name] = self.output_convs[name](path)
        if self.top_block is not None:
            coarser = self.top_block(outputs[self.levels[-1]])
            outputs |= dict(zip(self._coarser_names(), coarser))
        return outputs


def _conv(channels: int, norm: str, stride: int = 1) -> Conv2d:
    conv = Conv2d(
        channels,
        channels,
        kernel_size=3,
        stride=stride,
        padding=1,
        bias=norm == "",
        norm=get_norm(norm, channels),
    )
    c2_xavier_fill(conv)
    return conv


def _build(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> PAFPN:
    fpn = FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
    return PAFPN(fpn, top_block, cfg.MODEL.FPN.NORM)


@BACKBONE_REGISTRY.register()
def build_resnet_pafpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """ResNet with FPN and PAN for R-CNN: P2-P5, and P6 by subsampling."""
    return _build(cfg, build_resnet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_shallow_resnet_pafpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """As :func:`build_resnet_pafpn_backbone` on :func:`build_shallow_resnet_backbone`."""
    return _build(cfg, build_shallow_resnet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_pafpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """ResNet with FPN and PAN for dense detectors: P3-P5, and P6, P7 by strided convolutions."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    top_block = LastLevelP6P7(channels, channels, in_feature="p5")
    return _build(cfg, build_resnet_backbone(cfg, input_shape), top_block)

"""PSPNet's head (Zhao et al., "Pyramid scene parsing network")."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY

from .segmentation import ContextBranches, ContextHead, PooledContext


class PyramidPooling(ContextBranches):
    """Pyramid pooling: a map and its means over grids of several sizes, then a 3x3 convolution.

    Args:
        in_channels: channels of the map.
        channels: channels of every scale and of the result.
        scales: number of grid cells along each side.
        norm: norm of the convolutions.
    """

    def __init__(
        self, in_channels: int, channels: int, scales: Sequence[int] = (1, 2, 3, 6), norm: str = ""
    ):
        branches = [PooledContext(in_channels, channels, scale, norm) for scale in scales]
        width = in_channels + len(scales) * channels
        super().__init__([*branches], width, channels, norm, keep_input=True)


@SEM_SEG_HEADS_REGISTRY.register()
class PSPHead(ContextHead):
    """Semantic head with pyramid pooling at scales 1, 2, 3 and 6.

    Each scale has ``SEM_SEG_HEAD.CONVS_DIM`` channels: usually 512, and 128 for ResNet-18 and -34.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        ret = super().from_config(cfg, input_shape)
        channels = cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM
        in_channels: Any = input_shape[ret["in_feature"]].channels
        context = PyramidPooling(in_channels, channels, norm=ret["norm"])
        return {**ret, "context": context, "channels": channels}

"""DeepLabV3's head as in the IMA paper (Chen et al., "Rethinking atrous convolution").

detectron2's own ``DeepLabV3Head`` joins its branches with a 1x1 convolution and has no auxiliary
head.
"""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY

from .segmentation import ContextBranches, ContextHead, PooledContext, conv_norm_relu


class AtrousPooling(ContextBranches):
    """Atrous spatial pyramid pooling, followed by a 3x3 convolution.

    The branches are a 1x1 convolution, 3x3 convolutions with several dilations, and the mean of the
    map.

    Args:
        in_channels: channels of the map.
        channels: channels of every branch and of the result.
        dilations: dilations of the 3x3 branches, in cells.
        norm: norm of the convolutions.
    """

    def __init__(self, in_channels: int, channels: int, dilations: Sequence[int], norm: str = ""):
        branches = [conv_norm_relu(in_channels, channels, 1, norm)]
        branches += [conv_norm_relu(in_channels, channels, 3, norm, x) for x in dilations]
        pooled = PooledContext(in_channels, channels, 1, norm)
        width = (len(branches) + 1) * channels
        super().__init__([*branches, pooled], width, channels, norm, keep_input=False)


@SEM_SEG_HEADS_REGISTRY.register()
class ASPPHead(ContextHead):
    """Semantic head with atrous spatial pyramid pooling.

    It reads ``SEM_SEG_HEAD.(ASPP_CHANNELS, ASPP_DILATIONS)``. The paper uses 512 channels and
    dilations 12, 24, 36 at output stride 8.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        ret = super().from_config(cfg, input_shape)
        channels = cfg.MODEL.SEM_SEG_HEAD.ASPP_CHANNELS
        dilations = cfg.MODEL.SEM_SEG_HEAD.ASPP_DILATIONS
        in_channels: Any = input_shape[ret["in_feature"]].channels
        context = AtrousPooling(in_channels, channels, dilations, ret["norm"])
        return {**ret, "context": context, "channels": channels}

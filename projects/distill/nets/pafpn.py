"""FPN + PAN: a top-down and a bottom-up pathway (Liu et al., "Path aggregation network")."""

import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.backbone import FPN, Backbone
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn


class PAFPN(Backbone):
    """detectron2's FPN followed by a bottom-up pathway.

    The outputs of the bottom-up pathway (deep maps) have the FPN's own names ("p3", ...), which
    detectors read. They include the coarser levels of ``top_block``. The FPN's maps (shallow maps)
    are also outputs, as "fpn_p3", .... Every level, also the finest, has its own output
    convolution, so that no deep map equals its shallow map.

    A dense detector that is built without a config must name its ``head_in_features``: by default
    it would read every output.

    Args:
        fpn: FPN without a top block.
        top_block: makes the coarsest levels from the last deep map, as in detectron2's FPN.
        norm: norm of the convolutions of the bottom-up pathway.
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
        """Name of the shallow map of each level, by the name of the deep map."""
        strides = {name: shapes[name].stride for name in self.levels}
        strides |= {name: 2 ** int(name[1:]) for name in self._coarser_names()}
        strides |= {self.shallow_features[name]: strides[name] for name in self.levels}
        self._out_features = list(strides)
        self._out_feature_strides = strides
        self._out_feature_channels = dict.fromkeys(strides, channels)

    def _coarser_names(self) -> list[str]:
        """Return the names of the top block's outputs.

        Like detectron2's FPN, number the levels by log2(stride).
        """
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
        """Return all outputs by name, (N, C, H / stride, W / stride), for images (N, 3, H, W)."""
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

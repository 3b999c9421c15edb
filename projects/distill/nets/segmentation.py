"""What the semantic heads of this package share: everything behind the context module."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.projects.deeplab.loss import DeepLabCE
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

HARDEST = 0.2  # share of the pixels in hard_pixel_mining, as in detectron2's DeepLab


def conv_norm_relu(
    in_channels: int, channels: int, kernel_size: int, norm: str, dilation: int = 1
) -> Conv2d:
    """A convolution that keeps the size of its map, with a bias if there is no norm."""
    conv = Conv2d(
        in_channels,
        channels,
        kernel_size,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        bias=norm == "",
        norm=get_norm(norm, channels),
        activation=F.relu,
    )
    c2_msra_fill(conv)
    return conv


class PooledContext(nn.Sequential):
    """The mean of each of ``scale`` x ``scale`` parts of a map, convolved, as large as the map.

    A single part has a bias instead of a norm: it is one cell, of which a batch norm could make
    nothing with one picture and only signs with two. detectron2's ASPP does the same.
    """

    def __init__(self, in_channels: int, channels: int, scale: int, norm: str):
        conv = conv_norm_relu(in_channels, channels, 1, norm if scale > 1 else "")
        super().__init__(nn.AdaptiveAvgPool2d(scale), conv)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, channels, H, W)."""
        return resize(super().forward(x), x.shape[-2:])


class ContextBranches(nn.Module):
    """Views of one map side by side, and a 3x3 convolution over all of them.

    Args:
        branches: each (N, C, H, W) to (N, Ci, H, W).
        width: sum of the Ci, and C if ``keep_input``.
        channels: of the result.
        norm: of the last convolution.
        keep_input: the map itself is a view, the first one.
    """

    def __init__(
        self, branches: list[nn.Module], width: int, channels: int, norm: str, *, keep_input: bool
    ):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.bottleneck = conv_norm_relu(width, channels, 3, norm)
        self.keep_input = keep_input

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, channels, H, W)."""
        views = [x] if self.keep_input else []
        views += [branch(x) for branch in self.branches]
        return self.bottleneck(torch.cat(views, dim=1))


class AuxiliaryHead(nn.Module):
    """FCN on a map of the middle of the backbone: helps its training, and is left out elsewhere.

    Args:
        in_channels: a quarter of them is the width.
        num_classes: of the predictions.
        norm: of the convolution.
        dropout: probability that a channel is left out.
    """

    def __init__(self, in_channels: int, num_classes: int, norm: str, dropout: float):
        super().__init__()
        self.conv = conv_norm_relu(in_channels, in_channels // 4, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.predictor = predictor(in_channels // 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, K, H, W) logits."""
        return self.predictor(self.dropout(self.conv(x)))


def predictor(channels: int, num_classes: int) -> Conv2d:
    conv = Conv2d(channels, num_classes, kernel_size=1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


def resize(x: Tensor, size: Any) -> Tensor:
    """(N, C, H, W) to ``size``, bilinear, pixels having an area."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def mean_cross_entropy(logits: Tensor, labels: Tensor, ignore_value: int) -> Tensor:
    """Cross entropy averaged over the labelled pixels; a connected 0 without any.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W), of which ``ignore_value`` is no class.
    """
    total = F.cross_entropy(logits, labels, ignore_index=ignore_value, reduction="sum")
    return total / (labels != ignore_value).sum().clamp(min=1)


def pixel_loss(loss_type: str, ignore_value: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of (N, K, H, W) logits and (N, H, W) labels, by ``SEM_SEG_HEAD.LOSS_TYPE``.

    Raises:
        ValueError: an unknown type.
    """
    if loss_type == "cross_entropy":
        return partial(mean_cross_entropy, ignore_value=ignore_value)
    if loss_type == "hard_pixel_mining":
        return DeepLabCE(ignore_label=ignore_value, top_k_percent_pixels=HARDEST)
    raise ValueError(
        f"MODEL.SEM_SEG_HEAD.LOSS_TYPE is {loss_type}; valid: cross_entropy, hard_pixel_mining"
    )


class ContextHead(nn.Module):
    """Semantic head on one map: context, dropout, ``predictor``, and an auxiliary head.

    A subclass gives the context module in its ``from_config``. Logits are predicted at the stride
    of ``in_feature`` and enlarged bilinearly.

    Args:
        input_shape: of the backbone's outputs.
        in_feature: the output that the context sees.
        context: (N, C, H, W) to (N, ``channels``, H, W).
        channels: of the context.
        num_classes: K.
        norm: of the auxiliary head.
        dropout: probability that a channel is left out in front of a predictor.
        loss_type: ``cross_entropy`` over the labelled pixels, or ``hard_pixel_mining``: over the
            fifth of all pixels that has the largest.
        loss_weight: factor of both losses.
        ignore_value: label of the pixels without a class.
        aux_weight: factor of the auxiliary loss, besides; 0: no auxiliary head.
        aux_in_feature: the output of the backbone that the auxiliary head sees.

    Raises:
        ValueError: the backbone has no such output.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        in_feature: str,
        context: nn.Module,
        channels: int,
        num_classes: int,
        norm: str = "BN",
        dropout: float = 0.1,
        loss_type: str = "cross_entropy",
        loss_weight: float = 1.0,
        ignore_value: int = 255,
        aux_weight: float = 0.4,
        aux_in_feature: str = "res4",
    ):
        super().__init__()
        self.in_feature = in_feature
        self.context = context
        self.dropout = nn.Dropout2d(dropout)
        self.predictor = predictor(channels, num_classes)
        self.loss = pixel_loss(loss_type, ignore_value)
        self.loss_weight = loss_weight
        self.ignore_value = ignore_value  # SemanticSegmentor pads labels with it
        self.common_stride: int = input_shape[in_feature].stride
        self.aux_weight = aux_weight
        self.aux_in_feature = aux_in_feature
        self.aux_head = None
        if aux_weight:
            if aux_in_feature not in input_shape:
                raise ValueError(
                    f"MODEL.SEM_SEG_HEAD.AUX_IN_FEATURE is {aux_in_feature}; the backbone's "
                    f"outputs are {sorted(input_shape)}"
                )
            shape = input_shape[aux_in_feature]
            self.aux_head = AuxiliaryHead(shape.channels, num_classes, norm, dropout)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        node = cfg.MODEL.SEM_SEG_HEAD
        if len(node.IN_FEATURES) != 1 or node.IN_FEATURES[0] not in input_shape:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES is {list(node.IN_FEATURES)}; {cls.__name__} "
                f"reads one of the backbone's outputs {sorted(input_shape)}"
            )
        return {
            "input_shape": input_shape,
            "in_feature": node.IN_FEATURES[0],
            "num_classes": node.NUM_CLASSES,
            "norm": node.NORM,
            "dropout": node.ASPP_DROPOUT,
            "loss_type": node.LOSS_TYPE,
            "loss_weight": node.LOSS_WEIGHT,
            "ignore_value": node.IGNORE_VALUE,
            "aux_weight": node.AUX_WEIGHT,
            "aux_in_feature": node.AUX_IN_FEATURE,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """detectron2's contract.

        Args:
            features: (N, C, H / stride, W / stride) by name.
            targets: (N, H, W) labels, in training.

        Returns:
            In training None and the losses, in evaluation (N, K, H, W) logits and {}.
        """
        logits = self.layers(features)
        if self.training:
            return None, self.losses(logits, self.aux_logits(features), targets)
        height, width = logits.shape[-2:]
        return resize(logits, (height * self.common_stride, width * self.common_stride)), {}

    def layers(self, features: dict[str, Tensor]) -> Tensor:
        """Logits at the stride of ``in_feature``."""
        return self.predictor(self.dropout(self.context(features[self.in_feature])))

    def aux_logits(self, features: dict[str, Tensor]) -> Tensor | None:
        return self.aux_head(features[self.aux_in_feature]) if self.aux_head else None

    def losses(self, logits: Tensor, aux_logits: Tensor | None, targets: Any) -> dict[str, Tensor]:
        """``loss_sem_seg`` and, with an auxiliary head, ``loss_sem_seg_aux``."""
        losses = {"loss_sem_seg": self.pixel_losses(logits, targets) * self.loss_weight}
        if aux_logits is not None:
            factor = self.loss_weight * self.aux_weight
            losses["loss_sem_seg_aux"] = self.pixel_losses(aux_logits, targets) * factor
        return losses

    def pixel_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        # In float32: exponentials of half precision are coarse, and millions of them are summed.
        return self.loss(resize(logits.float(), targets.shape[-2:]), targets)

"""Shared parts of the semantic heads of this package: everything except the context module."""

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

HARDEST = 0.2  # share of the pixels that hard_pixel_mining uses, as in detectron2's DeepLab


def conv_norm_relu(
    in_channels: int, channels: int, kernel_size: int, norm: str, dilation: int = 1
) -> Conv2d:
    """Build a convolution that keeps the size of its map. It has a bias only without a norm."""
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
    """Mean over each part of a ``scale`` x ``scale`` grid, convolved and resized to the map.

    With ``scale`` 1 there is a single cell. A batch norm cannot normalize it with one image, and
    leaves only its sign with two. Therefore this case has a bias instead of a norm, as in
    detectron2's ASPP.
    """

    def __init__(self, in_channels: int, channels: int, scale: int, norm: str):
        conv = conv_norm_relu(in_channels, channels, 1, norm if scale > 1 else "")
        super().__init__(nn.AdaptiveAvgPool2d(scale), conv)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, channels, H, W)."""
        return resize(super().forward(x), x.shape[-2:])


class ContextBranches(nn.Module):
    """Several views of one map, concatenated and convolved 3x3.

    Args:
        branches: modules from (N, C, H, W) to (N, Ci, H, W).
        width: sum of the Ci, plus C if ``keep_input``.
        channels: channels of the result.
        norm: norm of the last convolution.
        keep_input: True to use the map itself as the first view.
    """

    def __init__(
        self, branches: list[nn.Module], width: int, channels: int, norm: str, *, keep_input: bool
    ):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.bottleneck = conv_norm_relu(width, channels, 3, norm)
        self.keep_input = keep_input

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, channels, H, W)."""
        views = [x] if self.keep_input else []
        views += [branch(x) for branch in self.branches]
        return self.bottleneck(torch.cat(views, dim=1))


class AuxiliaryHead(nn.Module):
    """FCN head on a map from the middle of the backbone. It is used only in training.

    Args:
        in_channels: channels of the map. The width of the head is a quarter of it.
        num_classes: K.
        norm: norm of the convolution.
        dropout: probability to drop a channel.
    """

    def __init__(self, in_channels: int, num_classes: int, norm: str, dropout: float):
        super().__init__()
        self.conv = conv_norm_relu(in_channels, in_channels // 4, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.predictor = predictor(in_channels // 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H, W) logits."""
        return self.predictor(self.dropout(self.conv(x)))


def predictor(channels: int, num_classes: int) -> Conv2d:
    """Build the 1x1 convolution that predicts the logits."""
    conv = Conv2d(channels, num_classes, kernel_size=1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


def resize(x: Tensor, size: Any) -> Tensor:
    """Resize (N, C, H, W) to ``size`` bilinearly (``align_corners`` False)."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def mean_cross_entropy(logits: Tensor, labels: Tensor, ignore_value: int) -> Tensor:
    """Return the mean cross entropy of the labelled pixels; a connected zero without any.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W); ``ignore_value`` is no class.
        ignore_value: label of the pixels without a class.
    """
    total = F.cross_entropy(logits, labels, ignore_index=ignore_value, reduction="sum")
    return total / (labels != ignore_value).sum().clamp(min=1)


def pixel_loss(loss_type: str, ignore_value: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss function for ``SEM_SEG_HEAD.LOSS_TYPE``.

    Args:
        loss_type: ``cross_entropy`` or ``hard_pixel_mining``.
        ignore_value: label of the pixels without a class.

    Returns:
        A function of (N, K, H, W) logits and (N, H, W) labels.

    Raises:
        ValueError: if the type is unknown.
    """
    if loss_type == "cross_entropy":
        return partial(mean_cross_entropy, ignore_value=ignore_value)
    if loss_type == "hard_pixel_mining":
        return DeepLabCE(ignore_label=ignore_value, top_k_percent_pixels=HARDEST)
    raise ValueError(
        f"MODEL.SEM_SEG_HEAD.LOSS_TYPE is {loss_type}; valid: cross_entropy, hard_pixel_mining"
    )


class ContextHead(nn.Module):
    """Base class of semantic heads on one map: context, dropout, predictor and auxiliary head.

    A subclass builds the context module in its ``from_config``. Logits are predicted at the stride
    of ``in_feature`` and enlarged bilinearly.

    Args:
        input_shape: shapes of the backbone's outputs.
        in_feature: backbone output that the context reads.
        context: module from (N, C, H, W) to (N, ``channels``, H, W).
        channels: output channels of the context.
        num_classes: K.
        norm: norm of the auxiliary head.
        dropout: probability to drop a channel before a predictor.
        loss_type: ``cross_entropy`` is the mean over the labelled pixels. ``hard_pixel_mining`` is
            the mean over the fifth of all pixels with the largest cross entropy.
        loss_weight: factor of both losses.
        ignore_value: label of the pixels without a class.
        aux_weight: additional factor of the auxiliary loss. 0 means no auxiliary head.
        aux_in_feature: backbone output that the auxiliary head reads.

    Raises:
        ValueError: if the backbone has no such output.
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
        """Follow the contract of detectron2's semantic heads.

        Args:
            features: (N, C, H / stride, W / stride) by name.
            targets: (N, H, W) labels; needed in training.

        Returns:
            In training None and the losses; in evaluation (N, K, H, W) logits and {}.
        """
        logits = self.layers(features)
        if self.training:
            return None, self.losses(logits, self.aux_logits(features), targets)
        height, width = logits.shape[-2:]
        return resize(logits, (height * self.common_stride, width * self.common_stride)), {}

    def layers(self, features: dict[str, Tensor]) -> Tensor:
        """Return the logits at the stride of ``in_feature``."""
        return self.predictor(self.dropout(self.context(features[self.in_feature])))

    def aux_logits(self, features: dict[str, Tensor]) -> Tensor | None:
        """Return the logits of the auxiliary head, or None if there is no such head."""
        return self.aux_head(features[self.aux_in_feature]) if self.aux_head else None

    def losses(self, logits: Tensor, aux_logits: Tensor | None, targets: Any) -> dict[str, Tensor]:
        """Return ``loss_sem_seg`` and, with an auxiliary head, ``loss_sem_seg_aux``."""
        losses = {"loss_sem_seg": self.pixel_losses(logits, targets) * self.loss_weight}
        if aux_logits is not None:
            factor = self.loss_weight * self.aux_weight
            losses["loss_sem_seg_aux"] = self.pixel_losses(aux_logits, targets) * factor
        return losses

    def pixel_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits that are enlarged to the size of the labels."""
        # float32: exponentials in half precision are coarse, and millions of them are summed.
        return self.loss(resize(logits.float(), targets.shape[-2:]), targets)

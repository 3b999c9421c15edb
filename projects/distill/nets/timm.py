"""timm backbones with maps of several strides, as bottom-ups of detectron2's necks."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class TimmBackbone(Backbone):
    """The maps of a timm model under detectron2's names, by stride: "res2" (4) to "res5" (32).

    Args:
        features: timm model that was built with ``features_only=True``.
        norm_eval: True if batch norms keep their loaded statistics in training.
    """

    def __init__(self, features: nn.Module, norm_eval: bool = False):
        super().__init__()
        self.features = features
        self.norm_eval = norm_eval
        info: Any = features.feature_info
        strides, channels = info.reduction(), info.channels()
        self._out_features = [f"res{stride.bit_length() - 1}" for stride in strides]
        self._out_feature_strides = dict(zip(self._out_features, strides))
        self._out_feature_channels = dict(zip(self._out_features, channels))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return maps (N, C, H / stride, W / stride) by name for images (N, 3, H, W)."""
        return dict(zip(self._out_features, self.features(x)))

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Set the mode; with ``norm_eval`` batch norms stay in eval mode."""
        super().train(mode)
        for module in self.modules() if self.norm_eval else ():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build ``MODEL.TIMM.NAME`` with its maps of stride 4 and more, or those of ``OUT_INDICES``.

    ``MODEL.BACKBONE.FREEZE_AT`` and ``MODEL.RESNETS`` are not read. As for every backbone, images
    are normalized with ``MODEL.PIXEL_MEAN`` and ``PIXEL_STD``. Most weights of timm were trained on
    RGB with 123.675, 116.28, 103.53 and 58.395, 57.12, 57.375.

    Raises:
        ValueError: if timm has no such model, or the model has no suitable maps. Transformers with
            one stride, a fixed image size or channels last have none. Also if there is no file
            ``WEIGHTS``, or if it lacks weights of the model.
    """
    import timm

    node = cfg.MODEL.TIMM
    if not timm.is_model(node.NAME):
        near = ", ".join(get_close_matches(node.NAME, timm.list_models(), 8)) or "none"
        raise ValueError(f"MODEL.TIMM.NAME '{node.NAME}' is not a model of timm; nearest: {near}")
    if node.WEIGHTS and not os.path.isfile(node.WEIGHTS):
        raise ValueError(f"MODEL.TIMM.WEIGHTS '{node.WEIGHTS}' does not exist")
    indices = tuple(node.OUT_INDICES) or _indices_from_stride_4(node.NAME, input_shape.channels)
    options = {"features_only": True, "out_indices": indices, "in_chans": input_shape.channels}
    if node.WEIGHTS:
        features = _build_from_file(node.NAME, node.WEIGHTS, options)
    else:
        features = _build_from_timm(node.NAME, node.PRETRAINED, options)
    _check_maps(node.NAME, features, input_shape.channels)
    return TimmBackbone(features, node.NORM_EVAL)


@torch.no_grad()
def _check_maps(name: str, features: nn.Module, channels: int) -> None:
    """Raise ValueError if the maps are not (N, C, H / stride, W / stride).

    The strides must be rising powers of 2.
    """
    height, width = 128, 192
    try:
        maps = features.eval()(torch.zeros(1, channels, height, width))
    except (AssertionError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise ValueError(
            f"MODEL.TIMM.NAME '{name}' accepts only images of one size ({reason}); use a model "
            "for any size"
        ) from e
    finally:
        features.train()
    info: Any = features.feature_info
    strides = info.reduction()
    shapes = [tuple(x.shape[1:]) for x in maps]
    if shapes != [(c, height // s, width // s) for c, s in zip(info.channels(), strides)]:
        raise ValueError(
            f"MODEL.TIMM.NAME '{name}' returns maps of shapes {shapes} for a {height} x {width} "
            "image; they must be (channels, height / stride, width / stride)"
        )
    if any(s.bit_count() != 1 for s in strides) or sorted(set(strides)) != strides:
        raise ValueError(
            f"MODEL.TIMM.NAME '{name}' has maps of strides {strides}; a neck needs rising powers "
            "of 2, such as 4, 8, 16, 32"
        )


def _indices_from_stride_4(name: str, channels: int) -> tuple[int, ...]:
    """Return the indices of the maps of stride 4 and more."""
    import timm

    model: Any = timm.create_model(name, features_only=True, in_chans=channels)
    strides = model.feature_info.reduction()
    return tuple(i for i, stride in enumerate(strides) if stride >= 4)


def _build_from_timm(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Build a model, with timm's own weights if ``pretrained``."""
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as e:
        if not pretrained:
            raise
        reason = " ".join(str(e).split())[:300]
        raise ValueError(
            f"MODEL.TIMM.PRETRAINED is True, but the weights of {name} cannot be downloaded "
            f"({reason}); set it to False, or MODEL.TIMM.WEIGHTS to a file of these weights"
        ) from e


def _build_from_file(name: str, path: str, options: dict[str, Any]) -> Any:
    """Build a model with the weights of a file. No code of the file is executed.

    If a file lacks weights, timm leaves them at their initialization and only logs it. timm also
    renames and reshapes weights when it loads them. Therefore this compares values, not names. Only
    those of the first convolution may differ: timm adapts it to images without three channels.

    Raises:
        ValueError: if the file does not belong to this model.
    """
    import timm

    source = f"MODEL.TIMM.WEIGHTS '{path}'"
    try:
        known = set(_digests(timm.models.load_state_dict(path).values()))
        overlay = {"file": path}
        model: Any = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, **options
        )
    except Exception as e:  # for corrupt files, the readers raise exceptions of many types
        reason = " ".join(str(e).split())[:300]
        raise ValueError(f"{source} does not hold weights of {name} ({reason})") from e
    state = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    if options["in_chans"] != 3:
        first = model.pretrained_cfg["first_conv"].replace(".", "_")
        state = {k: v for k, v in state.items() if not k.replace(".", "_").startswith(first)}
    missing = [k for k, digest in zip(state, _digests(state.values())) if digest not in known]
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} of {len(state)} weights of {name}, such as "
            f"{missing[0]}; name the file that belongs to MODEL.TIMM.NAME"
        )
    return model


def _digests(tensors: Iterable[Tensor]) -> list[int]:
    """Return a hash of the values of each tensor."""
    return [hash(x.detach().cpu().float().contiguous().numpy().tobytes()) for x in tensors]

"""timm's backbones with maps of several strides as bottom-ups of detectron2's necks."""

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
    """A timm model's maps under detectron2's names, by stride: "res2" (4) to "res5" (32).

    Args:
        features: a timm model built with ``features_only=True``.
        norm_eval: batch norms keep the statistics that they were loaded with.
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
        """Maps (N, C, H / stride, W / stride) by name for (N, 3, H, W) pictures."""
        return dict(zip(self._out_features, self.features(x)))

    def train(self, mode: bool = True) -> "TimmBackbone":
        super().train(mode)
        for module in self.modules() if self.norm_eval else ():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """``MODEL.TIMM.NAME`` with maps of stride 4 and more, or those of ``OUT_INDICES``.

    ``MODEL.BACKBONE.FREEZE_AT`` and ``MODEL.RESNETS`` are not read. The pictures' mean and
    standard deviation are ``MODEL.PIXEL_MEAN`` and ``PIXEL_STD``, as of every backbone: most of
    timm's weights were trained on RGB with 123.675, 116.28, 103.53 and 58.395, 57.12, 57.375.

    Raises:
        ValueError: timm has no such model, it has no such maps (transformers of one stride, of a
            fixed size of pictures, or with channels last have not), there is no file ``WEIGHTS``,
            or the file lacks weights of the model.
    """
    import timm

    node = cfg.MODEL.TIMM
    if not timm.is_model(node.NAME):
        near = ", ".join(get_close_matches(node.NAME, timm.list_models(), 8)) or "none"
        raise ValueError(f"MODEL.TIMM.NAME '{node.NAME}' is no model of timm; nearest: {near}")
    if node.WEIGHTS and not os.path.isfile(node.WEIGHTS):
        raise ValueError(f"MODEL.TIMM.WEIGHTS: there is no file '{node.WEIGHTS}'")
    indices = tuple(node.OUT_INDICES) or _from_stride_4(node.NAME, input_shape.channels)
    options = {"features_only": True, "out_indices": indices, "in_chans": input_shape.channels}
    if node.WEIGHTS:
        features = _from_file(node.NAME, node.WEIGHTS, options)
    else:
        features = _of_timm(node.NAME, node.PRETRAINED, options)
    _check_maps(node.NAME, features, input_shape.channels)
    return TimmBackbone(features, node.NORM_EVAL)


@torch.no_grad()
def _check_maps(name: str, features: nn.Module, channels: int) -> None:
    """Refuse a model whose maps are not (N, C, H / stride, W / stride) of rising powers of 2."""
    height, width = 128, 192
    try:
        maps = features.eval()(torch.zeros(1, channels, height, width))
    except (AssertionError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise ValueError(f"MODEL.TIMM.NAME '{name}' is for pictures of one size ({reason})") from e
    finally:
        features.train()
    info: Any = features.feature_info
    strides = info.reduction()
    given = [tuple(x.shape[1:]) for x in maps]
    if given != [(c, height // s, width // s) for c, s in zip(info.channels(), strides)]:
        raise ValueError(f"MODEL.TIMM.NAME '{name}' has no maps (channels, height, width): {given}")
    if any(s.bit_count() != 1 for s in strides) or sorted(set(strides)) != strides:
        raise ValueError(f"MODEL.TIMM.NAME '{name}' has maps of strides {strides}, not 4, 8, ...")


def _from_stride_4(name: str, channels: int) -> tuple[int, ...]:
    """Indices of the maps of stride 4 and more."""
    import timm

    model: Any = timm.create_model(name, features_only=True, in_chans=channels)
    strides = model.feature_info.reduction()
    return tuple(i for i, stride in enumerate(strides) if stride >= 4)


def _of_timm(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as e:
        if not pretrained:
            raise
        reason = " ".join(str(e).split())[:300]
        raise ValueError(
            f"MODEL.TIMM.PRETRAINED: the weights of {name} cannot be had ({reason}); set it False, "
            "or MODEL.TIMM.WEIGHTS to a file of them"
        ) from e


def _from_file(name: str, path: str, options: dict[str, Any]) -> Any:
    """A model with the weights of a file; nothing that the file says is executed.

    timm leaves weights that a file lacks as they are initialised, and only logs it. It renames and
    reshapes what it loads: so values are compared, not names. Only the first convolution's may
    differ, which timm adapts to pictures that have not three channels.

    Raises:
        ValueError: the file is none of this model.
    """
    import timm

    named = f"MODEL.TIMM.WEIGHTS '{path}'"
    try:
        known = set(_digests(timm.models.load_state_dict(path).values()))
        overlay = {"file": path}
        model: Any = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, **options
        )
    except Exception as e:  # on broken bytes, the readers raise nearly anything
        reason = " ".join(str(e).split())[:300]
        raise ValueError(f"{named} is no file of weights of {name} ({reason})") from e
    state = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    if options["in_chans"] != 3:
        first = model.pretrained_cfg["first_conv"].replace(".", "_")
        state = {k: v for k, v in state.items() if not k.replace(".", "_").startswith(first)}
    missing = [k for k, digest in zip(state, _digests(state.values())) if digest not in known]
    if missing:
        raise ValueError(
            f"{named} lacks {len(missing)} of {len(state)} weights of {name}, such as "
            f"{missing[0]}; name the file that belongs to MODEL.TIMM.NAME"
        )
    return model


def _digests(tensors: Iterable[Tensor]) -> list[int]:
    return [hash(x.detach().cpu().float().contiguous().numpy().tobytes()) for x in tensors]

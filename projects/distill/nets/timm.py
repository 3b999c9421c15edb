"""timm's models as bottom-ups of detectron2's necks, and as feature extractors that teach."""

import os
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from math import ceil, lcm
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

    Maps of other strides, or of one stride, have timm's names, such as "blocks.11".

    Args:
        features: timm model that was built with ``features_only=True``.
        norm_eval: True if batch norms keep their loaded statistics in training.
        divisible: True if images must be padded to whole cells of every map.
    """

    def __init__(self, features: nn.Module, norm_eval: bool = False, divisible: bool = False):
        super().__init__()
        self.features = features
        self.norm_eval = norm_eval
        info: Any = features.feature_info
        strides, channels = info.reduction(), info.channels()
        self._size_divisibility = lcm(*strides) if divisible else 0
        self._out_features = info.module_name()
        if _suit_a_neck(strides):
            self._out_features = [f"res{stride.bit_length() - 1}" for stride in strides]
        self._out_feature_strides = dict(zip(self._out_features, strides))
        self._out_feature_channels = dict(zip(self._out_features, channels))

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

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
    node, channels = cfg.MODEL.TIMM, input_shape.channels
    features = _built(node, channels, _stages(node, channels))
    _check_maps(node.NAME, features, channels)
    strides = features.feature_info.reduction()
    if not _suit_a_neck(strides):
        raise ValueError(
            f"MODEL.TIMM.NAME '{node.NAME}' has maps of strides {strides}; a neck needs rising "
            "powers of 2, such as 4, 8, 16, 32"
        )
    return TimmBackbone(features, node.NORM_EVAL)


@BACKBONE_REGISTRY.register()
def build_timm_features(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build ``MODEL.TIMM.NAME`` for a :class:`~distill.nets.features.FeatureExtractor`.

    A transformer with one stride, such as DINOv2, has one map: the normalized patch tokens of its
    last block. Class and register tokens are left out. ``OUT_INDICES`` names other blocks, which
    the final norm normalizes, too. Position embeddings are resized to the image.

    Raises:
        ValueError: as :func:`build_timm_backbone`, but maps may have any strides.
    """
    node, channels = cfg.MODEL.TIMM, input_shape.channels
    _check_name(node.NAME)
    tokens = len(set(_all_strides(node.NAME))) == 1
    features = _built(node, channels, (_tokens if tokens else _stages)(node, channels))
    _check_maps(node.NAME, features, channels)
    return TimmBackbone(features, divisible=True)


def _suit_a_neck(strides: Sequence[int]) -> bool:
    """Return whether strides are rising powers of 2."""
    return all(s.bit_count() == 1 for s in strides) and sorted(set(strides)) == list(strides)


def _built(node: CfgNode, channels: int, create: Callable[..., Any]) -> Any:
    """Return the model that ``create`` makes, with the weights that a config names."""
    if node.WEIGHTS and not os.path.isfile(node.WEIGHTS):
        raise ValueError(f"MODEL.TIMM.WEIGHTS '{node.WEIGHTS}' does not exist")
    if node.WEIGHTS:
        return _with_weights_of_file(node, channels, create)
    return _with_weights_of_timm(node, create)


def _check_name(name: str) -> None:
    import timm

    if not timm.is_model(name):
        near = ", ".join(get_close_matches(name, timm.list_models(), 8)) or "none"
        raise ValueError(f"MODEL.TIMM.NAME '{name}' is not a model of timm; nearest: {near}")


def _all_strides(name: str) -> tuple[int, ...]:
    """Return the strides of all maps of a model, which is built for that."""
    import timm

    model: Any = timm.create_model(name, features_only=True)
    return tuple(model.feature_info.reduction())


def _stages(node: CfgNode, channels: int) -> Callable[..., Any]:
    """Return a function that builds a model with maps of stages, of stride 4 and more."""
    import timm

    _check_name(node.NAME)
    indices = tuple(node.OUT_INDICES)
    if not indices:
        indices = tuple(i for i, stride in enumerate(_all_strides(node.NAME)) if stride >= 4)
    options: dict[str, Any] = {"features_only": True, "in_chans": channels, "out_indices": indices}
    return partial(timm.create_model, node.NAME, **options)


def _tokens(node: CfgNode, channels: int) -> Callable[..., Any]:
    """Return a function that builds a transformer with maps of its normalized patch tokens."""
    import timm
    from timm.models._features import FeatureGetterNet

    def create(**weights: Any) -> Any:
        options = {"num_classes": 0, "in_chans": channels, **weights}
        try:
            model: Any = timm.create_model(node.NAME, dynamic_img_size=True, **options)
        except TypeError:  # its positions suit any size
            model = timm.create_model(node.NAME, **options)
        features: Any = FeatureGetterNet(model, tuple(node.OUT_INDICES) or 1, norm=True)
        features.pretrained_cfg = model.pretrained_cfg
        return features

    return create


@torch.no_grad()
def _check_maps(name: str, features: Any, channels: int) -> None:
    """Raise ValueError if the maps are not (N, C, H / stride, W / stride)."""
    strides = features.feature_info.reduction()
    unit = lcm(*strides)
    height, width = unit * ceil(128 / unit), unit * ceil(192 / unit)
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
    shapes = [tuple(x.shape[1:]) for x in maps]
    expected = [
        (c, height // s, width // s) for c, s in zip(features.feature_info.channels(), strides)
    ]
    if shapes != expected:
        raise ValueError(
            f"MODEL.TIMM.NAME '{name}' returns maps of shapes {shapes} for a {height} x {width} "
            "image; they must be (channels, height / stride, width / stride)"
        )


def _with_weights_of_timm(node: CfgNode, create: Callable[..., Any]) -> Any:
    """Return a model, with timm's own weights if ``PRETRAINED``."""
    try:
        return create(pretrained=node.PRETRAINED)
    except Exception as e:
        if not node.PRETRAINED:
            raise
        reason = " ".join(str(e).split())[:300]
        raise ValueError(
            f"MODEL.TIMM.PRETRAINED is True, but the weights of {node.NAME} cannot be downloaded "
            f"({reason}); set it to False, or MODEL.TIMM.WEIGHTS to a file of these weights"
        ) from e


def _with_weights_of_file(node: CfgNode, channels: int, create: Callable[..., Any]) -> Any:
    """Return a model with the weights of a file. No code of the file is executed.

    If a file lacks weights, timm leaves them at their initialization and only logs it. timm also
    renames and reshapes weights when it loads them. Therefore this compares values, not names. Only
    those of the first convolution may differ: timm adapts it to images without three channels.

    Raises:
        ValueError: if the file does not belong to this model.
    """
    import timm

    source = f"MODEL.TIMM.WEIGHTS '{node.WEIGHTS}'"
    try:
        known = set(_digests(timm.models.load_state_dict(node.WEIGHTS).values()))
        model = create(pretrained=True, pretrained_cfg_overlay={"file": node.WEIGHTS})
    except Exception as e:  # for corrupt files, the readers raise exceptions of many types
        reason = " ".join(str(e).split())[:300]
        raise ValueError(f"{source} does not hold weights of {node.NAME} ({reason})") from e
    state = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    if channels != 3:
        first = model.pretrained_cfg["first_conv"].replace(".", "_")
        names = {k: k.removeprefix("model.").replace(".", "_") for k in state}
        state = {k: v for k, v in state.items() if not names[k].startswith(first)}
    missing = [k for k, digest in zip(state, _digests(state.values())) if digest not in known]
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} of {len(state)} weights of {node.NAME}, such as "
            f"{missing[0]}; name the file that belongs to MODEL.TIMM.NAME"
        )
    return model


def _digests(tensors: Iterable[Tensor]) -> list[int]:
    """Return a hash of the values of each tensor."""
    return [hash(x.detach().cpu().float().contiguous().numpy().tobytes()) for x in tensors]

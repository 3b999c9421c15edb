"""Networks of a user's own code as feature extractors, which only teach."""

import importlib.util
from math import lcm
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..utils.text import clause


class ModuleBackbone(Backbone):
    """The maps of any network that names the strides of its outputs.

    Args:
        network: it is called with RGB images (N, 3, H, W) in [0, 255], of whole cells of every map.
            It returns maps (N, C, H / stride, W / stride) by name. Its attribute ``strides`` has
            the stride of each name. A method ``detect(images)`` is optional. It returns a dict per
            image, as torchvision's detectors do. ``boxes`` are (R, 4) XYXY in pixels, ``scores``
            (R,) in [0, 1], and ``labels`` (R,).

    Raises:
        ValueError: the network has no strides, or maps of other shapes.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        strides: Any = getattr(network, "strides", None)
        if not isinstance(strides, dict) or not strides:
            raise ValueError(
                "the network needs an attribute `strides`, such as {'p3': 8, 'p4': 16}"
            )
        self.network = network
        self._out_feature_strides = {name: int(stride) for name, stride in strides.items()}
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = self._found_channels()

    @torch.no_grad()
    def _found_channels(self) -> dict[str, int]:
        unit = self.size_divisibility
        height, width = 2 * unit, 3 * unit
        maps = self.network.eval()(torch.zeros(1, 3, height, width))
        if not isinstance(maps, dict):
            raise ValueError(f"it returns a {type(maps).__name__}, not maps by name")
        for name, stride in self._out_feature_strides.items():
            shape = tuple(maps[name].shape) if name in maps else None
            size = (height // stride, width // stride)
            if shape is None or shape[:1] + shape[2:] != (1, *size):
                raise ValueError(
                    f"its map '{name}' of stride {stride} has shape {shape} for an image of "
                    f"{height} x {width} pixels; it must be (1, channels, {size[0]}, {size[1]})"
                )
        return {name: maps[name].shape[1] for name in self._out_features}

    @property
    def size_divisibility(self) -> int:
        return lcm(*self._out_feature_strides.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return maps (N, C, H / stride, W / stride) by name for images (N, 3, H, W)."""
        maps = self.network(x)
        return {name: maps[name] for name in self._out_features}

    @property
    def detects(self) -> bool:
        """True if the network has detections."""
        return callable(getattr(self.network, "detect", None))

    def detect(self, images: Tensor) -> list[Instances]:
        """Return the detections in images (N, 3, H, W), with pred_boxes, scores, pred_classes."""
        size = tuple(images.shape[-2:])
        return [
            Instances(
                size, pred_boxes=Boxes(x["boxes"]), scores=x["scores"], pred_classes=x["labels"]
            )
            for x in self.network.detect(images)  # type: ignore[operator]
        ]


@BACKBONE_REGISTRY.register()
def build_module_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build the network that the function ``MODEL.MODULE.FUNCTION`` returns.

    The function is called with ``MODEL.MODULE.WEIGHTS``. It is code, which only the user may allow.

    Raises:
        ValueError: it is not allowed, it fails, or it returns no network that can teach.
    """
    path, _, name = cfg.MODEL.MODULE.FUNCTION.rpartition(":")
    if not cfg.MODEL.get("ALLOW_CODE", False):
        raise ValueError(
            f"The teacher '{path}' is code; add 'MODEL.ALLOW_CODE True' to the command if you "
            "trust it"
        )
    if not Path(path).is_file():
        raise ValueError(f"there is no file '{path}'")
    spec: Any = importlib.util.spec_from_file_location("distill_teacher", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function = getattr(module, name)
        network = function(cfg.MODEL.MODULE.WEIGHTS)
    except Exception as e:  # it is code, which may raise anything
        raise ValueError(f"'{name}' of '{path}' raises {type(e).__name__} {clause(e)}") from e
    if not isinstance(network, nn.Module):
        raise ValueError(f"'{name}' of '{path}' returns a {type(network).__name__}, no nn.Module")
    return ModuleBackbone(network)

"""Networks of a user's own code as feature extractors, which only teach."""

import importlib.util
from math import ceil, lcm
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

LEAST_SIDE = 256  # a network is checked on such an image: some need hundreds of cells


class ModuleBackbone(Backbone):
    """The maps of any network that names the strides of its outputs.

    Args:
        network: it is called with RGB images (N, 3, H, W) in [0, 255], of whole cells of every map.
            It returns maps (N, C, H / stride, W / stride) by name. Its attribute ``strides`` has
            the stride of each name. Three more are optional:

            - ``detect(images)`` returns a dict per image, as torchvision's detectors do. ``boxes``
              are (R, 4) XYXY in pixels, ``scores`` (R,) in [0, 1], and ``labels`` (R,).
            - ``classes`` has the names of the labels, from label 0 on.
            - ``image_size`` is the height and width of every image, the sides of a square. By
              default a network takes images of any size.

    Raises:
        ValueError: the network has no strides, maps of other shapes, or wrong detections.
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
        self.classes: tuple[str, ...] = tuple(getattr(network, "classes", ()))
        self.image_size: tuple[int, int] | None = getattr(network, "image_size", None)
        self._out_feature_channels = self._found_channels()

    @torch.no_grad()
    def _found_channels(self) -> dict[str, int]:
        unit = self.size_divisibility or 1
        rows = ceil(LEAST_SIDE / unit)
        height, width = self.image_size or (rows * unit, (rows + 1) * unit)
        images = torch.zeros(1, 3, height, width)
        maps = self.network.eval()(images)
        if not isinstance(maps, dict):
            raise ValueError(f"it returns a {type(maps).__name__}, not maps by name")
        for name, stride in self._out_feature_strides.items():
            shape = tuple(maps[name].shape) if name in maps else None
            size = (ceil(height / stride), ceil(width / stride))
            if shape is None or shape[:1] + shape[2:] != (1, *size):
                raise ValueError(
                    f"its map '{name}' of stride {stride} has shape {shape} for an image of "
                    f"{height} x {width} pixels; it must be (1, channels, {size[0]}, {size[1]})"
                )
        if self.detects:
            _check_detections(self.network.detect(images), len(self.classes))  # type: ignore[operator]
        return {name: maps[name].shape[1] for name in self._out_features}

    @property
    def size_divisibility(self) -> int:
        return 0 if self.image_size else lcm(*self._out_feature_strides.values())

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"square_size": self.image_size[0]} if self.image_size else {}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return maps (N, C, H / stride, W / stride) by name for images (N, 3, H, W)."""
        maps = self.network(x)
        return {name: maps[name] for name in self._out_features}

    @property
    def detects(self) -> bool:
        """True if the network has detections."""
        return getattr(self.network, "detects", callable(getattr(self.network, "detect", None)))

    def detect(self, images: Tensor) -> list[Instances]:
        """Return the detections in images (N, 3, H, W), with pred_boxes, scores, pred_classes."""
        size = tuple(images.shape[-2:])
        return [
            Instances(
                size,
                pred_boxes=Boxes(x["boxes"]),
                scores=x["scores"],
                pred_classes=x["labels"].long(),
            )
            for x in self.network.detect(images)  # type: ignore[operator]
        ]


def _check_detections(found: Any, classes: int) -> None:
    """Raise ValueError unless detections in one image are as :class:`ModuleBackbone` says."""
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
        raise ValueError("its `detect` must return a list with a dict per image")
    shapes = {
        k: tuple(getattr(found[0].get(k), "shape", ())) for k in ("boxes", "scores", "labels")
    }
    number = shapes["boxes"][:1]
    if shapes != {"boxes": (*number, 4), "scores": number, "labels": number} or not number:
        raise ValueError(
            f"its `detect` returns {shapes} for an image; the shapes must be (R, 4), (R,) and (R,)"
        )
    labels = found[0]["labels"]
    if classes and number[0] and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(
            f"its `detect` returns labels in [{labels.min()}, {labels.max()}], but it names "
            f"{classes} classes"
        )


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

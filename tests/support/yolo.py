"""RTMDet and YOLO of any size, for the tests of their networks."""

import copy
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from torch import Tensor, nn

from distill.nets import add_nets_config

# Architecture -> name of the backbone and section of its keys.
NETWORKS = {
    "RTMDet": ("cspnext_pafpn", "CSPNEXT"),
    "RTMDetIns": ("cspnext_pafpn", "CSPNEXT"),
    "YOLOX": ("yolox_pafpn", "CSPDARKNET"),
    "YOLOv3": ("yolov3_fpn", "CSPDARKNET"),
    "YOLOv4": ("yolov4_pafpn", "CSPDARKNET"),
    "YOLOv5": ("yolov5_pafpn", "CSPDARKNET"),
    "YOLOv7": ("yolov7_pafpn", "CSPDARKNET"),
}
DEPTH_WIDTH = {
    "rtmdet tiny": (0.167, 0.375),
    "nano": (0.33, 0.25),
    "tiny": (0.33, 0.375),
    "s": (0.33, 0.5),
    "m": (0.67, 0.75),
    "l": (1.0, 1.0),
    "x": (1.33, 1.25),
}
TINY = (0.33, 0.125)
CLASSES = 3


def yolo_cfg(
    architecture: str, *opts: Any, depth_width: tuple[float, float] = TINY, classes: int = CLASSES
) -> CfgNode:
    """A plain detectron2 config with the keys of ``distill.nets``."""
    cfg = get_cfg()
    add_nets_config(cfg)
    backbone, section = NETWORKS[architecture]
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = architecture, "cpu"
    cfg.MODEL.BACKBONE.NAME = f"build_{backbone}_backbone"
    cfg.MODEL[section].DEPTH, cfg.MODEL[section].WIDTH = depth_width
    cfg.MODEL[architecture.upper()].NUM_CLASSES = classes
    cfg.merge_from_list(list(opts))
    return cfg


def yolo(architecture: str, *opts: Any) -> Any:
    """A tiny detector in evaluation mode with random weights, which finds many objects."""
    key = repr((architecture, opts))
    if key not in _built:
        torch.manual_seed(0)
        _built[key] = _outspoken(build_model(yolo_cfg(architecture, *opts)).eval())
    return copy.deepcopy(_built[key])


_built: dict[str, nn.Module] = {}


@torch.no_grad()
def _outspoken(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if module.weight.abs().max() < 0.1:  # drawn from a narrow distribution
                nn.init.normal_(module.weight, std=0.1)
            if module.bias is not None:
                module.bias.clamp_(min=-1)  # that of a class is -4.6
        elif isinstance(module, nn.BatchNorm2d):  # as after a training
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return model


class Sizes(NamedTuple):
    """Parameters of a detector and its parts, and 1e9 multiply-adds of its convolutions."""

    total: int
    backbone: int
    neck: int
    head: int
    gmac: float


def sizes(architecture: str, size: str, *opts: Any, side: int = 640, classes: int = 80) -> Sizes:
    """Return the sizes of a detector, for square images, without any memory for its weights."""
    cfg = yolo_cfg(architecture, *opts, depth_width=DEPTH_WIDTH[size], classes=classes)
    model = on_meta(cfg)
    parts = (model, model.backbone.bottom_up, model.backbone.graph, model.head)
    total, *others = map(parameters, parts)
    assert total == sum(others)
    return Sizes(total, *others, gmac(model, side))


def on_meta(cfg: CfgNode) -> Any:
    """Build a model in evaluation mode whose tensors have shapes only."""
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg).eval()


def parameters(model: nn.Module) -> int:
    return sum(x.numel() for x in model.parameters())


def gmac(model: Any, side: int) -> float:
    """Count the multiply-adds of convolutions of a model on the meta device."""
    counted = []
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):  # which are slow on the meta device
                setattr(module, name, nn.Identity())
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda conv, _, out: counted.append(out.numel() * conv.weight[0].numel())
            )
    features(model, torch.empty(1, 3, side, side, device="meta"))
    return sum(counted) / 1e9


@torch.no_grad()
def features(model: Any, pixels: Tensor) -> tuple[list[Tensor], Any]:
    """Return the maps that the head reads, and its output."""
    maps = model.backbone(pixels)
    read = [maps[name] for name in model.head_in_features]
    return read, model.head(read)


def inference(model: Any, predictions: Any, height: int, width: int) -> Any:
    """Return the detections of one image, given the output of the head."""
    images = ImageList(torch.empty(1, 0, height, width), [(height, width)])
    return model.forward_inference(images, predictions[0], predictions)[0]

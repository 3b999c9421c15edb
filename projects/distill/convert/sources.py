"""The authors' code of a detector: its names of tensors, and what its weights need of a config.

A name is translated in two steps. The beginning of it names a layer, which has a name in the tables
of :mod:`distill.nets`. Then regular expressions translate the parts inside the layer.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from torch import Tensor

from ..config import student_architecture
from ..errors import ConfigError
from ..utils.text import choices

Rules = tuple[tuple[str, str], ...]
"""Patterns and replacements, applied in this order."""


class Source(NamedTuple):
    """The authors' code of a detector.

    Attributes:
        code: name of the code base.
        layers: our names of layers, by the authors' names.
        rules: translate the parts of a name after the layer.
        tensors: Python expression of the state dict in a file's content ``c``.
        config: values by config key that these weights need.
        skipped: pattern of the beginning of names that have no counterpart; "$": there is no such.
        config_in: function of a file's content and state dict that returns further such values.
    """

    code: str
    layers: Mapping[str, str]
    rules: Rules
    tensors: str
    config: Mapping[str, Any]
    skipped: str = "$"
    config_in: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] = lambda *_: {}

    def renamed(self, name: str) -> str | None:
        """Return our name of a tensor, the same name if it is unknown, or None if it is skipped."""
        if re.match(self.skipped, name):
            return None
        parts = name.split(".")
        for depth in range(len(parts) - 1, 0, -1):
            layer = self.layers.get(".".join(parts[:depth]))
            if layer is not None:
                name = ".".join([layer, *parts[depth:]])
                for pattern, replacement in self.rules:
                    name = re.sub(pattern, replacement, name)
                return name
        return name


_BOTTOM_UP, _NECK = "backbone.bottom_up.graph.", "backbone.graph."
_NORM = (r"\.bn\.", ".norm.")
# These layers of the backbones add their blocks to the input.
_RESIDUAL = (r"(bottom_up\.graph\.(?:c2|c3|c4|csp)\.blocks\.\d+)\.", r"\1.branch.")


def _layers(bottom_up: str, neck: str, heads: Mapping[str, str]) -> dict[str, str]:
    """Return our names of layers by the authors' names, from pairs "ours: theirs"."""
    pairs = {
        theirs: prefix + ours
        for prefix, table in ((_BOTTOM_UP, bottom_up), (_NECK, neck))
        for ours, theirs in (pair.split(":") for pair in table.split())
    }
    return {**pairs, **heads}


# ---- RTMDet and RTMDet-Ins of mmdetection 3.


def _trained_with(content: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return how distances are predicted, according to the config text in a file of mmdet."""
    meta = content.get("meta")
    text = meta.get("cfg") if isinstance(meta, Mapping) else None
    found = re.search(r"exp_on_reg\W+(True|False)", text) if isinstance(text, str) else None
    return {"MODEL.RTMDET.EXP_ON_REG": found[1] == "True"} if found else {}


def _rtmdet(box_branch: str) -> Source:
    """Return the source of RTMDet.

    All levels have their convolutions in the file, although these are the same tensors.

    Args:
        box_branch: "reg", or "cls" if boxes are predicted from the branch of the classes.
    """
    return Source(
        code="mmdetection",
        layers=_layers(
            """stem1:backbone.stem.0 stem2:backbone.stem.1 c1:backbone.stem.2
            down1:backbone.stage1.0 c2:backbone.stage1.1 down2:backbone.stage2.0
            c3:backbone.stage2.1 down3:backbone.stage3.0 c4:backbone.stage3.1
            down4:backbone.stage4.0 spp:backbone.stage4.1 c5:backbone.stage4.2""",
            """r5:neck.reduce_layers.0 r4:neck.reduce_layers.1 t4:neck.top_down_blocks.0
            o3:neck.top_down_blocks.1 down3:neck.downsamples.0 down4:neck.downsamples.1
            o4:neck.bottom_up_blocks.0 o5:neck.bottom_up_blocks.1
            p3:neck.out_convs.0 p4:neck.out_convs.1 p5:neck.out_convs.2""",
            {
                "bbox_head.cls_convs": "head.cls_tower",
                "bbox_head.reg_convs": f"head.{box_branch}_tower",
                "bbox_head.kernel_convs": "head.kernel_towers",
                "bbox_head.rtm_cls": "head.cls_score",
                "bbox_head.rtm_reg": "head.bbox_pred",
                "bbox_head.rtm_kernel": "head.kernel_pred",
                "bbox_head.mask_head.fusion_conv": "head.fuse",
                "bbox_head.mask_head.stacked_convs": "head.mask_tower",
                "bbox_head.mask_head.projection": "head.prototypes",
            },
        ),
        rules=(
            (r"_tower\.\d+\.(\d+)\.conv\.", r"_tower.convs.\1."),
            (r"_tower\.(\d+)\.(\d+)\.bn\.", r"_tower.norms.\1.\2."),
            _NORM,
            (r"\.spp\.conv1\.", ".spp.first."),
            (r"\.spp\.conv2\.", ".spp.last."),
            (r"\.(main|short)_conv\.", r".\1."),
            (r"\.final_conv\.", ".last."),
            (r"(\.blocks\.\d+)\.conv1\.", r"\1.0."),
            (r"(\.blocks\.\d+)\.conv2\.depthwise_conv\.", r"\1.1.0."),
            (r"(\.blocks\.\d+)\.conv2\.pointwise_conv\.", r"\1.1.1."),
            _RESIDUAL,
        ),
        tensors="c['state_dict']",
        config={
            "INPUT.FORMAT": "BGR",
            "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
            "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
        },
        # mmcv's hook keeps the weights that are not averaged as these. mmengine's keeps them in
        # "ema_state_dict". With both, the averaged ones have the ordinary names.
        skipped="ema_",
        config_in=_trained_with,
    )


# ---- YOLOX and YOLOv5.


def _c3(conv: str, spp: str) -> Rules:
    """Return the rules of a network of C3 layers.

    Args:
        conv: name of a convolution in a layer, without its number.
        spp: our name of the layer with the pools.
    """
    return (
        _NORM,
        (rf"\.{spp}\.{conv}1\.", f".{spp}.first."),
        (rf"\.{spp}\.{conv}2\.", f".{spp}.last."),
        (rf"\.m\.(\d+)\.{conv}1\.", r".blocks.\1.0."),
        (rf"\.m\.(\d+)\.{conv}2\.", r".blocks.\1.1."),
        (rf"\.{conv}1\.", ".main."),
        (rf"\.{conv}2\.", ".short."),
        (rf"\.{conv}3\.", ".last."),
        _RESIDUAL,
    )


_YOLOX = Source(
    code="YOLOX",
    layers=_layers(
        """c1:backbone.backbone.stem
        down1:backbone.backbone.dark2.0 c2:backbone.backbone.dark2.1
        down2:backbone.backbone.dark3.0 c3:backbone.backbone.dark3.1
        down3:backbone.backbone.dark4.0 c4:backbone.backbone.dark4.1
        down4:backbone.backbone.dark5.0 spp:backbone.backbone.dark5.1
        c5:backbone.backbone.dark5.2""",
        """r5:backbone.lateral_conv0 t4:backbone.C3_p4 r4:backbone.reduce_conv1 p3:backbone.C3_p3
        down3:backbone.bu_conv2 p4:backbone.C3_n3 down4:backbone.bu_conv1 p5:backbone.C3_n4""",
        {
            "head.stems": "head.stems",
            "head.cls_convs": "head.cls_towers",
            "head.reg_convs": "head.reg_towers",
            "head.cls_preds": "head.cls_score",
            "head.reg_preds": "head.bbox_pred",
            "head.obj_preds": "head.objectness",
        },
    ),
    rules=(*_c3("conv", "spp"), (r"\.dconv\.", ".0."), (r"\.pconv\.", ".1.")),
    tensors="c['model']",
    config={
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    },
)

_YOLOV5_ANCHORS = "model.24.anchors"  # (levels, anchors, 2) in strides


def _anchors(content: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the anchors in a state dict of YOLOv5, in pixels."""
    anchors = state.get(_YOLOV5_ANCHORS)
    if not isinstance(anchors, Tensor) or anchors.ndim != 3:
        return {}
    levels = [(2 ** (3 + k) * x.float()).tolist() for k, x in enumerate(anchors)]
    return {"MODEL.YOLOV5.ANCHORS": [[[round(n, 1) for n in x] for x in level] for level in levels]}


_YOLOV5 = Source(
    code="YOLOv5",
    layers=_layers(
        """c1:model.0 down1:model.1 c2:model.2 down2:model.3 c3:model.4 down3:model.5 c4:model.6
        down4:model.7 csp:model.8 c5:model.9""",
        """r5:model.10 t4:model.13 r4:model.14 p3:model.17 down3:model.18 p4:model.20
        down4:model.21 p5:model.23""",
        {"model.24.m": "head.predictors"},
    ),
    rules=_c3("cv", "c5"),
    tensors="(c.get('ema') or c['model']).float().state_dict()",
    config={
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
        "MODEL.PIXEL_STD": [255.0, 255.0, 255.0],
    },
    skipped=re.escape(_YOLOV5_ANCHORS),
    config_in=_anchors,
)

ARCHITECTURES = ("RTMDet", "RTMDetIns", "YOLOX", "YOLOv5")


def source_of(cfg: CfgNode) -> Source:
    """Return the authors' code of the student of a config.

    Raises:
        ConfigError: it is another detector.
    """
    architecture = student_architecture(cfg)
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {architecture}; weights can be converted for "
            f"{choices(architecture, ARCHITECTURES)}."
        )
    if architecture == "RTMDetIns":
        return _rtmdet("cls" if cfg.MODEL.RTMDETINS.SHARED_BOX_BRANCH else "reg")
    return {"RTMDet": _rtmdet("reg"), "YOLOX": _YOLOX, "YOLOv5": _YOLOV5}[architecture]

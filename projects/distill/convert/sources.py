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


def _pairs(layer: str, parts: Mapping[str, object]) -> str:
    """Return pairs "ours:theirs" of the parts of a layer."""
    return " ".join(f"{layer}.{ours}:{theirs}" for ours, theirs in parts.items())


def _prefixed(table: str, prefix: str) -> str:
    """Return pairs in which their names, which are numbers, have a prefix."""
    return re.sub(r":(?=\d)", f":{prefix}.", table)


_RGB: dict[str, Any] = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
    "MODEL.PIXEL_STD": [255.0, 255.0, 255.0],
}


def _numbered(
    code: str,
    section: str,
    bottom_up: str,
    neck: str,
    detect: int,
    rules: Rules,
    heads: Mapping[str, str] | None = None,
) -> Source:
    """Return the source of a network whose layers are numbered, as those of YOLOv5.

    Args:
        code: name of the code base.
        section: name of the config section of the detector.
        bottom_up, neck: pairs "ours:number".
        detect: number of the layer that has the anchors.
        rules: as in :class:`Source`.
        heads: our names of the head's layers; None: the convolutions of ``detect``.
    """
    anchors = f"model.{detect}.anchor"  # (levels, anchors, 2) in strides, and a copy in pixels

    def config_in(content: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
        found = state.get(f"{anchors}s")
        if not isinstance(found, Tensor) or found.ndim != 3:
            return {}
        levels = [(2 ** (3 + k) * x.float()).tolist() for k, x in enumerate(found)]
        pixels = [[[round(n, 1) for n in x] for x in level] for level in levels]
        return {f"MODEL.{section}.ANCHORS": pixels}

    return Source(
        code=code,
        layers=_layers(
            _prefixed(bottom_up, "model"),
            _prefixed(neck, "model"),
            heads or {f"model.{detect}.m": "head.predictors"},
        ),
        rules=rules,
        tensors="(c.get('ema') or c['model']).float().state_dict()",
        config=_RGB,
        skipped=re.escape(anchors),
        config_in=config_in,
    )


_YOLOV5 = _numbered(
    code="YOLOv5",
    section="YOLOV5",
    bottom_up="c1:0 down1:1 c2:2 down2:3 c3:4 down3:5 c4:6 down4:7 csp:8 c5:9",
    neck="r5:10 t4:13 r4:14 p3:17 down3:18 p4:20 down4:21 p5:23",
    detect=24,
    rules=_c3("cv", "c5"),
)


# ---- YOLOv3 of ultralytics, YOLOv4 and YOLOv4-CSP of PyTorch_YOLOv4.

_BOTTLENECKS = (  # only those of the backbone are added to their input
    _NORM,
    (r"(bottom_up\..*)\.cv1\.", r"\1.branch.0."),
    (r"(bottom_up\..*)\.cv2\.", r"\1.branch.1."),
    (r"\.cv1\.", ".0."),
    (r"\.cv2\.", ".1."),
)

_YOLOV3 = _numbered(
    code="YOLOv3",
    section="YOLOV3",
    bottom_up="stem:0 down0:1 c1.0:2 down1:3 c2:4 down2:5 c3:6 down3:7 c4:8 down4:9 c5:10",
    neck="""t5.0:11 pooled:12 pooled.first:12.cv1 pooled.last:12.cv2 wide:13 b5:14 p5:15 r5:16
    t4.0:19 t4.1:20 b4:21 p4:22 r4:23 p3.0:26 p3.1:27.0 p3.2:27.1""",
    detect=28,
    rules=_BOTTLENECKS,
)


def _norm_csp(layer: str, n: int) -> str:
    """Return the pairs of a stage of YOLOv4-CSP."""
    ours = ("main", "short", "blocks.1", "last.1", "last.0.0", "blocks.0")
    theirs = (f"{n}.{part}" for part in ("cv1", "cv2", "cv3", "cv4", "bn", "m"))
    return _pairs(layer, dict(zip(ours, theirs)))


def _norm_csp_neck(layer: str, n: int) -> str:
    """Return the pairs of a layer of YOLOv4-CSP's neck."""
    ours = ("0", "1.short", "1.last.1", "1.last.0.0", "1.blocks")
    theirs = (f"{n}.{part}" for part in ("cv1", "cv2", "cv3", "bn", "m"))
    return _pairs(layer, dict(zip(ours, theirs)))


def _spp_csp(n: int, last: str) -> str:
    """Return the pairs of the pooling of YOLOv4-CSP and YOLOv7."""
    ours = ("main.0", "short", "main.1", "main.2", "blocks.1", "blocks.2", last)
    return _pairs("n5", {part: f"{n}.cv{k}" for k, part in enumerate(ours, 1)})


_YOLOV4_CSP = _numbered(
    code="PyTorch_YOLOv4",
    section="YOLOV4",
    bottom_up=f"""stem:0 down0:1 c1.0:2 down1:3 {_norm_csp("c2", 4)} down2:5 {_norm_csp("c3", 6)}
    down3:7 {_norm_csp("c4", 8)} down4:9 {_norm_csp("c5", 10)}""",
    neck=f"""{_spp_csp(11, "last.1")} n5.last.0.0:11.bn r5:12 s4:14 {_norm_csp_neck("n4", 16)}
    r4:17 s3:19 {_norm_csp_neck("o3", 21)} down3:22 {_norm_csp_neck("o4", 24)} down4:25
    {_norm_csp_neck("o5", 27)} p5:28 p4:30 p3:32""",
    detect=34,
    rules=_BOTTLENECKS,
    heads={f"model.{n}": f"head.predictors.{k}" for k, n in enumerate((33, 31, 29))},
)


def _csp_stage(layer: str, first: int, blocks: int) -> str:
    """Return the pairs of a stage of CSPDarknet53, whose convolutions have numbers of Darknet."""
    parts = {"short": first, "main": first + 2}
    for k in range(blocks):
        parts |= {f"blocks.0.{k}.branch.{i}": first + 3 * k + 3 + i for i in (0, 1)}
    end = first + 3 * blocks + 3
    return _pairs(layer, {**parts, "blocks.1": end, "last": end + 2})


def _chain(layer: str, first: int, convs: int) -> str:
    """Return the pairs of convolutions that follow each other."""
    return _pairs(layer, {str(k): first + k for k in range(convs)})


_YOLOV4_BOTTOM_UP = f"""stem:0 down0:1 {_csp_stage("c1", 2, 1)} down1:11 {_csp_stage("c2", 12, 2)}
down2:24 {_csp_stage("c3", 25, 8)} down3:55 {_csp_stage("c4", 56, 8)} down4:86
{_csp_stage("c5", 87, 4)}"""
_YOLOV4_NECK = f"""{_chain("n5.0", 105, 3)} {_chain("n5.2", 114, 3)} r5:117 s4:120
{_chain("n4", 122, 5)} r4:127 s3:130 {_chain("o3", 132, 5)} p3:137 down3:141
{_chain("o4", 143, 5)} p4:148 down4:152 {_chain("o5", 154, 5)} p5:159"""

_YOLOV4 = Source(
    code="PyTorch_YOLOv4",
    layers=_layers(
        _prefixed(_YOLOV4_BOTTOM_UP, "module_list"),
        _prefixed(_YOLOV4_NECK, "module_list"),
        {f"module_list.{n}.Conv2d": f"head.predictors.{k}" for k, n in enumerate((138, 149, 160))},
    ),
    rules=((r"\.Conv2d\.", ".conv."), (r"\.BatchNorm2d\.", ".norm.")),
    tensors="c['model']",
    config=_RGB,
)


# ---- YOLOv7.


def _elan(layer: str, first: int, stages: int, convs: int = 1) -> str:
    """Return the pairs of an ELAN, whose convolutions have numbers from ``first``."""
    inner = [f"stages.{k}.{i}" for k in range(stages) for i in range(convs)]
    parts = {part: first + k for k, part in enumerate(["short", "main", *inner])}
    return _pairs(layer, {**parts, "last": first + len(parts) + 1})


def _pool_down(layer: str, pool: int) -> str:
    """Return the pairs of a downsampling whose maximum has a number."""
    return _pairs(layer, {"pooled.1": pool + 1, "strided.0": pool + 2, "strided.1": pool + 3})


def _rep_conv(layer: str, n: int) -> str:
    """Return the pairs of a RepConv."""
    ours = ("spatial", "spatial_norm", "point", "point_norm")
    theirs = (f"{n}.rbr_{part}" for part in ("dense.0", "dense.1", "1x1.0", "1x1.1"))
    return _pairs(layer, dict(zip(ours, theirs)))


def _yolov7(bottom_up: str, neck: str, detect: int) -> Source:
    """Return the source of a network of YOLOv7's code.

    Args:
        bottom_up, neck, detect: as in :func:`_numbered`.
    """
    return _numbered(
        code="YOLOv7",
        section="YOLOV7",
        bottom_up=bottom_up,
        neck=neck,
        detect=detect,
        rules=(_NORM, (r"^head\.(\w+)\.(\d)\.implicit$", r"head.predictors.\2.\1")),
        heads={
            f"model.{detect}.m": "head.predictors",
            f"model.{detect}.ia": "head.added",
            f"model.{detect}.im": "head.factor",
        },
    )


_YOLOV7 = _yolov7(
    f"""stem:0 down0:1 c1:2 down1:3 {_elan("c2", 4, 2, 2)} {_pool_down("down2", 12)}
    {_elan("c3", 17, 2, 2)} {_pool_down("down3", 25)} {_elan("c4", 30, 2, 2)}
    {_pool_down("down4", 38)} {_elan("c5", 43, 2, 2)}""",
    f"""{_spp_csp(51, "last")} r5:52 s4:54 {_elan("n4", 56, 4)} r4:64 s3:66 {_elan("o3", 68, 4)}
    {_pool_down("down3", 76)} {_elan("o4", 81, 4)} {_pool_down("down4", 89)} {_elan("o5", 94, 4)}
    {_rep_conv("p3", 102)} {_rep_conv("p4", 103)} {_rep_conv("p5", 104)}""",
    105,
)
_YOLOV7_TINY = _yolov7(
    f"""stem:0 down1:1 {_elan("c2", 2, 2)} {_elan("c3", 9, 2)} {_elan("c4", 16, 2)}
    {_elan("c5", 23, 2)}""",
    f"""n5.short:29 n5.main:30 n5.blocks.1:35 n5.last:37 r5:38 s4:40 {_elan("n4", 42, 2)} r4:48
    s3:50 {_elan("o3", 52, 2)} down3:58 {_elan("o4", 60, 2)} down4:66 {_elan("o5", 68, 2)}
    p3:74 p4:75 p5:76""",
    77,
)

_SOURCES = {
    "RTMDet": _rtmdet("reg"),
    "YOLOX": _YOLOX,
    "YOLOv3": _YOLOV3,
    "YOLOv4": _YOLOV4,
    "YOLOv5": _YOLOV5,
    "YOLOv7": _YOLOV7,
}
_VARIANTS = {  # by backbone
    "build_yolov4_csp_pafpn_backbone": _YOLOV4_CSP,
    "build_yolov7_tiny_pafpn_backbone": _YOLOV7_TINY,
}
ARCHITECTURES = (*_SOURCES, "RTMDetIns")


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
    return _VARIANTS.get(cfg.MODEL.BACKBONE.NAME, _SOURCES[architecture])

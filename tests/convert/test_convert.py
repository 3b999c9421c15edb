"""Test the conversion of the authors' weights: equal outputs, sizes, and what is refused."""

import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from distill import cli
from distill.checkpoint.load import load_strictly
from distill.config import get_distill_cfg
from distill.convert import check_config, converted
from distill.convert.reader import read_content
from distill.convert.sources import source_of
from distill.errors import ConfigError, WeightsError
from distill.nets import YOLOv5
from tests.reference import released
from tests.support.cases import for_each
from tests.support.networks import write_config
from tests.support.pickles import PICKLES, zipped
from tests.support.yolo import DEPTH_WIDTH, NETWORKS, features, on_meta, parameters

TINY = (0.33, 0.125)
CLASSES = 3
IMAGE = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
INPUTS = {
    "RTMDet": ("BGR", [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]),
    "RTMDetIns": ("BGR", [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]),
    "YOLOX": ("BGR", [0.0] * 3, [1.0] * 3),
    **dict.fromkeys(("YOLOv3", "YOLOv4", "YOLOv5", "YOLOv7"), ("RGB", [0.0] * 3, [255.0] * 3)),
}
NANO = ("MODEL.CSPDARKNET.DEPTHWISE", True, "MODEL.YOLOX.DEPTHWISE", True)
OF_TINY_AND_S = ("MODEL.RTMDET.EXP_ON_REG", False)
SEPARATE = ("MODEL.RTMDETINS.SHARED_BOX_BRANCH", False)
DEEP = ("MODEL.CSPDARKNET.DEPTH", 1.0)  # numbers of their layers depend on the depth
SPP = ("MODEL.BACKBONE.NAME", "build_yolov3_spp_fpn_backbone", *DEEP)
CSP = ("MODEL.BACKBONE.NAME", "build_yolov4_csp_pafpn_backbone")
OF_TINY = (
    *("MODEL.BACKBONE.NAME", "build_yolov7_tiny_pafpn_backbone", *DEEP),
    *("MODEL.YOLOV7.ANCHORS", YOLOv5.section["ANCHORS"].default),
)
CASES: dict[str, tuple[str, Callable[..., Any], tuple[Any, ...]]] = {
    "RTMDet": ("RTMDet", released.RTMDet, OF_TINY_AND_S),
    "RTMDet-Ins": ("RTMDetIns", lambda *x, **kw: released.RTMDet(*x, masks=True, **kw), ()),
    "separate": ("RTMDetIns", lambda *x, **kw: released.RTMDet(*x, masks=True, **kw), SEPARATE),
    "YOLOX": ("YOLOX", released.YOLOX, ()),
    "YOLOX nano": ("YOLOX", lambda *x, **kw: released.YOLOX(*x, depthwise=True, **kw), NANO),
    "YOLOv5": ("YOLOv5", released.YOLOv5, ()),
    "YOLOv3": ("YOLOv3", released.YOLOv3, DEEP),
    "YOLOv3-SPP": ("YOLOv3", lambda *x, **kw: released.YOLOv3(*x, spp=True, **kw), SPP),
    "YOLOv4": ("YOLOv4", released.YOLOv4, DEEP),
    "YOLOv4-CSP": ("YOLOv4", released.YOLOv4CSP, CSP),
    "YOLOv7": ("YOLOv7", released.YOLOv7, DEEP),
    "YOLOv7-tiny": ("YOLOv7", released.YOLOv7Tiny, OF_TINY),
}


def config(
    architecture: str,
    *opts: Any,
    depth_width: tuple[float, float] = TINY,
    classes: int = CLASSES,
) -> CfgNode:
    """Return a config with the authors' input."""
    cfg = get_distill_cfg()
    backbone, section = NETWORKS[architecture]
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = architecture, "cpu"
    cfg.MODEL.BACKBONE.NAME = f"build_{backbone}_backbone"
    cfg.MODEL.MASK_ON = architecture == "RTMDetIns"
    cfg.MODEL[section].DEPTH, cfg.MODEL[section].WIDTH = depth_width
    cfg.MODEL[architecture.upper()].NUM_CLASSES = classes
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = INPUTS[architecture]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.merge_from_list(list(opts))
    return cfg


def outputs(model: Any) -> tuple[Any, ...]:
    return features(model.eval(), IMAGE)[1]


def check_outputs(architecture: str, found: Any, expected: released.Maps) -> None:
    """Compare the outputs of a head, which has them in other units than the authors' code."""
    if architecture in ("YOLOv3", "YOLOv4", "YOLOv5", "YOLOv7"):
        logits, _, objectness, raw = found
        found = [
            torch.cat([x.unflatten(1, (3, -1)) for x in (b, o, c)], 2).flatten(1, 2)
            for b, o, c in zip(raw, objectness, logits)
        ]
        found = [found]
    elif architecture == "YOLOX":  # relative to the corner of a cell, not to its middle
        corner = torch.tensor([0.5, 0.5, 0.0, 0.0]).view(4, 1, 1)
        found = [found[0], [x + corner for x in found[1]], found[2]]
    elif architecture == "RTMDetIns":
        expected = [expected[0], [x.relu() for x in expected[1]], *expected[2:]]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert b.std((2, 3)).max() > 0.01  # it is not the bias only
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- Equal outputs


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_authors_network(case: str) -> None:
    architecture, build, opts = CASES[case]
    cfg = config(architecture, *opts)
    theirs = build(*TINY)
    expected = theirs.forward(IMAGE, CLASSES)
    model = build_model(cfg)
    own = model.state_dict()
    state = converted(theirs.state, source_of(cfg), own)
    assert list(state) == list(own)
    model.load_state_dict(state)
    check_outputs(architecture, outputs(model), expected)
    check_config(cfg, source_of(cfg), {}, theirs.state)


def check_size(case: str, size: str, total: int) -> None:
    """Every tensor of a network of full size has its place, and their number is the published."""
    architecture, build, opts = CASES[case]
    cfg = config(architecture, *opts, depth_width=DEPTH_WIDTH[size], classes=80)
    theirs = build(*DEPTH_WIDTH[size], device="meta")
    theirs.forward(torch.empty(1, 3, 64, 64, device="meta"), 80)
    model = on_meta(cfg)
    names = {source_of(cfg).renamed(name): x.shape for name, x in theirs.state.items()}
    names.pop(None, None)  # anchors
    assert names == {name: x.shape for name, x in model.state_dict().items()}
    assert parameters(model) == total


def test_the_size_of_yolov5_n() -> None:
    check_size("YOLOv5", "nano", 1_872_157)


SIZES = [
    ("RTMDet", "m", 24_709_188),
    ("RTMDet-Ins", "rtmdet tiny", 5_638_187),
    ("YOLOX nano", "nano", 912_159),
    ("YOLOX", "m", 25_326_495),
    ("YOLOv5", "m", 21_190_557),
]


@pytest.mark.slow
@for_each("case, size, total", SIZES)
def test_sizes(case: str, size: str, total: int) -> None:
    check_size(case, size, total)


# ---- mmdetection itself


class _Ops(ModuleType):
    """Replacement of mmcv's compiled operations, which these networks do not call."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: None


@pytest.fixture
def mmdet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return mmdet 3 with a function ``build`` of a config's name; skip without mmdet."""
    pytest.importorskip("mmengine")
    monkeypatch.setitem(sys.modules, "mmcv._ext", _Ops("mmcv._ext"))
    module = pytest.importorskip("mmdet", exc_type=ImportError)
    pytest.importorskip("mmdet.models", exc_type=ImportError)
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    def build(name: str) -> tuple[Any, str]:
        cfg = Config.fromfile(Path(module.__file__).parent / ".mim" / "configs" / "rtmdet" / name)
        cfg.model.backbone.init_cfg = None  # it would be downloaded
        return module.registry.MODELS.build(cfg.model), cfg.pretty_text

    with DefaultScope.overwrite_default_scope("mmdet"):
        yield SimpleNamespace(build=build)


@torch.no_grad()
def trained(model: Any) -> nn.Module:
    """Give random weights the scale of trained ones, and norms the statistics of an image."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    model.train()
    model.bbox_head(model.neck(model.backbone(IMAGE)))
    for name, x in model.named_buffers():
        if name.endswith("running_var"):
            x.clamp_(min=0.1)  # pools make maps of one cell constant
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture, name",
    [
        ("RTMDet", "rtmdet_tiny_8xb32-300e_coco.py"),
        ("RTMDetIns", "rtmdet-ins_tiny_8xb32-300e_coco.py"),
    ],
)
def test_outputs_are_those_of_mmdet(architecture: str, name: str, mmdet: Any) -> None:
    torch.manual_seed(0)
    theirs, text = mmdet.build(name)
    trained(theirs)
    size = DEPTH_WIDTH["rtmdet tiny"]
    cfg = config(architecture, *OF_TINY_AND_S, depth_width=size, classes=80)
    model = build_model(cfg)
    state = theirs.state_dict()
    model.load_state_dict(converted(state, source_of(cfg), model.state_dict()))
    check_config(cfg, source_of(cfg), {"meta": {"cfg": text}}, state)
    with torch.no_grad():
        expected = list(theirs.bbox_head(theirs.neck(theirs.backbone(IMAGE))))
    expected[1] = [x / stride for x, stride in zip(expected[1], released.LEVELS)]
    expected[3:] = [[x] for x in expected[3:]]  # prototypes
    check_outputs(architecture, outputs(model), expected)


# ---- The command


class Convert:
    """The command in a folder, with the weights of one of :data:`CASES`."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self.capsys = folder, capsys
        self.out = folder / "out" / "teacher.pth"

    def state(self, case: str) -> dict[str, Tensor]:
        theirs = CASES[case][1](*TINY)
        theirs.forward(IMAGE, CLASSES)
        return theirs.state

    def __call__(self, case: str, content: Any, *opts: Any, out: str = "") -> int:
        architecture, _, own = CASES[case]
        weights = self.folder / "theirs.pth"
        if content is not None:
            torch.save(content, weights)
        path = write_config(config(architecture, *own, *opts), self.folder / "config.yaml")
        arguments = ["--config-file", str(path), "--weights", str(weights)]
        return cli.main(["convert", *arguments, "--out", out or str(self.out)])

    def fails(self, *args: Any, **kwargs: Any) -> str:
        """Return the one line on stderr; nothing is written."""
        assert self(*args, **kwargs) == 2
        (line,) = self.capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and not list(self.folder.rglob("teacher*"))
        return line


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    return Convert(tmp_path, capsys)


def test_the_result_is_a_stock_checkpoint(convert: Convert) -> None:
    theirs = released.YOLOX(*TINY)
    expected = theirs.forward(IMAGE, CLASSES)
    assert convert("YOLOX", {"model": theirs.state, "start_epoch": 300, "best_ap": 0.4}) == 0
    assert "wrote" in convert.capsys.readouterr().out
    model = build_model(config("YOLOX"))
    load_strictly(model, str(convert.out), "MODEL.WEIGHTS")
    check_outputs("YOLOX", outputs(model), expected)
    assert set(torch.load(convert.out, weights_only=True)) == {"model"}


def test_half_precision_becomes_single(convert: Convert) -> None:
    """YOLOv5's files have it, with anchors that are rounded."""
    state = convert.state("YOLOv5")
    half = {k: x.half() if x.is_floating_point() else x for k, x in state.items()}
    assert convert("YOLOv5", half) == 0
    model = build_model(config("YOLOv5"))
    load_strictly(model, str(convert.out), "MODEL.WEIGHTS")
    found = model.state_dict()["head.predictors.2.weight"]
    assert found.dtype is torch.float32 and torch.equal(found, half["model.24.m.2.weight"].float())


class HistoryBuffer:
    """Pickled as mmengine's, with an array and a method."""

    def __init__(self) -> None:
        self.log, self.mean = np.ones((2, 2)), self.average

    def average(self) -> None:
        """Stay a method of this object in the file."""


def test_a_checkpoint_of_mmengine(convert: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logs are Python objects, which are not read, and its averaged weights come first."""
    name = "mmengine.logging.history_buffer"
    module: Any = ModuleType(name)
    module.HistoryBuffer = HistoryBuffer
    monkeypatch.setattr(HistoryBuffer, "__module__", name)
    for part in ("mmengine", "mmengine.logging", name):
        monkeypatch.setitem(sys.modules, part, module)
    state = convert.state("RTMDet")
    content = {
        "state_dict": {**state, **{f"ema_{k.replace('.', '_')}": x + 1 for k, x in state.items()}},
        "ema_state_dict": {f"module.{k}": x + 1 for k, x in state.items()},
        "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}, "best": np.float64(0.4)},
        "meta": {"cfg": "bbox_head=dict(exp_on_reg=False)", "dataset_meta": {"CLASSES": ("a",)}},
    }
    assert convert("RTMDet", content) == 0
    found = torch.load(convert.out, weights_only=True)["model"]
    ours = found["backbone.bottom_up.graph.stem1.conv.weight"]
    assert torch.equal(ours, state["backbone.stem.0.conv.weight"])


# ---- Refused files and configs


def test_tensors_that_do_not_fit_are_named(convert: Convert) -> None:
    state = convert.state("YOLOX")
    cfg = config("YOLOX")
    own, source = build_model(cfg).state_dict(), source_of(cfg)
    cases: dict[str, dict[str, Any]] = {
        "backbone.graph.r5.conv.weight is missing": {
            k: x for k, x in state.items() if k != "backbone.lateral_conv0.conv.weight"
        },
        "head.iou_preds.0.weight is unexpected": {**state, "head.iou_preds.0.weight": IMAGE},
        "head.stems.1.conv.weight is not an ordinary tensor": {
            **state,
            "head.stems.1.conv.weight": 3,
        },
    }
    for words, content in cases.items():
        with pytest.raises(WeightsError) as e:
            converted(content, source, own)
        assert words in str(e.value) and str(e.value).endswith("size and number of classes.")
    every = {"x": IMAGE}
    with pytest.raises(WeightsError, match=r"is missing; .* and \d+ more; choose the config"):
        converted(every, source, own)


def test_another_number_of_classes(convert: Convert) -> None:
    content = {"model": convert.state("YOLOX")}
    line = convert.fails("YOLOX", content, "MODEL.YOLOX.NUM_CLASSES", 8)
    assert "head.cls_score.0.weight has shape (3, " in line


def test_convolutions_that_levels_do_not_share(convert: Convert) -> None:
    state = convert.state("RTMDet")
    name = "bbox_head.reg_convs.2.1.conv.weight"
    line = convert.fails("RTMDet", {"state_dict": {**state, name: state[name] + 1}})
    assert "bbox_head.reg_convs.1.1.conv.weight and bbox_head.reg_convs.2.1.conv.weight" in line


def test_box_branches_of_their_own(convert: Convert) -> None:
    """A model that was trained with them needs the key, and the message names both tensors."""
    state = convert.state("RTMDet-Ins")
    state = {k: x + ("reg_convs" in k and "conv.weight" in k) for k, x in state.items()}
    line = convert.fails("RTMDet-Ins", {"state_dict": state})
    assert "cls_convs.0.0.conv.weight and bbox_head.reg_convs.0.0.conv.weight of the" in line
    assert convert("separate", {"state_dict": state}) == 0


INPUT_KEYS = [
    ("YOLOX", ("INPUT.FORMAT", "RGB"), "INPUT.FORMAT is RGB"),
    ("RTMDet", ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0]), "need [57.375, 57.12, 58.395]"),
    ("YOLOv5", ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0]), "weights of YOLOv5 need [255.0"),
]


@for_each("case, opts, words", INPUT_KEYS)
def test_another_input(case: str, opts: tuple[str, Any], words: str) -> None:
    architecture, _, own = CASES[case]
    cfg = config(architecture, *own)
    check_config(cfg, source_of(cfg), {}, {})
    cfg.merge_from_list(list(opts))
    with pytest.raises(ConfigError) as e:
        check_config(cfg, source_of(cfg), {}, {})
    assert words in str(e.value)


def test_other_anchors() -> None:
    cfg = config("YOLOv5")
    state = {"model.24.anchors": released.YOLOv5.anchors() * torch.tensor([1.0, 1.1])}
    with pytest.raises(ConfigError, match=r"ANCHORS is .* need \[\[\[10.0, 14.3\], \[16.0, 33.0\]"):
        check_config(cfg, source_of(cfg), {}, state)
    fewer = {"model.24.anchors": released.YOLOv5.anchors()[:, :2]}
    with pytest.raises(ConfigError, match="ANCHORS"):
        check_config(cfg, source_of(cfg), {}, fewer)
    for case, number in (("YOLOv3", 28), ("YOLOv4-CSP", 34), ("YOLOv7", 105), ("YOLOv7-tiny", 77)):
        architecture, _, opts = CASES[case]
        cfg = config(architecture, *opts)
        state = {f"model.{number}.anchors": released.YOLOv5.anchors() * 2}
        with pytest.raises(ConfigError, match=rf"MODEL.{architecture.upper()}.ANCHORS is"):
            check_config(cfg, source_of(cfg), {}, state)


def test_distances_that_are_no_exponentials() -> None:
    """No name and no shape shows it, but the config text in the file does."""
    cfg = config("RTMDet", "MODEL.RTMDET.EXP_ON_REG", True)
    for text, right in (("exp_on_reg=True,", True), ("'exp_on_reg': False}", False), ("", True)):
        if right:
            check_config(cfg, source_of(cfg), {"meta": {"cfg": text}}, {})
        else:
            with pytest.raises(ConfigError, match=r"EXP_ON_REG is True, .* need False"):
                check_config(cfg, source_of(cfg), {"meta": {"cfg": text}}, {})


def test_classes_in_another_order() -> None:
    cfg = config("RTMDet", "DATASETS.TRAIN", ("coco_2017_train",), classes=80)
    names = ["person", "bicycle", "car"]
    for key in ("CLASSES", "classes"):
        check_config(cfg, source_of(cfg), {"meta": {"dataset_meta": {key: names}}}, {})
        wrong = {"meta": {"dataset_meta": {key: [names[0], "car", "bicycle"]}}}
        with pytest.raises(ConfigError, match=r"Class 1 of the weights is 'car', .* 'bicycle'"):
            check_config(cfg, source_of(cfg), wrong, {})


@for_each("content", [{}, {"meta": 3}, {"meta": {"cfg": 3, "dataset_meta": 4}}])
def test_strange_content_beside_the_weights(content: dict[str, Any]) -> None:
    cfg = config("RTMDet", *OF_TINY_AND_S)
    check_config(cfg, source_of(cfg), content, {})


class Pickled(nn.Module):
    """A module as in YOLOv5's own files."""


def test_a_pickled_module(convert: Convert) -> None:
    """The message has a command that saves its tensors."""
    line = convert.fails("YOLOv5", {"model": Pickled(), "ema": None})
    assert f"it calls {Pickled.__module__}.Pickled; " in line
    command = shlex.split(line[line.index("python -c") :])
    assert "(c.get('ema') or c['model']).float().state_dict()" in command[2]
    assert str(convert.folder / "theirs_tensors.pth") in command[2]
    compile(command[2], "command", "exec")


@for_each("name", ["os.system", "eval", "partial", "yaml", "a module that is known"])
def test_nothing_is_executed(name: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "theirs.pth"
    zipped(PICKLES[name](marker), path)
    with pytest.raises(Exception, match=r"it calls|not a checkpoint"):
        read_content(str(path), source_of(config("YOLOX")))
    assert not marker.exists()


def test_files_and_names(convert: Convert) -> None:
    assert "there is no file" in convert.fails("YOLOX", None)
    state = {"model": convert.state("YOLOX")}
    for out in ("x.pkl", "theirs.pth"):
        assert "that ends with .pth" in convert.fails("YOLOX", state, out=str(convert.folder / out))
    (convert.folder / "file").touch()
    folder = str(convert.folder / "file" / "x.pth")
    assert "cannot be written" in convert.fails("YOLOX", state, out=folder)
    assert "holds no weights" in convert.fails("YOLOX", {"epoch": 3})
    (convert.folder / "theirs.pth").write_bytes(b"no checkpoint")
    line = convert.fails("YOLOX", None)
    assert "cannot be read as a checkpoint" in line and "python -c" not in line


def test_another_detector() -> None:
    cfg = get_distill_cfg()
    cfg.MODEL.META_ARCHITECTURE = "FCOS"
    with pytest.raises(ConfigError, match=r"is FCOS; weights can be converted for .*YOLOv5"):
        source_of(cfg)

"""Every config file is named by one rule, has no line without information, and is built or run.

The rule: ``<data>/<student>.yaml`` is a network that trains without distillation, and
``<data>/<METHOD>/<teacher>-<student>.yaml`` distils into it.
"""

import json
import os
import pickle
import re
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.cityscapes import load_cityscapes_semantic
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from distill import DistillModel
from distill.config import (
    balance_mode,
    find_config,
    get_distill_cfg,
    load_config,
    student_config,
    teacher_config,
    validate_config,
)
from distill.data.shapes import SceneConfig, write_cityscapes, write_coco
from distill.engine import Trainer, setup_config
from distill.modeling.meta_arch import build_distill_model
from tests.support.cases import for_each
from tests.support.trainings import Shared
from tests.support.yolo import DEPTH_WIDTH

# On one worker, because each would load every file and build every network.
pytestmark = pytest.mark.xdist_group("config files")

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
BASES = [p for p in FILES if p.name.startswith("Base-")]
DISTILLATIONS = [p for p in FILES if len(p.relative_to(CONFIGS).parts) == 3]
NETWORKS = [p for p in FILES if p not in BASES + DISTILLATIONS]
FIRST = {p.parts[-3:-1]: p for p in reversed(DISTILLATIONS)}.values()  # one per method and data set
SHAPES = [p for p in NETWORKS + DISTILLATIONS if p.relative_to(CONFIGS).parts[0][:6] == "Shapes"]
DENSE = ("fcos", "atss", "gfl", "reppoints")

DATA = r"(COCO|PascalVOC|Cityscapes|KITTI|Shapes)"
TASK = r"(Detection|InstanceSegmentation|PanopticSegmentation|SemanticSegmentation)"
NETWORK = r"([a-z][a-z0-9_]*)_([RX]_\d+(?:_32x8d)?)(_FPN|_PAFPN)?(_\d+)?"
# These detectors have backbones of their own. The shapes' are named by the channels of P3 of their
# neck, others by the authors' names of sizes.
SIZED = r"(rtmdet|rtmdet_ins|yolox|yolov[3457])(?:_(tiny|s|m|l|x|spp|csp))?(_convnext_tiny)?"
WHOLE_NETWORK = rf"(rtmdet|rtmdet_ins|yolox|yolov[3457])_(PA)?FPN_\d+|{SIZED}"
PAPER = r"[Nn]ot reproduced here\.|Not in the paper's tables|no paper has it\."  # whose numbers
TWICE = {"SOLVER.MAX_ITER": 180_000, "SOLVER.STEPS": [120_000, 160_000]}  # 2x on COCO
HEADS = {  # by method, where segmentation papers add further heads to it
    "CIRKD": ["PixelKD", "CIRKD"],
    "CWD": ["CWDLogits", "CWD"],
    "IFVD": ["PixelKD", "IFVD"],
    "MasKD": ["MasKDLogits"],
    "SKD": ["PixelKD", "SKD"],
}
R_18 = {  # keys of Base-R-18.yaml
    "INPUT.FORMAT",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.RESNETS.DEPTH",
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "MODEL.WEIGHTS",
}
KITTI = {  # the MSSD paper trains for 200 epochs with 16 images per iteration
    "DATASETS.TRAIN": ["kitti_train"],
    "DATASETS.TEST": ["kitti_val"],
    "INPUT.MIN_SIZE_TRAIN": [640],
    "INPUT.MAX_SIZE_TRAIN": 640,
    "INPUT.MIN_SIZE_TEST": 640,
    "INPUT.MAX_SIZE_TEST": 640,
    "MODEL.FCOS.NUM_CLASSES": 3,
    "MODEL.RETINANET.NUM_CLASSES": 3,
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    **{f"MODEL.YOLOV{k}.NUM_CLASSES": 3 for k in (3, 4, 5, 7)},
    "MODEL.YOLOX.NUM_CLASSES": 3,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.BASE_LR_END": 0.001,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
    "SOLVER.MAX_ITER": 200 * 3712 // 16,
    "SOLVER.STEPS": [30_000],  # detectron2's default; a cosine has none
}


def name_of(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


@cache
def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def schedule_of(path: Path) -> str:
    """Return the schedule that a file sets itself."""
    schedule: str = read(path).get("SOLVER", {}).get("SCHEDULE", "1x")
    return schedule


def load(path: Path | str) -> CfgNode:
    cfg: CfgNode = pickle.loads(_loaded(str(path)))  # faster than a deep copy
    return cfg


@cache
def _loaded(path: str) -> bytes:
    return pickle.dumps(load_config(path))


def leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values by dotted key, tuples as lists."""
    values: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, dict):
            values |= leaves(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = list(value) if isinstance(value, tuple) else value
    return values


def differences(a: CfgNode, b: CfgNode) -> dict[str, Any]:
    """Return the values of ``b`` that are others in ``a``."""
    values = leaves(a)
    return {key: value for key, value in leaves(b).items() if value != values[key]}


@cache
def merges(path: Path) -> list[tuple[Path, str, Any]]:
    """Return (file, key, value) in the order in which a file and its ``_BASE_`` are merged."""
    bases = read(path).get("_BASE_", [])
    merged: list[tuple[Path, str, Any]] = []
    for base in [bases] if isinstance(bases, str) else bases:
        merged += merges(Path(os.path.normpath(path.parent / base)))
    for key, value in leaves(read(path)).items():
        if key != "_BASE_":
            decoded = CfgNode._decode_cfg_value(value)
            merged.append((path, key, list(decoded) if isinstance(decoded, tuple) else decoded))
    return merged


def test_no_line_is_without_information() -> None:
    """In a config that includes it, a line changes the value that was there before."""
    defaults = leaves(get_distill_cfg())
    informs: dict[tuple[Path, str], bool] = {}
    for path in NETWORKS + DISTILLATIONS:
        values = dict(defaults)
        for file, key, value in merges(path):
            informs[file, key] = informs.get((file, key), False) or value != values[key]
            values[key] = value
    assert not [f"{name_of(file)}: {key}" for (file, key), x in informs.items() if not x]
    assert {file for file, _ in informs}.issuperset(BASES)  # none is unused


def test_no_two_files_are_twins() -> None:
    """No two files have the same values, or values that differ only by the schedule."""
    schedule = {*TWICE, "SOLVER.SCHEDULE"}
    seen: dict[str, Path] = {}
    for path in NETWORKS + DISTILLATIONS:
        merged = {key: value for _, key, value in merges(path) if key not in schedule}
        assert seen.setdefault(repr(sorted(merged.items())), path) == path


def loaded_safely(path: Path) -> CfgNode:
    """Load a file that has no yaml tags and an output folder of its own."""
    assert "!!" not in path.read_text()
    cfg = load(path)
    folder = cfg.OUTPUT_DIR
    assert folder == f"output/{name_of(path)}"
    return cfg


@for_each("path", BASES)
def test_a_base_does_not_distil(path: Path) -> None:
    assert not loaded_safely(path).MODEL.DISTILL.HEADS


@pytest.mark.parametrize("path", NETWORKS, ids=name_of)
def test_a_network_is_named_by_the_rule(path: Path) -> None:
    assert not loaded_safely(path).MODEL.DISTILL.HEADS
    assert re.fullmatch(f"{DATA}-{TASK}/({NETWORK}|{WHOLE_NETWORK})", name_of(path))


@pytest.mark.parametrize("path", DISTILLATIONS, ids=name_of)
def test_a_distillation_is_named_by_the_rule_and_changes_only_the_distillation(path: Path) -> None:
    cfg = loaded_safely(path)
    node = cfg.MODEL.DISTILL
    data, method = path.parts[-3:-1]
    teacher, student = path.stem.split("-")

    heads = method.split("-")
    if data == "Cityscapes-SemanticSegmentation":
        heads = HEADS.get(method, heads)
    assert list(node.HEADS) == heads
    assert balance_mode(cfg) == ("gradient" if data.startswith("Shapes") else "none")

    assert read(path)["_BASE_"] == f"../{student}.yaml"
    baseline = load(path.parents[1] / f"{student}.yaml")
    changed = differences(baseline, cfg)
    del changed["OUTPUT_DIR"]
    scaled = {key: changed.pop(key) for key in TWICE if key in changed}
    assert scaled == {"1x": {}, "2x": TWICE}[schedule_of(path)]
    assert changed and all(key.startswith("MODEL.DISTILL.") for key in changed)
    assert student_config(cfg).MODEL == student_config(baseline).MODEL

    comment = path.read_text().partition("_BASE_")[0]
    text = " ".join(comment.replace("#", " ").split())
    backbones = [x.replace("_", "-") for x in re.findall(r"_([RX]_\d+)", path.stem)]
    assert re.match(rf"{method}, .*{' .*to .*'.join(backbones)}\b", text)
    assert data.startswith("Shapes") or re.search(PAPER, text)

    own = own_teacher(cfg)
    first = f"# First train the teacher: distill train --config-file {node.TEACHER.CONFIG_FILE}\n"
    assert (first in comment) == (own is not None)
    if teacher == "self":
        assert not node.TEACHER.CONFIG_FILE and "without a teacher" in text
    elif own:
        assert own.stem == teacher
        assert f"{load(own).OUTPUT_DIR}/model_final.pth" == node.TEACHER.WEIGHTS
    else:
        zoo(node.TEACHER.CONFIG_FILE.removesuffix(".yaml"))
        assert Path(node.TEACHER.CONFIG_FILE).stem in (teacher, f"{teacher}_3x")
        assert not node.TEACHER.WEIGHTS


def own_teacher(cfg: CfgNode) -> Path | None:
    """Return the teacher's file; None if there is no teacher, or a trained one in the model zoo."""
    if not cfg.MODEL.DISTILL.TEACHER.WEIGHTS:
        return None
    return Path(find_config(cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE))


def zoo(name: str) -> CfgNode:
    return load(model_zoo.get_config_file(f"{name}.yaml"))


def zoo_settings(name: str, reference: str) -> dict[str, Any]:
    """Return the values of a config of the model zoo that are others in the reference."""
    return differences(zoo(reference), zoo(name))


def data_settings(data: str, sizes: list[list[float]]) -> dict[str, Any]:
    """Return the values of a data folder that differ from COCO; ``sizes`` are COCO's anchors."""
    if data == "PascalVOC-Detection":
        detector = "faster_rcnn_R_50_FPN"
        voc = zoo_settings(f"{data}/{detector}", f"COCO-Detection/{detector}_1x")
        return voc | {"MODEL.GFL.NUM_CLASSES": 20, "MODEL.RETINANET.NUM_CLASSES": 20}
    if data == "Cityscapes-InstanceSegmentation":
        detector = "mask_rcnn_R_50_FPN"
        return zoo_settings(f"Cityscapes/{detector}", f"COCO-InstanceSegmentation/{detector}_1x")
    return KITTI | {"MODEL.ANCHOR_GENERATOR.SIZES": [[x / 2 for x in level] for level in sizes]}


def backbone_settings(backbone: str) -> dict[str, Any]:
    if backbone == "R_18":
        return {k: v for k, v in leaves(load(CONFIGS / "Base-R-18.yaml")).items() if k in R_18}
    if backbone == "R_50":
        return {"MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-50.pkl"}
    detector = "COCO-Detection/faster_rcnn"
    return zoo_settings(f"{detector}_{backbone}_FPN_3x", f"{detector}_R_50_FPN_3x")


@pytest.mark.parametrize("path", [p for p in NETWORKS if p not in SHAPES], ids=name_of)
def test_a_network_has_the_settings_of_its_authors(path: Path) -> None:
    if re.fullmatch(SIZED, path.stem):
        check_sized(path, load(path))
        return
    detector, backbone, neck, _ = re.fullmatch(NETWORK, path.stem).groups()  # type: ignore[union-attr]
    data = path.parent.name
    cfg = load(path)
    if data == "Cityscapes-SemanticSegmentation":
        check_semantic(path.stem, cfg)
        return
    expected = expected_dense if detector in DENSE else expected_of_detectron2
    values = expected(data, detector, neck) | backbone_settings(backbone)
    if schedule_of(path) == "2x":
        values |= TWICE
    values["OUTPUT_DIR"] = f"output/{name_of(path)}"
    changed = {k for k, v in leaves(cfg).items() if v != values[k]}
    # They have anchors or a box loss of their own.
    ignored = {"MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA"}
    assert changed <= (ignored if detector in DENSE else set())


def expected_of_detectron2(data: str, detector: str, neck: str | None) -> dict[str, Any]:
    folder = "Misc" if detector.startswith("cascade") else f"COCO-{data.split('-')[1]}"
    values = leaves(zoo(f"{folder}/{detector}_R_50{'_FPN' if neck else ''}_1x"))
    if not data.startswith("COCO"):
        values |= data_settings(data, values["MODEL.ANCHOR_GENERATOR.SIZES"])
    if neck == "_PAFPN":
        plain = values["MODEL.BACKBONE.NAME"]
        values["MODEL.BACKBONE.NAME"] = plain.replace("_fpn_", "_pafpn_")
    return values


def expected_dense(data: str, detector: str, neck: str) -> dict[str, Any]:
    """Return RetinaNet's values: the same images and schedule.

    P6 and P7 are made from P5; those of RepPoints, and of a PAFPN, from C5.
    """
    values = leaves(load(CONFIGS / f"COCO-Detection/retinanet_R_50{neck}.yaml"))
    if not data.startswith("COCO"):
        values |= data_settings(data, values["MODEL.ANCHOR_GENERATOR.SIZES"])
    if neck == "_FPN" and detector != "reppoints":
        values["MODEL.BACKBONE.NAME"] = "build_fcos_resnet_fpn_backbone"
    names = {"fcos": "FCOS", "atss": "ATSS", "gfl": "GFL", "reppoints": "RepPoints"}
    values["MODEL.META_ARCHITECTURE"] = names[detector]
    if detector == "reppoints":
        values["MODEL.FPN.NORM"] = "GN"
    return values


IMAGES = {"rtmdet": 117_266, "COCO-Detection": 118_287, "KITTI-Detection": 3712}
EPOCHS = {"COCO-Detection": 300, "COCO-InstanceSegmentation": 300, "KITTI-Detection": 200}


def check_sized(path: Path, cfg: CfgNode) -> None:
    """Compare with the authors' recipes; RTMDet's training images have objects."""
    detector, size, timm = re.fullmatch(SIZED, path.stem).groups()  # type: ignore[union-attr]
    data, rtmdet, solver = path.parent.name, detector.startswith("rtmdet"), cfg.SOLVER
    backbone = cfg.MODEL.CSPNEXT if rtmdet else cfg.MODEL.CSPDARKNET
    only = detector in ("yolov3", "yolov4", "yolov7")  # whose sizes are networks of their own
    key = "rtmdet tiny" if rtmdet and size == "tiny" else size
    assert DEPTH_WIDTH["l" if only else key] == (backbone.DEPTH, backbone.WIDTH)
    square = 0 if cfg.INPUT.MULTI_SCALE.PERIOD else 640
    assert square == backbone.SQUARE_PAD
    name = "timm_yolo" if timm else "cspnext" if rtmdet else path.stem if only else detector
    neck = "fpn" if detector == "yolov3" else "pafpn"
    assert f"build_{name}_{neck}_backbone" == cfg.MODEL.BACKBONE.NAME
    images = IMAGES["rtmdet" if rtmdet else data]
    epoch = images / solver.IMS_PER_BATCH
    assert int(EPOCHS[data] * epoch) == solver.MAX_ITER
    assert rtmdet == cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    assert (solver.WEIGHT_DECAY_NORM, solver.WEIGHT_DECAY_BIAS) == (0, 0)
    assert (100 if detector == "rtmdet_ins" else 300) == cfg.TEST.DETECTIONS_PER_IMAGE
    ratio = solver.BASE_LR_END / solver.BASE_LR
    if rtmdet:
        assert (detector != "rtmdet" or size in "mlx") == cfg.MODEL.RTMDET.EXP_ON_REG
        assert solver.OPTIMIZER == "ADAMW" and solver.WEIGHT_DECAY == 0.05
        assert (solver.BASE_LR / solver.IMS_PER_BATCH, ratio) == (0.004 / 256, 0.05)
        assert (solver.WARMUP_ITERS, solver.FLAT_FRACTION) == (1000, 0.5)
        return
    batch = 128 if (data, detector) == ("COCO-Detection", "yolov7") else 64
    assert (True, 0.01, batch) == (solver.NESTEROV, solver.BASE_LR, solver.IMS_PER_BATCH)
    assert 0.0005 * batch / 64 == solver.WEIGHT_DECAY
    last = {"yolox_s": 0.05, "yolov7_tiny": 0.01} if data == "COCO-Detection" else {}
    assert ratio == pytest.approx(last.get(path.stem, 0.1))
    if detector == "yolox":
        assert int(5 * epoch) == solver.WARMUP_ITERS and solver.FLAT_FRACTION == 0
        last = (EPOCHS[data] - 15) * epoch
        assert abs(cfg.MODEL.YOLOX.L1_FROM_ITER - last) < 1
    else:
        assert (250 if data == "KITTI-Detection" else round(3 * epoch)) == solver.WARMUP_ITERS
        assert (solver.WARMUP_BIAS_FACTOR, solver.WARMUP_MOMENTUM) == (10, 0.8)


def check_semantic(name: str, cfg: CfgNode) -> None:
    papers = {"pspnet_R_18": ("PSPHead", 18, 40_000), "deeplabv3_R_101": ("ASPPHead", 101, 80_000)}
    head, resnets = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.RESNETS
    assert papers[name] == (head.NAME, resnets.DEPTH, cfg.SOLVER.MAX_ITER)
    assert (resnets.RES4_DILATION, resnets.RES5_DILATION) == (2, 4)
    assert (head.NUM_CLASSES, head.AUX_WEIGHT, head.LOSS_TYPE) == (19, 0.4, "cross_entropy")
    assert resnets.NORM == head.NORM == "SyncBN" and cfg.MODEL.BACKBONE.FREEZE_AT == 0
    assert cfg.INPUT.CROP.ENABLED and tuple(cfg.INPUT.CROP.SIZE) == (512, 1024)
    assert cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPolyLR"


# Parameters of the authors' networks, counted on their code.
PARAMETERS = {
    "COCO-Detection/rtmdet_tiny": 4_896_168,
    "COCO-Detection/rtmdet_s": 8_886_924,
    "COCO-Detection/rtmdet_m": 24_709_188,
    "COCO-Detection/rtmdet_l": 52_315_804,
    "COCO-Detection/rtmdet_x": 94_855_572,
    "COCO-Detection/yolov3": 61_949_149,
    "COCO-Detection/yolov3_spp": 62_998_749,
    "COCO-Detection/yolov4": 64_363_101,
    "COCO-Detection/yolov4_csp": 52_924_765,
    "COCO-Detection/yolov5_s": 7_235_389,
    "COCO-Detection/yolov7": 37_622_682,
    "COCO-Detection/yolov7_tiny": 6_228_762,
    "COCO-Detection/yolox_s": 8_968_255,
    "COCO-InstanceSegmentation/rtmdet_ins_tiny": 5_638_187,
    "COCO-InstanceSegmentation/rtmdet_ins_s": 10_183_311,
    "COCO-InstanceSegmentation/rtmdet_ins_m": 27_575_111,
    "COCO-InstanceSegmentation/rtmdet_ins_l": 57_365_663,
    "COCO-InstanceSegmentation/rtmdet_ins_x": 102_703_767,
    "KITTI-Detection/yolov3": 61_534_504,
    "KITTI-Detection/yolov3_spp": 62_584_104,
    "KITTI-Detection/yolov4": 63_948_456,
    "KITTI-Detection/yolov4_csp": 52_510_120,
    "KITTI-Detection/yolov7": 37_207_344,
    "KITTI-Detection/yolov7_tiny": 6_020_400,
    "KITTI-Detection/yolov5_s": 7_027_720,
    "KITTI-Detection/yolov5_m": 20_879_400,
    "KITTI-Detection/yolov5_s_convnext_tiny": 27_818_592 + 517_888 + 2_834_688 + 21_576,
}


def is_quick(path: Path) -> bool:
    """Networks, but for timm's, which are built twice, and one distillation per method and data."""
    return (path in NETWORKS or path in FIRST) and "convnext" not in path.stem


@pytest.fixture(scope="module")
def meta_models() -> dict[str, torch.nn.Module]:
    """Students and teachers by :func:`described`: many distillations share one."""
    return {}


def described(name: str, cfg: CfgNode) -> str:
    """Return the keys that make a network of the architecture ``name``."""
    return repr((name, {k: v for k, v in cfg.MODEL.items() if k != "DISTILL"}, cfg.INPUT))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, marks=[] if is_quick(p) else pytest.mark.slow)
        for p in NETWORKS + DISTILLATIONS
        if p not in SHAPES
    ],
    ids=name_of,
)
def test_a_network_is_built(
    path: Path, meta_models: dict[str, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Build it on the meta device: no values of weights, and no download."""
    loaded: list[str] = []

    def build_once(name: str, config: CfgNode) -> torch.nn.Module:
        config.MODEL.DEVICE = "meta"
        key = described(name, config)
        if key not in meta_models:
            meta_models[key] = META_ARCH_REGISTRY.get(name)(config)
        return meta_models[key]

    students = mock.Mock(get=lambda name: partial(build_once, name))
    monkeypatch.setattr("distill.modeling.meta_arch.META_ARCH_REGISTRY", students)
    monkeypatch.setattr(
        "distill.modeling.teacher.build_model", lambda x: build_once(x.MODEL.META_ARCHITECTURE, x)
    )
    monkeypatch.setattr(
        "distill.modeling.teacher.load_strictly", lambda _, url, *a, **kw: loaded.append(url)
    )
    # Heads that compare anchors see their shapes; that the values agree is asserted below.
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: torch.zeros(x.shape, device="cpu"))
    for name in ("normal_", "uniform_"):  # torch takes its time to change nothing
        monkeypatch.setattr(torch.Tensor, name, lambda x, *args, **kw: x)
    cfg = load(path)
    validate_config(cfg)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_distill_model(cfg)
    if path in NETWORKS:
        assert type(model).__name__ == cfg.MODEL.META_ARCHITECTURE and not loaded
        if expected := PARAMETERS.get(name_of(path)):
            assert sum(x.numel() for x in model.parameters()) == expected
        return
    assert isinstance(model, DistillModel) and list(model.heads) == list(cfg.MODEL.DISTILL.HEADS)
    if path.stem.startswith("self-"):
        assert model.teacher is None and not loaded
        return
    assert model.teacher is not None
    if own := own_teacher(cfg):
        assert loaded == [f"{load(own).OUTPUT_DIR}/model_final.pth"]
    else:
        assert loaded == [model_zoo.get_checkpoint_url(cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE)]
    teacher = teacher_config(cfg)
    assert teacher.DATASETS.TRAIN == cfg.DATASETS.TRAIN
    assert teacher.MODEL.ANCHOR_GENERATOR == cfg.MODEL.ANCHOR_GENERATOR


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Overrides by kind of data: three images of two sizes, one of them without annotations."""
    root = tmp_path_factory.mktemp("mixed")
    sizes = {"square": (2, SceneConfig(height=64, width=64, min_size=0.25))}
    sizes["wide"] = (1, SceneConfig(height=64, width=96, min_size=0.25))
    triples = []
    for split, (count, scenes) in sizes.items():
        write_coco(root / "coco", split, count, config=scenes)
        write_cityscapes(root / "cityscapes", split, count, config=scenes)
        file = root / "coco" / "annotations" / f"instances_{split}.json"
        triples.append((f"mixed_{split}", str(file), str(root / "coco" / "images" / split)))
    file = root / "coco" / "annotations" / "instances_square.json"
    content = json.loads(file.read_text())
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] != 1]
    file.write_text(json.dumps(content))
    label = next((root / "cityscapes" / "gtFine").rglob("square_000000*labelTrainIds.png"))
    cv2.imwrite(str(label), np.full((64, 64), 255, np.uint8))  # everything ignored
    _register_semantic("mixed_semantic", root / "cityscapes", list(sizes))
    return {
        "coco": [
            *("DATASETS.COCO_FORMAT", triples, "DATASETS.TRAIN", [t[0] for t in triples]),
            *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False),
        ],
        "semantic": ["DATASETS.TRAIN", ["mixed_semantic"]],
    }


def _register_semantic(name: str, root: Path, splits: list[str]) -> None:
    folders = [(str(root / "leftImg8bit" / s), str(root / "gtFine" / s)) for s in splits]
    DatasetCatalog.register(
        name, lambda: [x for f in folders for x in load_cityscapes_semantic(*f)]
    )
    classes = MetadataCatalog.get("cityscapes_fine_sem_seg_train").stuff_classes
    MetadataCatalog.get(name).set(stuff_classes=classes, evaluator_type="cityscapes_sem_seg")


def write_random_teacher(path: Path, folder: Path) -> None:
    torch.manual_seed(1)
    model = build_model(student_config(teacher_config(load(path))))
    torch.save({"model": model.state_dict()}, folder / "teacher.pth")


@pytest.mark.e2e
@pytest.mark.parametrize("path", SHAPES, ids=name_of)
def test_a_config_of_the_shapes_trains_a_step(
    path: Path,
    mixed: dict[str, list[Any]],
    shared: Shared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = "semantic" if name_of(path).startswith("Shapes-SemanticSegmentation") else "coco"
    opts = [
        *mixed[data],
        *("DATASETS.TEST", [], "DATALOADER.ASPECT_RATIO_GROUPING", False),
        *("INPUT.MIN_SIZE_TRAIN", [64], "SOLVER.IMS_PER_BATCH", 3, "SOLVER.MAX_ITER", 1),
        *("OUTPUT_DIR", str(tmp_path), "MODEL.DISTILL.COSINE_PERIOD", 0),
        *("MODEL.DISTILL.MASKD.TOKEN_ITERS", 0),
    ]
    if own := own_teacher(load(path)):
        weights = shared(own.stem, lambda folder: write_random_teacher(path, folder))
        opts += ["MODEL.DISTILL.TEACHER.WEIGHTS", str(weights / "teacher.pth")]
    trainer = Trainer(setup_config(str(path), opts))
    save = torch.save  # only an empty file: the whole one has up to 170 MB
    monkeypatch.setattr(torch, "save", lambda content, *args, **kw: save({}, *args, **kw))
    batch: list[dict[str, Any]] = []
    trainer.model.register_forward_pre_hook(lambda _, args: batch.extend(args[0]))
    trainer.train()

    assert len({tuple(x["image"].shape) for x in batch}) == 2
    if data == "semantic":
        assert any(bool((x["sem_seg"] == 255).all()) for x in batch)
    else:
        assert sorted(len(x["instances"]) > 0 for x in batch) == [False, True, True]
    losses = {k: v for k, (v, _) in trainer.storage.latest().items() if "loss" in k}
    assert all(np.isfinite(v) for v in losses.values())
    for head in load(path).MODEL.DISTILL.HEADS:
        distilled = [v for k, v in losses.items() if k.split("/")[0] == f"loss_{head.lower()}"]
        assert distilled and sum(distilled) > 0, head
    assert (tmp_path / "model_final.pth").is_file()

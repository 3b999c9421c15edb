"""Every shipped config loads and is built, and the quick ones train."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.cityscapes import load_cityscapes_semantic
from detectron2.modeling import build_model

from distill import DistillModel
from distill.config import load_config, student_config, teacher_config, validate_config
from distill.data.shapes import SceneConfig, write_cityscapes, write_coco
from distill.engine import Trainer, setup_config
from distill.modeling.meta_arch import build_distill_model

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted((ROOT / "configs").rglob("*.yaml"))
RUNNABLE = [p for p in PATHS if not p.name.startswith("Base-")]
QUICK = [p for p in RUNNABLE if p.parent.name == "quick"]
DISTILLED = [p for p in RUNNABLE if "  HEADS: " in p.read_text()]
BASELINES = [p for p in RUNNABLE if p not in QUICK + DISTILLED]
SEMANTIC = [p for p in BASELINES if p.parent.name.endswith("-SemanticSegmentation")]
DENSE = [p for p in BASELINES if p.stem.split("_")[0] in ("fcos", "atss", "gfl", "reppoints")]
METHODS = [p for p in DISTILLED if p not in QUICK]  # <data>/<method>/<teacher>-<student>.yaml
INITIALISATION = {  # what Base-R-18.yaml sets
    "INPUT.FORMAT",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.RESNETS.DEPTH",
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "MODEL.WEIGHTS",
}
WITH = {  # heads by the method that segmentation papers compare in the company of others
    "CIRKD": ["PixelKD", "CIRKD"],
    "CWD": ["CWDLogits", "CWD"],
    "IFVD": ["PixelKD", "IFVD"],
    "MasKD": ["MasKDLogits"],
    "SKD": ["PixelKD", "SKD"],
}
KITTI = {  # what Base-KITTI.yaml sets: the MSSD paper's 200 epochs, 16 pictures a step
    "DATASETS.TRAIN": ["kitti_train"],
    "DATASETS.TEST": ["kitti_val"],
    "INPUT.MIN_SIZE_TRAIN": [640],
    "INPUT.MAX_SIZE_TRAIN": 640,
    "INPUT.MIN_SIZE_TEST": 640,
    "INPUT.MAX_SIZE_TEST": 640,
    "MODEL.RETINANET.NUM_CLASSES": 3,
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.BASE_LR_END": 0.001,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
    "SOLVER.MAX_ITER": 200 * 3712 // 16,
    "SOLVER.STEPS": [30_000],  # detectron2's default; a cosine has none
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs").with_suffix(""))


def load(path: Path | str) -> CfgNode:
    return _loaded(str(path)).clone()


@cache
def _loaded(path: str) -> CfgNode:
    return load_config(path)


def leaves(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, tuples as lists."""
    values: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, CfgNode):
            values |= leaves(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = list(value) if isinstance(value, tuple) else value
    return values


def differences(a: CfgNode, b: CfgNode) -> set[str]:
    a_values, b_values = leaves(a), leaves(b)
    return {key for key in a_values if a_values[key] != b_values[key]}


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_it_loads_as_safe_yaml(path: Path) -> None:
    assert "!!" not in path.read_text()
    load(path)


@pytest.mark.parametrize("path", RUNNABLE, ids=name_of)
def test_output_goes_to_a_folder_of_its_own(path: Path) -> None:
    folder = load(path).OUTPUT_DIR
    assert folder == f"output/{name_of(path)}"


@pytest.mark.parametrize("path", DISTILLED, ids=name_of)
def test_a_distillation_differs_from_its_baseline_by_the_distillation(path: Path) -> None:
    baseline = load(path.parent / yaml.safe_load(path.read_text())["_BASE_"])
    changed = differences(baseline, load(path)) - {"OUTPUT_DIR", "MODEL.META_ARCHITECTURE"}
    assert changed and all(key.startswith("MODEL.DISTILL.") for key in changed)
    assert student_config(load(path)).MODEL == student_config(baseline).MODEL


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_a_method_is_named_by_its_path(path: Path) -> None:
    text, method = path.read_text(), path.parent.name
    comment = " ".join(text.partition("_BASE_")[0].replace("#", " ").split())
    assert comment.startswith(f"{method}, ")
    assert "(not ours)" in comment or "the paper's" in comment  # whose numbers, or that none exist
    cfg = load(path)
    heads = list(cfg.MODEL.DISTILL.HEADS)
    semantic = path.parents[1].name.endswith("-SemanticSegmentation")
    assert heads == (WITH.get(method, [method]) if semantic else [method])
    teacher, student = path.stem.split("-")
    assert yaml.safe_load(text)["_BASE_"] == f"../{student}.yaml"
    if teacher == "self":
        assert not cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE
    else:
        assert Path(cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE).stem.startswith(teacher)


def zoo(name: str) -> CfgNode:
    return load(model_zoo.get_config_file(f"{name}.yaml"))


def settings(name: str, reference: str) -> dict[str, Any]:
    """What a config of the model zoo sets otherwise than another."""
    cfg, changed = zoo(name), differences(zoo(name), zoo(reference))
    return {key: value for key, value in leaves(cfg).items() if key in changed}


def data_settings(data: str, sizes: list[list[float]]) -> dict[str, Any]:
    """What a data folder sets otherwise than COCO at 1x; ``sizes``: of COCO's anchors."""
    if data == "PascalVOC-Detection":
        detector = "faster_rcnn_R_50_FPN"
        voc = settings(f"{data}/{detector}", f"COCO-Detection/{detector}_1x")
        return voc | {"MODEL.RETINANET.NUM_CLASSES": 20}
    if data == "Cityscapes-InstanceSegmentation":
        detector = "mask_rcnn_R_50_FPN"
        return settings(f"Cityscapes/{detector}", f"COCO-InstanceSegmentation/{detector}_1x")
    return KITTI | {"MODEL.ANCHOR_GENERATOR.SIZES": [[x / 2 for x in level] for level in sizes]}


def backbone_settings(backbone: str) -> dict[str, Any]:
    if backbone == "R_18":
        values = leaves(load(ROOT / "configs" / "Base-R-18.yaml"))
        return {key: values[key] for key in INITIALISATION}
    if backbone == "R_50":
        return {"MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-50.pkl"}
    detector = "COCO-Detection/faster_rcnn"
    return settings(f"{detector}_{backbone}_FPN_3x", f"{detector}_R_50_FPN_3x")


@pytest.mark.parametrize("path", [p for p in BASELINES if p not in SEMANTIC + DENSE], ids=name_of)
def test_a_baseline_is_detectron2s(path: Path) -> None:
    name = re.fullmatch(r"(\w+?)_([RX]_\w+?)(_FPN|_PAFPN)?(_[12]x)?", path.stem)
    assert name is not None
    detector, backbone, neck, schedule = name.groups()
    data = path.parent.name
    folder = "Misc" if detector.startswith("cascade") else f"COCO-{data.split('-')[1]}"
    expected = leaves(zoo(f"{folder}/{detector}_R_50{'_FPN' if neck else ''}_1x"))
    if schedule is None:
        expected |= data_settings(data, expected["MODEL.ANCHOR_GENERATOR.SIZES"])
    if schedule == "_2x":
        expected |= {"SOLVER.STEPS": [120_000, 160_000], "SOLVER.MAX_ITER": 180_000}
    expected |= backbone_settings(backbone)
    if neck == "_PAFPN":
        plain = expected["MODEL.BACKBONE.NAME"]
        expected["MODEL.BACKBONE.NAME"] = plain.replace("_fpn_", "_pafpn_")
    expected["OUTPUT_DIR"] = f"output/{name_of(path)}"
    assert leaves(load(path)) == expected


@pytest.mark.parametrize("path", DENSE, ids=name_of)
def test_a_dense_baseline_trains_as_retinanet(path: Path) -> None:
    """On the same pictures, with the same schedule; P6 and P7 are made of P5, RepPoints' of C5."""
    detector, backbone, neck, schedule = re.fullmatch(  # type: ignore[union-attr]
        r"([a-z]+)_([RX]_\w+?)_(FPN|PAFPN)_([12]x)", path.stem
    ).groups()
    expected = leaves(load(ROOT / f"configs/COCO-Detection/retinanet_R_50_{neck}_1x.yaml"))
    expected |= backbone_settings(backbone)
    if schedule == "2x":
        expected |= {"SOLVER.STEPS": [120_000, 160_000], "SOLVER.MAX_ITER": 180_000}
    if neck == "FPN" and detector != "reppoints":
        expected["MODEL.BACKBONE.NAME"] = "build_fcos_resnet_fpn_backbone"
    names = {"fcos": "FCOS", "atss": "ATSS", "gfl": "GFL", "reppoints": "RepPoints"}
    expected["MODEL.META_ARCHITECTURE"] = names[detector]
    if detector == "reppoints":
        expected["MODEL.FPN.NORM"] = "GN"
    expected["OUTPUT_DIR"] = f"output/{name_of(path)}"
    changed = {k for k, v in leaves(load(path)).items() if v != expected[k]}
    assert changed <= {"MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA"}


@pytest.mark.parametrize("path", SEMANTIC, ids=name_of)
def test_a_semantic_baseline_is_the_papers(path: Path) -> None:
    name = re.fullmatch(r"(pspnet|deeplabv3)_R_(18|101)_(40|80)k", path.stem)
    assert name is not None
    cfg, head = load(path), load(path).MODEL.SEM_SEG_HEAD
    assert {"pspnet": "PSPHead", "deeplabv3": "ASPPHead"}[name[1]] == head.NAME
    assert (int(name[2]), int(name[3]) * 1000) == (cfg.MODEL.RESNETS.DEPTH, cfg.SOLVER.MAX_ITER)
    assert (cfg.MODEL.RESNETS.RES4_DILATION, cfg.MODEL.RESNETS.RES5_DILATION) == (2, 4)
    assert (head.NUM_CLASSES, head.AUX_WEIGHT, head.LOSS_TYPE) == (19, 0.4, "cross_entropy")
    assert cfg.MODEL.RESNETS.NORM == head.NORM == "SyncBN" and cfg.MODEL.BACKBONE.FREEZE_AT == 0
    assert cfg.INPUT.CROP.ENABLED and tuple(cfg.INPUT.CROP.SIZE) == (512, 1024)
    assert cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPolyLR"


@pytest.fixture(scope="module")
def meta_models() -> dict[str, torch.nn.Module]:
    """By description of their configs: many methods share a teacher."""
    return {}


@pytest.mark.parametrize("path", BASELINES + METHODS, ids=name_of)
def test_a_network_is_built(
    path: Path, meta_models: dict[str, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device: everything but the values of the weights, and no download."""
    loaded: list[str] = []

    def build_teacher(config: CfgNode) -> torch.nn.Module:
        config.MODEL.DEVICE = "meta"
        described = config.dump()
        if described not in meta_models:
            meta_models[described] = build_model(config)
        return meta_models[described]

    monkeypatch.chdir(ROOT)  # teachers are named from here
    monkeypatch.setattr("distill.modeling.teacher.build_model", build_teacher)
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
    if path in BASELINES:
        assert type(model).__name__ == cfg.MODEL.META_ARCHITECTURE and not loaded
        return
    assert isinstance(model, DistillModel) and list(model.heads) == list(cfg.MODEL.DISTILL.HEADS)
    if path.stem.startswith("self-"):
        assert model.teacher is None and not loaded
        return
    assert model.teacher is not None
    name = cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE
    if name.startswith("configs/"):
        assert loaded == [f"{load(name).OUTPUT_DIR}/model_final.pth"]
    else:
        assert loaded == [model_zoo.get_checkpoint_url(name)]
    teacher = teacher_config(cfg)
    assert teacher.DATASETS.TRAIN == cfg.DATASETS.TRAIN
    assert teacher.MODEL.ANCHOR_GENERATOR == cfg.MODEL.ANCHOR_GENERATOR


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Overrides by kind of data: three pictures of two sizes, one of them without annotations."""
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


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the teachers' checkpoints, by the names of their configs."""
    return tmp_path_factory.mktemp("teachers")


@pytest.mark.parametrize("path", QUICK, ids=name_of)
def test_a_quick_config_trains_a_step(
    path: Path,
    mixed: dict[str, list[Any]],
    random_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)  # teachers are named from here
    opts = [
        *mixed["semantic" if "semantic" in path.stem else "coco"],
        *("DATASETS.TEST", [], "DATALOADER.ASPECT_RATIO_GROUPING", False),
        *("INPUT.MIN_SIZE_TRAIN", [64], "SOLVER.IMS_PER_BATCH", 3, "SOLVER.MAX_ITER", 1),
        *("OUTPUT_DIR", str(tmp_path), "MODEL.DISTILL.COSINE_PERIOD", 0),
        *("MODEL.DISTILL.MASKD.TOKEN_ITERS", 0),
    ]
    heads = load(path).MODEL.DISTILL.HEADS
    if teacher := load(path).MODEL.DISTILL.TEACHER.CONFIG_FILE:
        opts += ["MODEL.DISTILL.TEACHER.WEIGHTS", str(random_weights / f"{Path(teacher).stem}.pth")]
        if not Path(opts[-1]).is_file():
            torch.manual_seed(1)
            model = build_model(student_config(teacher_config(load(path))))
            torch.save({"model": model.state_dict()}, opts[-1])
    trainer = Trainer(setup_config(str(path), opts))
    save = torch.save  # only an empty file: the whole one has up to 170 MB
    monkeypatch.setattr(torch, "save", lambda content, *args, **kw: save({}, *args, **kw))
    batch: list[dict[str, Any]] = []
    trainer.model.register_forward_pre_hook(lambda _, args: batch.extend(args[0]))
    trainer.train()

    assert len({tuple(x["image"].shape) for x in batch}) == 2
    if "semantic" in path.stem:
        assert any(bool((x["sem_seg"] == 255).all()) for x in batch)
    else:
        assert sorted(len(x["instances"]) > 0 for x in batch) == [False, True, True]
    losses = {k: v for k, (v, _) in trainer.storage.latest().items() if "loss" in k}
    assert all(np.isfinite(v) for v in losses.values())
    for head in heads:
        distilled = [v for k, v in losses.items() if k.split("/")[0] == f"loss_{head.lower()}"]
        assert distilled and sum(distilled) > 0, head
    assert (tmp_path / "model_final.pth").is_file()

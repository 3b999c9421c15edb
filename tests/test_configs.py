"""Every shipped config loads and is built, and the quick ones train."""

import json
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
from distill.config import get_distill_cfg, merge_from_file, student_config, teacher_config
from distill.data.shapes import SceneConfig
from distill.data.shapes_io import write_cityscapes, write_coco
from distill.engine import Trainer, setup_config

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted((ROOT / "configs").rglob("*.yaml"))
RUNNABLE = [p for p in PATHS if not p.name.startswith("Base-")]
QUICK = [p for p in RUNNABLE if p.parent.name == "quick"]
COCO = [p for p in RUNNABLE if p.parent.name.startswith("COCO-")]
DISTILLED = [p for p in RUNNABLE if "META_ARCHITECTURE: Distill" in p.read_text()]
INITIALISATION = {  # what a baseline of another depth may set otherwise
    "INPUT.FORMAT",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.RESNETS.DEPTH",
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "MODEL.WEIGHTS",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs").with_suffix(""))


def load(path: Path | str) -> CfgNode:
    cfg = get_distill_cfg()
    merge_from_file(cfg, str(path))
    return cfg


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


@pytest.mark.parametrize("path", [p for p in COCO if p not in DISTILLED], ids=name_of)
def test_a_coco_baseline_is_detectron2s(path: Path) -> None:
    detector, schedule = path.stem.split("_R_")[0], path.stem[-2:]
    zoo = load(model_zoo.get_config_file(f"{path.parent.name}/{detector}_R_50_FPN_1x.yaml"))
    cfg = load(path)
    changed = differences(zoo, cfg) - {"OUTPUT_DIR"}
    if schedule == "2x":
        assert changed >= {"SOLVER.STEPS", "SOLVER.MAX_ITER"}
        assert [*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER] == [120_000, 160_000, 180_000]
        changed -= {"SOLVER.STEPS", "SOLVER.MAX_ITER"}
    assert changed == (INITIALISATION if "_R_18_" in path.stem else set())


@pytest.mark.parametrize("path", COCO, ids=name_of)
def test_a_coco_network_is_built(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device: everything but the values of the weights, and no download."""
    loaded: list[str] = []

    def build_teacher(config: CfgNode) -> torch.nn.Module:
        config.MODEL.DEVICE = "meta"
        return build_model(config)

    monkeypatch.setattr("distill.teacher.build_model", build_teacher)
    monkeypatch.setattr("distill.teacher.load_strictly", lambda _, url, key: loaded.append(url))
    cfg = load(path)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    if path in DISTILLED:
        assert isinstance(model, DistillModel) and model.teacher is not None
        assert list(model.heads) == ["IMA"]
        teacher_depth = path.stem.split("_R_")[-1]
        assert f"_R_{teacher_depth}_FPN_3x" in cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE
        assert loaded == [model_zoo.get_checkpoint_url(cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE)]
    else:
        assert type(model).__name__ == cfg.MODEL.META_ARCHITECTURE and not loaded


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


@pytest.mark.parametrize("path", QUICK, ids=name_of)
def test_a_quick_config_trains_a_step(
    path: Path, mixed: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # teachers are named from here
    opts = [
        *mixed["semantic" if path.stem.startswith("semantic") else "coco"],
        *("DATASETS.TEST", [], "DATALOADER.ASPECT_RATIO_GROUPING", False),
        *("INPUT.MIN_SIZE_TRAIN", [64], "SOLVER.IMS_PER_BATCH", 3, "SOLVER.MAX_ITER", 1),
        *("SOLVER.CHECKPOINT_PERIOD", 1, "OUTPUT_DIR", str(tmp_path)),
    ]
    heads = load(path).MODEL.DISTILL.HEADS
    if path in DISTILLED:
        torch.manual_seed(1)
        teacher = build_model(student_config(teacher_config(load(path))))
        torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
        opts += ["MODEL.DISTILL.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth")]
    trainer = Trainer(setup_config(str(path), opts))
    batch: list[dict[str, Any]] = []
    trainer.model.register_forward_pre_hook(lambda _, args: batch.extend(args[0]))
    trainer.train()

    assert len({tuple(x["image"].shape) for x in batch}) == 2
    if path.stem.startswith("semantic"):
        assert any(bool((x["sem_seg"] == 255).all()) for x in batch)
    else:
        assert sorted(len(x["instances"]) > 0 for x in batch) == [False, True, True]
    losses = {k: v for k, (v, _) in trainer.storage.latest().items() if "loss" in k}
    assert all(np.isfinite(v) for v in losses.values())
    for head in heads:
        distilled = [v for k, v in losses.items() if k.split("/")[0] == f"loss_{head.lower()}"]
        assert distilled and sum(distilled) > 0, head
    assert (tmp_path / "model_final.pth").is_file()

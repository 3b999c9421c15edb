"""Test images with more objects than COCO's metrics count."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from PIL import Image

from distill.data.registration import register_own_sets
from distill.engine import trainer
from distill.engine.evaluators import build_evaluators
from distill.evaluation.coco_recall import RECALLS
from tests.support.networks import tiny_cfg

OBJECTS = 144


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Register a set of one image with a grid of boxes."""
    folder = tmp_path_factory.mktemp("crowded")
    Image.fromarray(np.zeros((240, 240, 3), np.uint8)).save(folder / "1.png")
    annotations = [
        {
            "id": i + 1,
            "image_id": 1,
            "category_id": 1,
            "bbox": [20 * (i % 12), 20 * (i // 12), 16, 16],
            "area": 256,
            "iscrowd": 0,
        }
        for i in range(OBJECTS)
    ]
    content = {
        "info": {},
        "images": [{"id": 1, "file_name": "1.png", "width": 240, "height": 240}],
        "categories": [{"id": 1, "name": "nucleus"}],
        "annotations": annotations,
    }
    (folder / "a.json").write_text(json.dumps(content))
    return "crowded", str(folder / "a.json"), str(folder)


def evaluated(cfg: CfgNode, name: str, folder: str, shift: int = 0) -> dict[str, float]:
    """Return the metrics of detections that equal the ground truth, or lie beside it."""
    DatasetCatalog.get(name)  # sets the metadata of the classes, which the evaluator needs
    (evaluator,) = build_evaluators(cfg, name, folder)
    evaluator.reset()
    at = torch.arange(OBJECTS)
    corner = torch.stack([20 * (at % 12), 20 * (at // 12)], 1).float() + torch.tensor([shift, 0])
    found = Instances((240, 240))
    found.pred_boxes = Boxes(torch.cat([corner, corner + 16], 1))
    found.scores = torch.linspace(0.9, 0.1, OBJECTS)
    found.pred_classes = torch.zeros(OBJECTS, dtype=torch.long)
    evaluator.process([{"image_id": 1, "height": 240, "width": 240}], [{"instances": found}])
    metrics: dict[str, float] = evaluator.evaluate()["bbox"]
    return metrics


def test_own_sets_are_measured_with_as_many_detections_as_are_asked_for(
    crowded: tuple[str, str, str], tmp_path: Path
) -> None:
    cfg = tiny_cfg("faster")
    cfg.DATASETS.COCO_FORMAT = (crowded,)
    register_own_sets(cfg)
    cfg.TEST.DETECTIONS_PER_IMAGE = 200
    assert evaluated(cfg, "crowded", str(tmp_path))["AP"] == pytest.approx(100)
    # With 100 of 144 objects, precision is 1 up to recall 0.69: at 70 of COCO's 101 recalls.
    for limit in (50, 100):
        cfg.TEST.DETECTIONS_PER_IMAGE = limit
        assert evaluated(cfg, "crowded", str(tmp_path))["AP"] == pytest.approx(100 * 70 / 101)


@pytest.mark.parametrize("limit, found", [(100, 100), (200, OBJECTS)])
def test_recalls(crowded: tuple[str, str, str], tmp_path: Path, limit: int, found: int) -> None:
    """Beside the objects by 3 of 16 pixels, the IoU is 0.68: it counts at four of ten IoUs."""
    cfg = tiny_cfg("faster")
    cfg.DATASETS.COCO_FORMAT = (crowded,)
    register_own_sets(cfg)
    cfg.TEST.DETECTIONS_PER_IMAGE = limit
    share = 100 * found / OBJECTS
    metrics = evaluated(cfg, "crowded", str(tmp_path), shift=3)
    assert {k: pytest.approx(metrics[k], nan_ok=True) for k in RECALLS} == {
        **{"AR": 0.4 * share, "AR50": share, "AR75": 0, "ARs": 0.4 * share},
        **{"ARm": math.nan, "ARl": math.nan},
    }


def test_recalls_without_detections(crowded: tuple[str, str, str], tmp_path: Path) -> None:
    cfg = tiny_cfg("faster")
    cfg.DATASETS.COCO_FORMAT = (crowded,)
    register_own_sets(cfg)
    DatasetCatalog.get("crowded")
    (evaluator,) = build_evaluators(cfg, "crowded", str(tmp_path))
    evaluator.reset()
    nothing = Instances((240, 240), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
    nothing.pred_classes = torch.zeros(0, dtype=torch.long)
    evaluator.process([{"image_id": 1, "height": 240, "width": 240}], [{"instances": nothing}])
    metrics = evaluator.evaluate()["bbox"]
    assert metrics.keys() >= set(RECALLS) and all(math.isnan(metrics[k]) for k in RECALLS)


def test_eval_only_knows_a_users_own_sets(
    crowded: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's plain config does not know them: its evaluator would stop at 100 detections."""
    cfg = tiny_cfg("faster", "DATASETS.COCO_FORMAT", (crowded,))
    monkeypatch.setattr(trainer, "load_student", lambda cfg, weights: None)
    monkeypatch.setattr(trainer.Trainer, "test", lambda cfg, model: cfg.DATASETS.COCO_FORMAT)
    assert trainer.evaluate(cfg, "model.pth") == (crowded,)


@pytest.mark.parametrize("plain", [False, True])
def test_the_measures_of_other_sets_stay_those_of_coco(
    crowded: tuple[str, str, str], tmp_path: Path, plain: bool
) -> None:
    name = f"crowded_elsewhere_{plain}"
    register_coco_instances(name, {}, *crowded[1:])
    cfg = get_cfg() if plain else tiny_cfg("faster")
    cfg.TEST.DETECTIONS_PER_IMAGE = 200
    assert evaluated(cfg, name, str(tmp_path))["AP"] == pytest.approx(100 * 70 / 101)

"""LVIS's evaluation where the package ``lvis`` is installed, and one sentence where it is not."""

import json
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data.datasets import register_lvis_instances
from detectron2.data.datasets.lvis import get_lvis_instances_meta
from detectron2.structures import Boxes, Instances
from PIL import Image

from distill.engine import Trainer
from distill.engine.evaluators import check_test_sets
from distill.errors import DataError
from tests.support.networks import tiny_cfg
from tests.support.trainings import assert_declared

BOXES = {1: [10, 10, 40, 30], 2: [50, 20, 30, 30]}  # x, y, width, height by category


@pytest.fixture
def lvis_set(tmp_path: Path) -> str:
    """The name of a registered set in LVIS's format: one image with two objects."""
    (tmp_path / "val").mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "val" / "1.jpg")
    categories = [
        {"id": k + 1, "name": name, "synonyms": [name], "frequency": "f"}
        for k, name in enumerate(get_lvis_instances_meta("lvis_v1")["thing_classes"])
    ]
    annotations = [
        {
            **{"id": k, "image_id": 1, "category_id": k, "bbox": [x, y, w, h], "area": w * h},
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        for k, (x, y, w, h) in BOXES.items()
    ]
    image = {
        **{"id": 1, "width": 100, "height": 80, "coco_url": "http://images/val/1.jpg"},
        **{"neg_category_ids": [3], "not_exhaustive_category_ids": []},
    }
    content = {"images": [image], "annotations": annotations, "categories": categories}
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    name = f"lvis_v1_{tmp_path.name}"
    metadata = get_lvis_instances_meta("lvis_v1")
    register_lvis_instances(name, metadata, str(tmp_path / "lvis.json"), f"{tmp_path}/")
    return name


def test_without_the_package(lvis_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lvis", None)
    cfg = tiny_cfg("faster", "DATASETS.TEST", (lvis_set,))
    with pytest.raises(DataError) as error:
        check_test_sets(cfg)
    assert str(error.value) == (
        f"Data set '{lvis_set}' needs the package lvis, which is not installed; run "
        "`pip install --no-deps lvis`."
    )


@pytest.mark.parametrize("right", [True, False])
def test_a_set_of_lvis(right: bool, lvis_set: str, tmp_path: Path) -> None:
    pytest.importorskip("lvis")
    folder = str(tmp_path / "output")
    cfg = tiny_cfg("faster", "DATASETS.TEST", (lvis_set,), "OUTPUT_DIR", folder)
    check_test_sets(cfg)
    found = Instances((80, 100))
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in BOXES.values()]).float()
    found.pred_boxes = Boxes(boxes if right else boxes.flip(0))
    found.scores = torch.tensor([0.9, 0.8])
    found.pred_classes = torch.tensor([0, 1])
    evaluator = Trainer.build_evaluator(cfg, lvis_set)
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    found_metrics = evaluator.evaluate()
    assert_declared(cfg, found_metrics)
    results = found_metrics["bbox"]
    assert results["AP"] == pytest.approx(100 if right else 0)
    assert results["APf"] == results["AP"]

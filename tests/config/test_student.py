"""A student that moves: its files find each other, and its class names come with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from distill import get_student_cfg
from distill.config import load_config, student_config
from distill.config.student import write_student
from distill.data.datasets import load_training_sets
from distill.errors import ConfigError
from tests.support.trainings import Shapes, trainable_cfg


@pytest.fixture
def student(shapes: Shapes, tmp_path: Path) -> Path:
    """Return the new folder of a student whose data set is not registered there."""
    cfg = trainable_cfg("faster", shapes, tmp_path / "trained")
    load_training_sets(cfg)  # the annotation file has the class names
    cfg.DATASETS.TEST = ("elsewhere",)
    (tmp_path / "trained").mkdir()
    write_student(cfg)
    state = build_model(student_config(cfg)).state_dict()
    torch.save({"model": state}, tmp_path / "trained" / "model_final.pth")
    MetadataCatalog.pop("elsewhere", None)
    return (tmp_path / "trained").rename(tmp_path / "moved")


def test_a_moved_student_has_its_weights_and_class_names(student: Path, shapes: Shapes) -> None:
    predictor = DefaultPredictor(get_student_cfg(str(student / "student.yaml")))
    names = MetadataCatalog.get(shapes[0]).thing_classes
    assert predictor.metadata.thing_classes == names and len(names) == 8
    assert "instances" in predictor(np.zeros((64, 64, 3), np.uint8))
    saved = torch.load(student / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(x, saved[k]) for k, x in predictor.model.state_dict().items())


def test_a_moved_students_config_finds_the_checkpoint_beside_it(student: Path) -> None:
    beside = str(student / "model_final.pth")
    config = str(student / "student.yaml")
    assert beside == load_config(config).MODEL.WEIGHTS
    assert load_config(config, ["MODEL.WEIGHTS", "other.pth"]).MODEL.WEIGHTS == "other.pth"
    (student / "model_final.pth").unlink()
    assert beside.replace("/moved/", "/trained/") == load_config(config).MODEL.WEIGHTS


def test_without_class_names_the_config_is_read_alone(student: Path) -> None:
    (student / "classes.json").unlink()
    assert get_student_cfg(str(student / "student.yaml")).DATASETS.TEST == ("elsewhere",)


def test_damaged_class_names(student: Path) -> None:
    (student / "classes.json").write_text("[1")
    with pytest.raises(ConfigError, match=r"classes\.json"):
        get_student_cfg(str(student / "student.yaml"))


def test_without_a_test_set_the_predictor_has_the_names(student: Path) -> None:
    path = student / "student.yaml"
    path.write_text(
        path.read_text().replace("- elsewhere", "[]").replace("TEST:\n  []", "TEST: []")
    )
    cfg = get_student_cfg(str(path))
    assert len(MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes) == 8

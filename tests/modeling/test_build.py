"""The network that a config trains: plain without heads, distilled with heads."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_model
from detectron2.utils.env import seed_all_rng

from distill import DistillModel
from distill.engine import Trainer
from distill.modeling.meta_arch import build_distill_model
from tests.support.networks import ARCHITECTURES, FAMILIES, HEADS, distill_opts, tiny_cfg
from tests.support.trainings import trainable_cfg, write_teacher

CLASSES = ("MODEL.ROI_HEADS.NUM_CLASSES", 8, "MODEL.RETINANET.NUM_CLASSES", 8)


def as_student(family: str, heads: Any) -> list[Any]:
    """Overrides that distil a plain config of ``family``, whose architecture stays."""
    return ["MODEL.DISTILL.HEADS", tuple(heads)]


def as_wrapped(family: str, heads: Any) -> list[Any]:
    """The same with a ``Distill*`` architecture, whose student follows where it can."""
    opts = distill_opts(family, heads)
    if family in ("faster", "mask", "cascade", "retinanet", "semantic"):
        opts[3] = ""
    return opts


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_of_writing_build_the_same(family: str, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path, family)
    built = []
    for written in (as_student, as_wrapped):
        torch.manual_seed(3)
        cfg = tiny_cfg(family, *written(family, HEADS[family][:3]), *teacher)
        built.append(build_distill_model(cfg))
    assert all(isinstance(model, DistillModel) for model in built)
    a, b = built
    assert type(a.student).__name__ == ARCHITECTURES.get(family, "GeneralizedRCNN")
    assert type(a.student) is type(b.student) and type(a.family) is type(b.family)
    assert list(a.state_dict()) == list(b.state_dict())
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


@pytest.mark.e2e
@pytest.mark.parametrize("family", ["faster", "retinanet"])
def test_both_ways_of_writing_train_the_same(
    family: str, shapes: tuple[str, str, str], tmp_path: Path
) -> None:
    """To the bit, with the same checkpoint and the same student.yaml."""
    teacher = write_teacher(tmp_path / "teacher", family, *CLASSES, fpn=24)

    def trained(cfg: CfgNode) -> tuple[Any, str]:
        seed_all_rng(7)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        folder = Path(cfg.OUTPUT_DIR)
        student = (folder / "student.yaml").read_text().replace(str(folder), "OUTPUT_DIR")
        return torch.load(folder / "model_final.pth", weights_only=True), student

    results = []
    for written in (as_student, as_wrapped):
        (tmp_path / written.__name__).mkdir()
        opts = [*written(family, HEADS[family]), *teacher, "SOLVER.MAX_ITER", 3]
        cfg = trainable_cfg(family, shapes, tmp_path / written.__name__, *opts, norm="BN")
        results.append(trained(cfg))
    (checkpoint, student), (other, other_student) = results
    assert student == other_student
    assert "DISTILL" not in student and checkpoint["distill"]
    for part in ("model", "distill"):
        assert list(checkpoint[part]) == list(other[part])
        assert all(torch.equal(x, other[part][name]) for name, x in checkpoint[part].items())
    assert checkpoint.keys() == other.keys() and checkpoint["iteration"] == other["iteration"] == 2


def test_a_users_own_detector_is_distilled(tmp_path: Path) -> None:
    class OwnRCNN(GeneralizedRCNN):
        pass

    def make_rcnn(cfg: CfgNode) -> torch.nn.Module:
        return OwnRCNN(cfg)

    META_ARCH_REGISTRY.register(OwnRCNN)
    META_ARCH_REGISTRY.register(make_rcnn)
    try:
        for name in ("OwnRCNN", "make_rcnn"):
            opts = [*as_student("faster", ["IMA"]), "MODEL.META_ARCHITECTURE", name]
            cfg = tiny_cfg("faster", *opts, *write_teacher(tmp_path, "faster"))
            model = build_distill_model(cfg)
            assert isinstance(model, DistillModel) and type(model.student) is OwnRCNN
    finally:
        META_ARCH_REGISTRY._obj_map.pop("OwnRCNN")
        META_ARCH_REGISTRY._obj_map.pop("make_rcnn")


def test_without_heads_the_student_is_plain() -> None:
    plain = build_distill_model(tiny_cfg("faster"))
    assert type(plain) is GeneralizedRCNN
    cfg = tiny_cfg("faster", *as_wrapped("faster", []))
    empty = build_distill_model(cfg)
    assert isinstance(empty, DistillModel) and not empty.heads and empty.teacher is None
    torch.manual_seed(0)
    stock = build_model(tiny_cfg("faster")).state_dict()
    torch.manual_seed(0)
    wrapped = build_distill_model(cfg).student.state_dict()
    assert all(torch.equal(x, wrapped[name]) for name, x in stock.items())


@pytest.mark.parametrize("written", [as_student, as_wrapped])
def test_a_start_says_that_it_distils(
    written: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = write_teacher(tmp_path, "faster")
    with caplog.at_level(logging.INFO, "distill"):
        build_distill_model(tiny_cfg("faster", *written("faster", ["IMA", "ROIKD"]), *teacher))
    (line,) = (r.getMessage() for r in caplog.records if "Distillation" in r.getMessage())
    for word in ("GeneralizedRCNN", "IMA, ROIKD", "MODEL.DISTILL.HEADS", teacher[1]):
        assert word in line


def test_a_student_that_teaches_itself_names_no_teacher(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "distill"):
        build_distill_model(tiny_cfg("faster", *as_student("faster", ["LGD"])))
    assert "LGD from itself, without a teacher" in caplog.text


def test_a_teacher_without_heads_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = write_teacher(tmp_path, "faster")
    with caplog.at_level(logging.INFO, "distill"):
        build_distill_model(tiny_cfg("faster", *teacher))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "HEADS is empty" in record.getMessage()

"""Students that start with the teacher's weights where they fit."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import validate_config
from distill.engine import Trainer
from distill.errors import ConfigError
from distill.modeling.init_from_teacher import init_from_teacher
from tests.support.networks import distill_opts, tiny_model
from tests.support.trainings import trainable_cfg, write_teacher

STATE = "backbone.bottom_up.", "backbone."


FEWER: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(["faster", "mask", "cascade"], ("MODEL.ROI_HEADS.NUM_CLASSES", 2)),
    "gfl": ("MODEL.GFL.NUM_CLASSES", 2),
    "panoptic": ("MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2),
}


def part_of(name: str) -> str:
    return (
        "bottom-up"
        if name.startswith(STATE[0])
        else "neck"
        if name.startswith(STATE[1])
        else "head"
    )


@pytest.mark.parametrize("family", ["faster", "retinanet", "gfl", "panoptic"])
@pytest.mark.parametrize("parts", [("neck",), ("head",), ("neck", "head")])
def test_parts(family: str, parts: tuple[str, ...]) -> None:
    student, teacher = tiny_model(family, seed=0), tiny_model(family, seed=1)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    copied = init_from_teacher(student, teacher, parts)
    for name, x in student.state_dict().items():
        expected = teacher.state_dict()[name] if part_of(name) in parts else before[name]
        assert torch.equal(x, expected), name
        assert (name in copied) == (part_of(name) in parts)


def test_what_does_not_fit_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Other classes: the towers fit, the class predictor does not."""
    student = tiny_model("retinanet", seed=0)
    teacher = tiny_model("retinanet", "MODEL.RETINANET.NUM_CLASSES", 5, seed=1)
    own = student.state_dict()["head.cls_score.weight"].clone()
    with caplog.at_level(logging.WARNING):
        copied = init_from_teacher(student, teacher, ["head"])
    assert "head.cls_score.weight" not in copied and "head.bbox_pred.weight" in copied
    assert torch.equal(student.state_dict()["head.cls_score.weight"], own)
    assert "2 that do not fit: head.cls_score.weight, head.cls_score.bias" in caplog.text


@pytest.mark.parametrize("family", ["faster", "mask", "cascade", "gfl", "panoptic"])
def test_predictors_of_other_classes(family: str) -> None:
    """As many classes in another order: every other tensor of the head is copied."""
    student, teacher = tiny_model(family, seed=0), tiny_model(family, seed=1)
    own = {k for k in student.state_dict() if part_of(k) == "head"}
    left = own - set(init_from_teacher(student, teacher, ["head"], same_classes=False))
    number = tiny_model(family, *FEWER[family], seed=1).state_dict()
    shape = {k: v.shape for k, v in student.state_dict().items()}
    expected = {k for k in own if number[k].shape != shape[k]}
    assert expected <= left and all("pred" in k or "cls_score" in k for k in left)


@pytest.mark.parametrize(
    "student, teacher, part",
    [("retinanet", "faster", "head"), ("semantic", "faster", "neck")],
)
def test_nothing_fits(student: str, teacher: str, part: str) -> None:
    plain = ("MODEL.BACKBONE.NAME", "build_shallow_resnet_backbone")
    opts = (*plain, "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2"])
    model = tiny_model("semantic", *opts) if student == "semantic" else tiny_model(student)
    with pytest.raises(ConfigError, match=f"no tensor of the student's {part} "):
        init_from_teacher(model, tiny_model(teacher), [part])


@pytest.mark.e2e
def test_a_training_starts_with_it(shapes: tuple[str, str, str], tmp_path: Path) -> None:
    taught = write_teacher(tmp_path, "faster", "MODEL.ROI_HEADS.NUM_CLASSES", 8)
    opts: list[Any] = [*distill_opts("faster", ("IMA",)), *taught]
    opts += ["MODEL.DISTILL.INHERIT", ("neck", "head"), "SOLVER.MAX_ITER", 1]
    cfg = trainable_cfg("faster", shapes, tmp_path / "out", *opts)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    assert trainer.teacher is not None
    teacher = trainer.teacher.model.state_dict()
    for name, x in trainer.student.state_dict().items():
        assert part_of(name) == "bottom-up" or torch.equal(x, teacher[name])
    trainer.train()
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)  # with what was trained
    name = "roi_heads.box_predictor.cls_score.weight"
    assert not torch.equal(resumed.student.state_dict()[name], teacher[name])


def test_a_training_leaves_predictors_of_other_classes(
    shapes: tuple[str, str, str], tmp_path: Path
) -> None:
    taught = write_teacher(tmp_path, "faster", "MODEL.ROI_HEADS.NUM_CLASSES", 8)
    names = tuple(f"animal {k}" for k in range(8))
    opts: list[Any] = [*distill_opts("faster", ("IMA",)), *taught]
    opts += ["MODEL.DISTILL.INHERIT", ("head",), "MODEL.DISTILL.TEACHER.CLASSES", names]
    trainer = Trainer(trainable_cfg("faster", shapes, tmp_path / "out", *opts))
    trainer.resume_or_load(resume=False)
    assert trainer.teacher is not None
    own, teacher = trainer.student.state_dict(), trainer.teacher.model.state_dict()
    same = {key for key, x in own.items() if torch.equal(x, teacher[key])}
    assert "roi_heads.box_head.fc1.weight" in same
    assert not any(
        f"roi_heads.box_predictor.{x}.weight" in same for x in ("cls_score", "bbox_pred")
    )


def test_without_a_teacher_there_is_nothing_to_inherit(
    shapes: tuple[str, str, str], tmp_path: Path
) -> None:
    pafpn = ("MODEL.BACKBONE.NAME", "build_shallow_resnet_pafpn_backbone")
    opts = (*distill_opts("faster", ("MSSD",)), *pafpn, "MODEL.DISTILL.INHERIT", ("neck",))
    with pytest.raises(ConfigError, match="has a teacher; name one"):
        validate_config(trainable_cfg("faster", shapes, tmp_path, *opts))
    opts = (*distill_opts("faster", ("IMA",)), "MODEL.DISTILL.INHERIT", ("necks",))
    with pytest.raises(ConfigError, match="unknown value 'necks'; did you mean neck"):
        validate_config(trainable_cfg("faster", shapes, tmp_path, *opts))

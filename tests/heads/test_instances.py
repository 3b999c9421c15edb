"""Heads whose objects are those that the teacher detects, by its network or in a file."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from distill import DistillModel
from distill.errors import ConfigError
from distill.heads import DISTILL_HEAD_REGISTRY, IMA
from distill.heads.instances import TeacherInstances
from tests.support.networks import (
    CLASSES,
    distilled,
    image_dict,
    kd_losses,
    network_info,
    outspoken_model,
    tiny_cfg,
    tiny_model,
)
from tests.support.trainings import write_teacher

HEADS = ("FGD", "FGFI", "DeFeat", "TID", "IMA")


def by_teacher(*heads: str, score: float = 0.5) -> list[Any]:
    keys = [(f"MODEL.DISTILL.{x.upper()}.INSTANCES", "teacher") for x in heads]
    keys += [(f"MODEL.DISTILL.{x.upper()}.INSTANCE_SCORE", score) for x in heads]
    return [x for pair in keys for x in pair]


def detections(truth: Instances, scores: Any = None) -> Instances:
    """Objects as detections."""
    found = Instances(truth.image_size, pred_boxes=Boxes(truth.gt_boxes.tensor.clone()))
    found.scores = torch.ones(len(truth)) if scores is None else torch.tensor(scores)
    found.pred_classes = truth.gt_classes.clone()
    return found


def batch() -> list[dict[str, Any]]:
    """Images with two objects, with one and without."""
    return [image_dict(k, 64, 96 - 16 * k, objects=2 - k) for k in range(3)]


def losses(inputs: list[dict[str, Any]], *opts: Any) -> dict[str, Tensor]:
    """Losses of all heads; with given detections if the inputs have them."""
    fixed = ("MODEL.DISTILL.IMA.MASK_RATIO", 0.0)
    teacher = outspoken_model("retinanet", seed=1)
    model = distilled("retinanet", HEADS, *opts, *fixed, teacher=teacher)
    model.teacher.given_detections = "detections" in inputs[0]
    torch.manual_seed(0)
    return kd_losses(model, inputs)


def test_detections_replace_the_annotated_objects() -> None:
    """Each loss is that of a batch in which the detections are the annotated objects."""
    expected, inputs = losses(batch()), batch()
    for k, x in enumerate(inputs):
        x["detections"] = detections(x["instances"])
        x["instances"] = image_dict(k + 9, *x["image"].shape[1:], objects=3)["instances"]
    found = losses(inputs, *by_teacher(*HEADS))
    others = losses([{**x, "instances": y["instances"]} for x, y in zip(batch(), inputs)])
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], x, rtol=1e-5) for name, x in expected.items())
    changed = {name for name, x in others.items() if not torch.allclose(found[name], x, rtol=1e-5)}
    for head in HEADS:
        assert any(name.startswith(f"loss_{head.lower()}") for name in changed), head


def test_no_detection() -> None:
    inputs = batch()
    for x in inputs:
        x["detections"] = detections(x["instances"][:0])
    found = losses(inputs, *by_teacher(*HEADS))
    expected = losses([{**x, "instances": x["instances"][:0]} for x in batch()])
    for name, x in expected.items():
        assert torch.allclose(found[name], x) and x.isfinite()
    sum(found.values()).backward()


def test_the_networks_own_detections() -> None:
    teacher: Any = outspoken_model("faster", seed=1)
    model = distilled("faster", ["FGD"], *by_teacher("FGD", score=0.0), teacher=teacher)
    found = kd_losses(model, [image_dict(0, objects=0), image_dict(1)])
    plain = distilled("faster", ["FGD"], teacher=outspoken_model("faster", seed=1))
    other = kd_losses(plain, [image_dict(0, objects=0), image_dict(1)])
    assert "detections" in model.active_needs(teacher="")
    assert "detections" not in plain.active_needs(teacher="")
    assert all(x.isfinite() and x != other[name] for name, x in found.items())


# ---- Selection.


def found_of(*scores: float, classes: Any = None) -> Instances:
    boxes = torch.tensor([[10.0 * k, 0, 10 * k + 9, 9] for k in range(len(scores))]).view(-1, 4)
    found = Instances((64, 64), pred_boxes=Boxes(boxes), scores=torch.tensor(scores))
    found.pred_classes = torch.tensor(classes or [0] * len(scores), dtype=torch.long)
    return found


def test_detections_are_selected_by_score_and_cut() -> None:
    found = found_of(0.5, 0.49, 0.9)
    (kept,) = TeacherInstances(0.5, CLASSES, CLASSES)([found], (64, 25))
    assert kept.pred_boxes.tensor[:, 0::2].tolist() == [[0, 9], [20, 25]]
    (kept,) = TeacherInstances(0.5, CLASSES, CLASSES)([found], (64, 20))
    assert len(kept) == 1  # the other one is in the padding
    assert found.pred_boxes.tensor[2, 2] == 29  # and the outputs of the teacher stay


def test_classes_that_the_student_lacks_are_left_out() -> None:
    found = found_of(1.0, 1.0, 1.0, 1.0, classes=[0, 1, 2, 9])
    names = ("star", "dog", "circle")
    (kept,) = TeacherInstances(0.5, CLASSES, names)([found], (64, 64))
    assert kept.pred_classes.tolist() == [2, 0]
    (kept,) = TeacherInstances(0.5, CLASSES, ())([found], (64, 64))  # names are unknown
    assert len(kept) == 4


# ---- Refusals.


@pytest.mark.parametrize("head", ["FGD", "FGFI", "DeFeat", "IMA"])
def test_a_teacher_without_detections(head: str) -> None:
    own = network_info("student", tiny_model("faster"))
    teacher = replace(own, name="teacher", outputs=frozenset({"features"}))
    sentence = f"MODEL.DISTILL.{head.upper()}.INSTANCES is teacher, but the teacher (General"
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        cfg = tiny_cfg("faster", *by_teacher(head))
        DISTILL_HEAD_REGISTRY.get(head)(cfg, own, teacher)


def test_no_class_in_common() -> None:
    own = network_info("student", tiny_model("faster"))
    teacher = replace(own, name="teacher", detection_classes=("cat", "dog"))
    words = r"INSTANCES is teacher, but student classes \(circle, .* \(cat, dog\) have no name in"
    with pytest.raises(ConfigError, match=words):
        IMA(tiny_cfg("faster", *by_teacher("IMA")), own, teacher)


def test_detections_of_a_file_have_no_masks() -> None:
    teacher = distilled("mask", ["IMA"]).teacher
    teacher.given_detections = True
    info = teacher.info(CLASSES, (), CLASSES)
    assert "detections" in info.outputs and info.detection_classes == CLASSES
    own = network_info("student", tiny_model("mask"))
    cfg = tiny_cfg("mask", *by_teacher("IMA"))
    with pytest.raises(ConfigError, match="have no masks; set SCOPE box"):
        IMA(cfg, own, info)


def test_a_batch_without_detections() -> None:
    model = distilled("faster", ["FGD"], *by_teacher("FGD"))
    model.teacher.given_detections = True
    with pytest.raises(ConfigError, match=r"the mapper .* gives no 'detections'"):
        kd_losses(model, [image_dict(0)])


def test_unknown_names_are_no_names(tmp_path: Path) -> None:
    """A network whose class names are unknown keeps all of its detections."""
    teacher = write_teacher(tmp_path, "faster", "MODEL.ROI_HEADS.NUM_CLASSES", 5)
    cfg = tiny_cfg("faster", "MODEL.DISTILL.HEADS", ("IMA",), *teacher, *by_teacher("IMA"))
    head: Any = DistillModel(cfg).heads["IMA"]
    assert not head.selection.known

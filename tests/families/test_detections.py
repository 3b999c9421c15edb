"""A teacher's detections are those of its own inference, in the student's pixels."""

import pytest
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances

from distill.families import build_family
from distill.modeling.teacher import Teacher
from distill.structures import Batch, DenseOutputs, NetworkOutputs
from tests.support.networks import FAMILIES, image_dict, outspoken_model

DETECTORS = [family for family in FAMILIES if family != "semantic"]
STRIDES = (4, 8, 16, 32, 64)


def asked(family: str, *needs: str, scale: float = 1.0) -> tuple[Teacher, NetworkOutputs]:
    """Return a teacher, and its outputs for two images of 64 pixels."""
    model = outspoken_model(family).eval()
    model.test_score_thresh = 0.0  # a dense detector that is not trained is sure of nothing
    teacher = Teacher(build_family(model), input_format="BGR", student_format="BGR", scale=scale)
    said = NetworkOutputs(Batch([image_dict(k) for k in range(2)], (64, 64)))
    said.features = {"p2": torch.zeros(1)}
    said.dense = DenseOutputs([], [], [(64 // s, 64 // s) for s in STRIDES])
    return teacher, teacher.ask(said, frozenset({"features", *needs}))


def same(found: Instances, expected: Instances, factor: float = 1.0) -> bool:
    assert len(found) > 3
    fields = expected.get_fields()
    assert found.get_fields().keys() == fields.keys()
    boxes = torch.equal(found.pred_boxes.tensor * factor, fields.pop("pred_boxes").tensor)
    return boxes and all(torch.equal(found.get(k), x) for k, x in fields.items())


@pytest.mark.parametrize("family", DETECTORS)
def test_detections_are_those_of_an_inference(family: str) -> None:
    teacher, said = asked(family, "detections")
    inputs = [image_dict(k) for k in range(2)]
    if family == "panoptic":  # it has no inference before the postprocessing
        model = teacher.model
        images = model.preprocess_image(inputs)
        proposals, _ = model.proposal_generator(images, said.features)
        expected, _ = model.roi_heads(images, said.features, proposals)
    elif hasattr(teacher.model, "inference"):
        expected = teacher.model.inference(inputs, do_postprocess=False)
    else:
        expected = [x["instances"] for x in teacher.model(inputs)]
        said.detections = [detector_postprocess(x, 64, 64) for x in said.detections]
    assert len(expected) == 2
    assert all(same(*pair) for pair in zip(said.detections, expected))
    assert not any(x.scores.requires_grad for x in said.detections)


@pytest.mark.parametrize("family", ["retinanet", "fcos", "gfl"])
def test_dense_outputs_are_not_rewritten(family: str) -> None:
    """detectron2's inference turns logits into probabilities in place."""
    _, alone = asked(family, "dense")
    _, both = asked(family, "dense", "detections")
    assert alone.dense is not None and both.dense is not None
    pairs = zip(alone.dense.logits, both.dense.logits)
    assert all(torch.equal(a, b) for a, b in pairs) and both.detections


def test_boxes_of_a_teacher_of_larger_images_are_in_the_students_pixels() -> None:
    teacher, said = asked("mask", "detections", scale=2.0)
    inputs = [{"image": teacher.image(image_dict(k)["image"])} for k in range(2)]
    expected = teacher.model.inference(inputs, do_postprocess=False)
    assert all(same(*pair, factor=2.0) for pair in zip(said.detections, expected))

"""Dense families read the student's own assignment and maps inside its head."""

from unittest.mock import patch

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn

from distill.families import build_family
from distill.modeling.teacher import Teacher
from tests.support.networks import (
    DENSE,
    YOLO,
    image_dict,
    network_info,
    outspoken_model,
    tiny_fcos,
    tiny_model,
)

FAMILIES = ("retinanet", *DENSE, *YOLO)
SECTIONS = {"retinanet": "RETINANET", **{k: v.upper() for k, v in (DENSE | YOLO).items()}}
WITH_SUBNETS = [f for f in FAMILIES if f not in ("reppoints", *YOLO)]
ASSIGNMENTS = {
    **dict.fromkeys(("retinanet", "fcos"), "label_anchors"),
    **dict.fromkeys(("atss", "gfl"), "targets"),
    **dict.fromkeys(YOLO, "dynamic_targets"),
    "reppoints": "refine_targets",  # by which the classes are trained
}
NEEDS = frozenset({"features", "dense", "targets", "head_features"})


def image_dicts():
    """Two sizes; the last has nothing on it."""
    return [
        image_dict(0, 64, 96, objects=4),
        image_dict(1, 96, 64),
        image_dict(2, 64, 64, objects=0),
    ]


def tall(family, *opts, convs=3, **kw):
    depth = () if family in ("yolov5", "yolov7") else (f"MODEL.{SECTIONS[family]}.NUM_CONVS", convs)
    return outspoken_model(family, *depth, *opts, **kw)


def heard(model, needs=NEEDS, inputs=None):
    """Return a student's outputs in a training forward."""
    reader, inputs = build_family(model), inputs or image_dicts()
    needs = needs & reader.outputs
    with EventStorage(), reader.record(needs) as calls:
        model(inputs)
    return reader.read(calls, reader.batch(calls, inputs), needs)


def own_targets(model, features, instances):
    """(N, R) labels and (N, R, 4) boxes by the model's own method."""
    maps = [features[f] for f in model.head_in_features]
    anchors = model.anchor_generator(maps)
    if hasattr(model, "dynamic_targets"):
        with patch.object(model, "dynamic_targets", wraps=model.dynamic_targets) as method:
            model.losses(anchors, model.head(maps), instances)
        return model.dynamic_targets(*method.call_args.args)[:2]
    if hasattr(model, "refine_targets"):
        first = model.flat(model.head(maps)[2], 4)
        boxes = model.decoded(first, Boxes.cat(anchors).tensor.expand_as(first))
        return model.refine_targets(boxes, instances)
    if hasattr(model, "label_anchors"):
        return tuple(torch.stack(x) for x in model.label_anchors(anchors, instances))
    return model.targets(anchors, instances)


# ---- Targets


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_those_of_the_students_assignment(family):
    model = tall(family)
    said = heard(model)
    labels, boxes = own_targets(model, said.features, said.batch.instances)
    assert torch.equal(said.targets.labels, labels)
    positive = (labels >= 0) & (labels < 3)
    assert positive[0].any() and positive[1].any() and not positive[2].any()
    assert torch.equal(said.targets.boxes, boxes)
    assert said.targets.labels.shape == (3, sum(x.shape[1] for x in said.dense.logits))
    truth = torch.cat([x.gt_boxes.tensor for x in said.batch.instances])
    found = said.targets.boxes[positive]
    assert (found[:, None] == truth).all(2).any(1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_assignment_is_recorded_by_its_name_and_only_if_needed(family):
    reader = build_family(tall(family))
    assert reader.assignment == f"{ASSIGNMENTS[family]}()"
    assert "targets" in reader.outputs
    assert reader.assignment in reader.recorded_modules({"targets"})
    assert reader.assignment not in reader.recorded_modules({"dense", "head_features"})
    assert heard(reader.model, frozenset({"dense"})).targets is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_is_left_as_it_was(family):
    model = tall(family)
    before = set(vars(model))
    heard(model)
    assert set(vars(model)) - {"loss_normalizer"} == before  # detectron2's average
    assert not any(x._forward_hooks for x in model.modules())


def test_ignored_anchors_are_minus_one():
    said = heard(tall("retinanet"))
    assert {-1, 3} < set(said.targets.labels.unique().tolist()) <= {-1, 0, 1, 2, 3}


def test_an_rcnn_has_neither():
    outputs = build_family(tiny_model("faster")).outputs
    assert not outputs & {"targets", "head_features"}


# ---- HeadFeatures


def layers(subnet, x):
    """The maps in front of each activation, and the last one."""
    found = []
    for module in subnet:
        if isinstance(module, nn.ReLU):
            found.append(x)
        x = module(x)
    return found, x


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
@pytest.mark.parametrize("family", WITH_SUBNETS)
def test_head_features_are_the_maps_before_the_activations(family, norm):
    """A norm comes before the activation; detectron2's BN has one for each level."""
    opts = (f"MODEL.{SECTIONS[family]}.NORM", norm)
    model = tall(family, *opts, fpn=32)
    said = heard(model)
    for subnet, head_features in (
        ("cls_subnet", said.head_features.classes),
        ("bbox_subnet", said.head_features.boxes),
    ):
        assert len(head_features) == 3 and all(len(x) == 5 for x in head_features)
        for level, name in enumerate(model.head_in_features):
            expected, _ = layers(getattr(model.head, subnet), said.features[name])
            for found, own in zip((x[level] for x in head_features), expected):
                torch.testing.assert_close(found, own)
                assert found.requires_grad and (found < 0).any()


@pytest.mark.parametrize("family", WITH_SUBNETS)
def test_predictions_are_made_of_the_head_features(family):
    """By the head's last layers, which are the student's own."""
    model = tall(family)
    said = heard(model)
    head = model.head
    for level, (h, w) in enumerate(said.dense.sizes):
        logits = head.cls_score(said.head_features.classes[-1][level].relu())
        rows = logits.view(3, -1, 3, h, w).permute(0, 3, 4, 1, 2).reshape(3, -1, 3)
        torch.testing.assert_close(said.dense.logits[level], rows)


def test_a_gradient_of_the_head_features_reaches_the_layers_before_them():
    model = tall("atss")
    said = heard(model)
    said.head_features.classes[1][0].sum().backward()
    convolutions = [x for x in model.head.cls_subnet if isinstance(x, nn.Conv2d)]
    assert [x.weight.grad is not None for x in convolutions] == [True, True, False]


def test_reppoints_has_no_head_features():
    assert "head_features" not in build_family(tall("reppoints")).outputs


def test_detectron2s_own_fcos_has_both():
    said = heard(tiny_fcos())
    labels, _ = own_targets(tiny_fcos(), said.features, said.batch.instances)
    assert torch.equal(said.targets.labels, labels)
    assert [x.shape[1] for x in said.head_features.boxes[0]] == [16] * 5


# ---- The teacher's


@pytest.mark.parametrize("family", WITH_SUBNETS)
def test_the_teachers_head_features_are_cut_to_the_students_cells(family):
    student = heard(tall(family), inputs=image_dicts()[:1])
    model = tall(family, seed=1)
    images = torch.randn(1, 3, 128, 128)  # padded further than the student's 64 x 96
    model.eval()
    with torch.no_grad():
        taught = build_family(model).ask(images, student, {"dense", "head_features"})
        features = model.backbone(images)
    assert taught.targets is None
    for head_features in (taught.head_features.classes, taught.head_features.boxes):
        for row in head_features:
            assert [tuple(x.shape[2:]) for x in row] == student.dense.sizes
    expected, _ = layers(model.head.cls_subnet, features["p3"])
    height, width = student.dense.sizes[1]
    for found, own in zip((x[1] for x in taught.head_features.classes), expected):
        torch.testing.assert_close(found, own[..., :height, :width])
    assert not any(x._forward_hooks for x in model.modules())


def test_a_teacher_is_not_recorded_for_head_features_that_nobody_needs():
    student = heard(tall("gfl"), inputs=image_dicts()[:1])
    model = tall("gfl", seed=1)
    teacher = Teacher(build_family(model), input_format="BGR", student_format="BGR")
    assert teacher.ask(student, frozenset({"dense"})).head_features is None
    assert network_info("teacher", model).outputs >= {
        "dense",
        "dense_boxes",
        "targets",
        "head_features",
    }

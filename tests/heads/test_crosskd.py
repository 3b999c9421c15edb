"""CrossKD: the teacher's last layers on the student's features, layer by layer and in NumPy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from distill.heads import CrossKD
from tests.reference import literal_methods as literal
from tests.support.networks import (
    distilled,
    image_dict,
    kd_losses,
    network_info,
    outspoken_model,
    tiny_fcos,
    tiny_model,
)

FAMILIES = {"retinanet": "RETINANET", "fcos": "FCOS", "atss": "ATSS", "gfl": "GFL"}
REUSED = {"retinanet": 1, "fcos": 2, "atss": 1, "gfl": 1}
WEIGHTS = {"retinanet": (1.0, 1.0), "fcos": (0.4, 0.75), "atss": (1.0, 1.0), "gfl": (1.0, 4.0)}
SUBNETS = ("cls_subnet", "bbox_subnet")
every_family = pytest.mark.parametrize("family", FAMILIES)


def outspoken(family, seed, *opts, convs=3, **kw):
    """Return a detector with so many convolutions, of larger weights than detectron2's 0.01."""
    model = outspoken_model(
        family, f"MODEL.{FAMILIES[family]}.NUM_CONVS", convs, *opts, seed=seed, **kw
    )
    for name in SUBNETS:
        for layer in getattr(model.head, name):
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.1)
    if family == "fcos":
        nn.init.constant_(model.head.bbox_pred.bias, 1.5)  # no box is empty
    return model


def model_of(family, *opts, student=None, teacher=None, **kw):
    student = student or outspoken(family, 0, *opts, **kw)
    teacher = teacher or outspoken(family, 1, *opts, **kw)
    return distilled(family, ["CrossKD"], *opts, student=student, teacher=teacher)


def image_dicts():
    """Two sizes; the second has nothing on it."""
    return [image_dict(0, 64, 96, objects=4), image_dict(1, 96, 64, objects=0)]


def heard(model, inputs=None):
    said = []
    handle = model.heads["CrossKD"].register_forward_pre_hook(lambda _, args: said.extend(args))
    found = kd_losses(model, inputs or image_dicts())
    handle.remove()
    return found, *said


# ---- By hand


def number(x):
    return x.detach().double().numpy()


def convolutions(subnet):
    """(convolution, its norm or None) one after the other."""
    return [x for x in subnet if not isinstance(x, nn.ReLU)]


def before_activation(subnet, x, count):
    """The map behind so many convolutions, before the activation of the last."""
    for k, layer in enumerate(convolutions(subnet)[:count]):
        x = layer(x.clamp(min=0) if k else x)
    return x


def rows(maps, width):
    """(N, H·W·A, width) of (N, A·width, H, W)."""
    n, _, height, w = maps.shape
    return number(maps).reshape(n, -1, width, height, w).transpose(0, 3, 4, 1, 2).reshape(
        n, -1, width
    )  # fmt: skip


def reused(head, features, convs, width, scales, level):
    """Logits, regression and, if any, centerness that a head predicts of features per task."""
    outputs = []
    for subnet, x, predictors in zip(
        (getattr(head, name) for name in SUBNETS),
        features,
        (("cls_score",), ("bbox_pred", "ctrness")),
    ):
        x = x.clamp(min=0)
        for layer in convolutions(subnet)[len(convolutions(subnet)) - convs :]:
            x = layer(x).clamp(min=0)
        outputs += [getattr(head, p)(x) for p in predictors if hasattr(head, p)]
    if scales is not None:
        outputs[1] = outputs[1] * scales[level].factor
    return [rows(x, k) for x, k in zip(outputs, width)]


def predicted(model, student, teacher, convs):
    """Return the teacher head's outputs for the student's and its own features, and its boxes."""
    own, other = model.student.head, copy.deepcopy(model.teacher.model.head).double()
    kept = len(convolutions(own.cls_subnet)) - convs
    width = (3, getattr(model.student, "box_dim", 4), 1)
    scales = getattr(other, "scales", None)
    both = ([], [])
    for level, name in enumerate(f"p{k}" for k in range(2, 7)):
        held, aligned = [], []
        for subnet in SUBNETS:
            s = before_activation(getattr(own, subnet), student.features[name], kept)
            t = before_activation(getattr(other, subnet), teacher.features[name].double(), kept)
            mean, std = t.mean((0, 2, 3), keepdim=True), t.std((0, 2, 3), keepdim=True)
            standard = torch.from_numpy(literal.pkd_standardized(number(s)))
            held.append(t)
            aligned.append(standard * std + mean)
        for found, features in zip(both, (aligned, held)):
            found.append(reused(other, features, convs, width, scales, level))
    return [[np.concatenate(x, 1) for x in zip(*levels)] for levels in both]


def anchors_of(net, sizes):
    """(R, 4) by loops."""
    grid = []
    generator = net.anchor_generator
    for (height, width), stride, cells in zip(sizes, generator.strides, generator.cell_anchors):
        for i, j in np.ndindex(height, width):
            shift = (np.array([j, i, j, i]) + generator.offset) * stride
            grid.append(cells.double().numpy() + shift)
    return np.concatenate(grid)


def decoded(net, deltas, anchors):
    """(N, R, 4) boxes of deltas, or of distances in units of the anchors' sides."""
    size = anchors[:, 2:] - anchors[:, :2]
    centre = anchors[:, :2] + size / 2
    if not hasattr(net.box2box_transform, "weights"):  # FCOS: left, top, right, bottom
        distances = np.maximum(deltas, 0) * size[:, :1]
        return np.concatenate([centre - distances[..., :2], centre + distances[..., 2:]], 2)
    deltas = deltas / np.array(net.box2box_transform.weights)
    centre = centre + deltas[..., :2] * size
    half = np.exp(np.minimum(deltas[..., 2:], net.box2box_transform.scale_clamp)) * size / 2
    return np.concatenate([centre - half, centre + half], 2)


def generalized_iou(a, b):
    """(N, R) IoU and GIoU of boxes one to one."""
    both = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0).prod(2)
    hull = (np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])).prod(2)
    areas = [(x[..., 2:] - x[..., :2]).prod(2) for x in (a, b)]
    union = sum(areas) - both
    return both / union, both / union - (hull - union) / hull


def centerness(anchors, boxes):
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    first, last = centre - boxes[..., :2], boxes[..., 2:] - centre
    return np.sqrt((np.minimum(first, last) / np.maximum(first, last)).clip(0).prod(2))


def expected_terms(family, model, student, teacher, convs):
    (r, r_box, *r_ctr), (t, t_box, *t_ctr) = predicted(model, student, teacher, convs)
    net, labels = model.student, student.targets.labels.numpy()
    trained, positive = labels >= 0, (labels >= 0) & (labels < 3)
    anchors = anchors_of(net, student.dense.sizes)
    average = positive.sum()
    if family == "fcos":
        average = centerness(anchors, number(student.targets.boxes))[positive].sum()
    assert average > 1
    weight = literal.expit(t).max(2) * trained
    terms = {"cls": literal.crosskd_classes(r[trained], t[trained], average)}
    if family == "gfl":
        bins = (x.reshape(-1, 4, 17) for x in (r_box, t_box))
        terms["box"] = literal.crosskd_bins(*bins, weight.ravel())
    else:
        iou, giou = generalized_iou(*(decoded(net, x, anchors) for x in (r_box, t_box)))
        gap = -np.log(np.maximum(iou, 1e-6)) if family == "fcos" else 1 - giou
        terms["box"] = (weight * gap).sum() / average
    if family == "atss":
        entropy = literal.bce(r_ctr[0], literal.expit(t_ctr[0]))[..., 0]
        terms["centerness"] = entropy[positive].sum() / average
    return terms


@every_family
@pytest.mark.parametrize("convs", [None, 0, 2])
def test_the_formula(family, convs):
    opts = () if convs is None else ("MODEL.DISTILL.CROSSKD.REUSED_CONVS", convs)
    model = model_of(family, *opts)
    found, student, teacher = heard(model)
    convs = REUSED[family] if convs is None else convs
    assert model.heads["CrossKD"].reused_convs == convs
    terms = expected_terms(family, model, student, teacher, convs)
    factors = dict(zip(("cls", "box", "centerness"), (*WEIGHTS[family], 1.0)))
    expected = {f"loss_crosskd/{k}": factors[k] * v for k, v in terms.items()}
    assert all(x > 1e-4 for x in expected.values())
    assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, rel=1e-4)


def test_what_retinanet_ignores_is_not_taught():
    """Anchors between background and object, whose label is -1."""
    model = model_of("retinanet")
    _, student, teacher = heard(model)
    assert (student.targets.labels == -1).any()
    head = model.heads["CrossKD"]
    before = head(student, teacher)
    student.targets.labels[student.targets.labels == -1] = 3
    after = head(student, teacher)
    assert all(after[k] > before[k] for k in before)


@every_family
def test_weights_of_the_config_win(family):
    opts = ("MODEL.DISTILL.CROSSKD.CLASS_WEIGHT", 2.0, "MODEL.DISTILL.CROSSKD.BOX_WEIGHT", 0.0)
    authors, _, _ = heard(model_of(family))
    own, _, _ = heard(model_of(family, *opts))
    ratio = own["loss_crosskd/cls"] / authors["loss_crosskd/cls"]
    assert ratio.item() == pytest.approx(2 / WEIGHTS[family][0], rel=1e-4)
    assert own["loss_crosskd/box"] == 0


# ---- Alignment


@every_family
def test_a_student_equal_to_the_teacher_predicts_what_the_teacher_does(family):
    student = outspoken(family, 0)
    model = model_of(family, student=student, teacher=copy.deepcopy(student))
    _, said, taught = heard(model)
    head = model.heads["CrossKD"]
    logits, regression, *_ = head.last_layers.value(
        head.aligned(said.head_features, taught.head_features)
    )
    torch.testing.assert_close(logits, torch.cat(taught.dense.logits, 1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(regression, torch.cat(taught.dense.deltas, 1), rtol=1e-3, atol=1e-4)


@every_family
def test_the_teachers_own_features_are_read_as_the_teacher_does(family):
    model = model_of(family)
    _, _, taught = heard(model)
    head = model.heads["CrossKD"]
    held = [head.held(taught.head_features, task) for task in ("classes", "boxes")]
    logits, regression, *_ = head.last_layers.value(held)
    torch.testing.assert_close(logits, torch.cat(taught.dense.logits, 1))
    torch.testing.assert_close(regression, torch.cat(taught.dense.deltas, 1))


def test_aligned_features_have_the_teachers_mean_and_deviation():
    model = model_of("gfl")
    _, student, teacher = heard(model)
    head = model.heads["CrossKD"]
    for task, levels in zip(
        ("classes", "boxes"), head.aligned(student.head_features, teacher.head_features)
    ):
        for found, t in zip(levels[:3], head.held(teacher.head_features, task)):
            for of in (torch.mean, torch.std):
                a, b = (of(x, (0, 2, 3)) for x in (found, t))
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@every_family
def test_norms_of_the_subnets_are_before_what_is_held(family):
    """detectron2's GroupNorm has 32 groups."""
    opts = (f"MODEL.{FAMILIES[family]}.NORM", "GN")
    found, student, _ = heard(model_of(family, *opts, fpn=32))
    assert all(x.isfinite() and x > 0 for x in found.values())
    held = student.head_features.classes[0][0]
    groups = held.unflatten(1, (32, 1)).flatten(2)
    torch.testing.assert_close(groups.mean(2), torch.zeros_like(groups[:, :, 0]), atol=1e-4, rtol=0)


# ---- Gradients


@every_family
def test_the_gradient_ends_in_front_of_what_is_held(family):
    model = model_of(family)
    found, *_ = heard(model)
    model.zero_grad()
    sum(found.values()).backward()
    head = model.student.head
    for name in SUBNETS:
        layers = convolutions(getattr(head, name))
        before = layers[: len(layers) - REUSED[family]]
        assert all(x.weight.grad.abs().sum() > 0 for x in before)
        assert all(p.grad is None for x in layers[len(before) :] for p in x.parameters())
    predictors = (head.cls_score, head.bbox_pred)
    assert all(p.grad is None for x in predictors for p in x.parameters())
    backbone = [p.grad for p in model.student.backbone.parameters()]
    assert sum(float(x.abs().sum()) for x in backbone if x is not None) > 0


@every_family
def test_the_teachers_head_learns_nothing_and_is_no_part_of_the_model(family):
    model = model_of(family)
    before = copy.deepcopy(model.teacher.model.state_dict())
    found, *_ = heard(model)
    sum(found.values()).backward()
    teacher = [*model.teacher.model.parameters()]
    assert not any(p.requires_grad or p.grad is not None for p in teacher)
    head = model.heads["CrossKD"]
    assert not list(head.parameters()) and head.state_dict() == {}
    outside = {id(x) for x in model.teacher.model.modules()}
    assert outside.isdisjoint(id(x) for x in model.modules())
    assert {id(p) for p in teacher}.isdisjoint(id(p) for p in model.parameters())
    model.train()
    assert not any(x.training for x in model.teacher.model.modules())
    after = model.teacher.model.state_dict()
    assert all(torch.equal(x, before[k]) for k, x in after.items())


def test_the_head_of_the_teacher_keeps_its_first_layers():
    model = model_of("atss")
    teacher = model.teacher.model
    reading = model.heads["CrossKD"].last_layers.value.head
    assert reading is not teacher.head
    assert len(convolutions(teacher.head.cls_subnet)) == 3
    assert reading.cls_score is teacher.head.cls_score
    assert reading.cls_subnet[-1] is teacher.head.cls_subnet[-1]


def test_copies_share_the_teachers_head():
    model = model_of("gfl")
    twin = copy.deepcopy(model)
    heads = model.heads["CrossKD"], twin.heads["CrossKD"]
    assert heads[0] is not heads[1] and heads[0].last_layers is heads[1].last_layers
    found, expected = (heard(x)[0] for x in (twin, model))
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}


# ---- Other networks


@every_family
def test_subnets_of_other_channels_train_an_adapter(family):
    model = model_of(family, teacher=outspoken(family, 1, fpn=24))
    found, *_ = heard(model)
    head = model.heads["CrossKD"]
    assert [x.weight.shape for x in head.adapters] == [(24, 16, 1, 1)] * 2
    assert head.adapters[0] is not head.adapters[1]
    sum(found.values()).backward()
    assert all(x.weight.grad.abs().sum() > 0 for x in head.adapters)
    assert {k.split(".")[0] for k in head.state_dict()} == {"adapters"}


@pytest.mark.parametrize("convs, reused", [((1, 3), 0), ((3, 2), 1), ((2, 4), 1), ((4, 4), 2)])
def test_subnets_of_other_lengths(convs, reused):
    """Convolutions are counted from the end."""
    teacher = outspoken("fcos", 1, convs=convs[1])
    model = model_of("fcos", student=outspoken("fcos", 0, convs=convs[0]), teacher=teacher)
    found, student, said = heard(model)
    head = model.heads["CrossKD"]
    assert head.reused_convs == reused
    for outputs, count in ((student, convs[0]), (said, convs[1])):
        assert len(outputs.head_features.classes) == len(outputs.head_features.boxes) == count
        assert (
            head.held(outputs.head_features, "boxes")
            is outputs.head_features.boxes[count - 1 - reused]
        )
    assert all(x > 0 for x in found.values())


def test_detectron2s_own_fcos_teaches():
    model = distilled("fcos", ["CrossKD"], teacher=tiny_fcos(1))
    assert sum(heard(model)[0].values()) > 0.01


def test_the_teacher_may_list_other_classes():
    """The student's logits are not read: nothing is matched."""
    teacher = outspoken_model("gfl", "MODEL.GFL.NUM_CLASSES", 5, seed=1)
    model = distilled("gfl", ["CrossKD"], teacher=teacher, teacher_classes=tuple("abcde"))
    assert all(x > 0 for x in heard(model)[0].values())


@pytest.mark.parametrize("family", ["fcos", "gfl"])
def test_a_batch_without_any_box_trains(family):
    model = model_of(family)
    found, *_ = heard(model, [image_dict(0, objects=0), image_dict(1, 96, 64, objects=0)])
    total = sum(found.values())
    total.backward()
    assert total.isfinite() and found["loss_crosskd/cls"] > 0


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        ("gfl", "atss", "the head of a ATSS cannot read the features of a GFL head"),
        ("reppoints", "reppoints", "it compares head_features, which the student"),
        ("faster", "faster", "it compares head_features, targets, which the student"),
    ],
)
def test_heads_that_cannot_read_each_other(student, teacher, message):
    nets = (
        network_info("student", tiny_model(student)),
        network_info("teacher", tiny_model(teacher)),
    )
    assert CrossKD.problem(*nets).startswith(message)

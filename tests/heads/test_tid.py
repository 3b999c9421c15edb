"""TID on a dense head: points, anchors, classes, levels, against the paper read literally."""

import math

import numpy as np
import pytest
import torch

from distill import losses
from distill.errors import ConfigError
from distill.families import build_family
from distill.families.dense import decode_dense
from distill.heads.tid import cell_centres
from distill.structures import Batch, DenseOutputs, NetworkOutputs
from tests.reference import literal
from tests.support.networks import (
    distilled,
    image_dict,
    kd_losses,
    outspoken_model,
    tiny_fcos,
    tiny_model,
)

IMAGES = {"two sizes": ((64, 96, 3), (96, 64, 2)), "nothing on one": ((64, 64, 4), (64, 64, 0))}


def tid_model(family, *args, teacher=None, **keys):
    opts = [x for k, v in keys.items() for x in (f"MODEL.DISTILL.TID.{k}", v)]
    return distilled(family, ["TID"], *args, *opts, teacher=teacher)


def batch(sizes):
    return [image_dict(i, h, w, objects=n) for i, (h, w, n) in enumerate(sizes)]


def heard(model, inputs):
    """Losses, and the signals of student and teacher."""
    outputs = []
    handle = model.heads["TID"].register_forward_pre_hook(lambda _, args: outputs.extend(args))
    found = kd_losses(model, inputs)
    handle.remove()
    return {k.split("/")[1]: v.item() for k, v in found.items()}, *outputs


def detector(net):
    return getattr(net, "proposal_generator", net)


def decoded(net, outputs, image, strides):
    """Return (P, A, 4) boxes and (P, A, K) logits of one image, anchor by anchor."""
    owner = detector(net)
    boxes, logits = [], []
    for level, (height, width) in enumerate(outputs.dense.sizes):
        cells = list(owner.anchor_generator.cell_anchors)[level].double().numpy()
        deltas = outputs.dense.deltas[level][image].detach().double().numpy()
        raw = outputs.dense.logits[level][image].detach().double().numpy()
        for i in range(height):
            for j in range(width):
                point = (i * width + j) * len(cells)
                shift = np.array([j, i, j, i]) * strides[level]
                boxes.append(
                    [
                        decode(cells[a] + shift, deltas[point + a], owner.box2box_transform)
                        for a in range(len(cells))
                    ]
                )
                logits.append(raw[point : point + len(cells)])
    return np.array(boxes), np.array(logits)


def decode(anchor, delta, transform):
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = anchor[0] + w / 2, anchor[1] + h / 2
    dx, dy, dw, dh = delta / np.array(transform.weights)
    limit = transform.scale_clamp
    x, y = x + dx * w, y + dy * h
    w, h = w * math.exp(min(dw, limit)), h * math.exp(min(dh, limit))
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def opinion(net, outputs, image, truth, strides, thresholds):
    """Score, IOU_max · p and the best box of each point."""
    boxes, logits = decoded(net, outputs, image, strides)
    gt, classes = truth.gt_boxes.tensor.double().numpy(), truth.gt_classes.numpy()
    points = len(boxes)
    iou, prob, best = np.zeros(points), np.zeros(points), boxes[:, 0].copy()
    for p in range(points):
        for k, box in enumerate(gt):
            for candidate in boxes[p]:
                value = literal.box_iou(candidate, box)
                if value > iou[p]:
                    iou[p], best[p] = value, candidate
                    column = classes[k] if logits.shape[2] > 1 else 0
                    prob[p] = (1 / (1 + np.exp(-logits[p, :, column]))).max()
    return literal.tid_score(iou, prob, *thresholds), iou * prob, best


def literal_losses(model, student, teacher):
    """Return each level's loss by the paper, on all points of all images."""
    strides = [2**k for k in range(2, 7)]
    thresholds = (0.7, 0.3) if hasattr(model.student, "proposal_generator") else (0.5, 0.4)
    sizes = student.dense.sizes
    points = [
        ((j + 0.5) * s, (i + 0.5) * s)
        for (h, w), s in zip(sizes, strides)
        for i in range(h)
        for j in range(w)
    ]
    sums, mass = np.zeros(len(sizes)), 0.0
    for image, truth in enumerate(student.batch.instances):
        nets = (model.student, student), (model.teacher.model, teacher)
        (score_s, _, _), (score_t, tie, boxes) = (
            opinion(net, outputs, image, truth, strides, thresholds) for net, outputs in nets
        )
        value = literal.tid_value(score_t, score_s, tie, boxes)
        gt = truth.gt_boxes.tensor.double().numpy()
        mask = literal.tid_mask(value * literal.tid_information(np.array(points), gt))
        start = 0
        for level, (h, w) in enumerate(sizes):
            part = mask[start : start + h * w].reshape(h, w)
            start += h * w
            s = student.features[f"p{level + 2}"][image].detach().double().numpy()
            t = teacher.features[f"p{level + 2}"][image].detach().double().numpy()
            sums[level] += (part * ((s - t) ** 2).mean(0)).sum()
            mass += part.sum()
    return {f"p{k + 2}": value / max(mass, 1e-6) for k, value in enumerate(sums)}


@pytest.mark.parametrize("sizes", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("family", ["faster", "retinanet"])
def test_it_is_the_papers_loss(family, sizes):
    model = tid_model(family)
    found, student, teacher = heard(model, batch(sizes))
    expected = literal_losses(model, student, teacher)
    assert sum(expected.values()) > 0.1
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_an_image_without_objects_adds_nothing():
    alone, _, _ = heard(tid_model("retinanet"), [image_dict(0)])
    both, _, _ = heard(tid_model("retinanet"), [image_dict(0), image_dict(1, objects=0)])
    assert both == pytest.approx(alone, rel=1e-5)


def test_no_object_at_all_is_a_connected_zero():
    model = tid_model("faster", teacher=outspoken_model("faster", seed=1, fpn=24))
    found = kd_losses(model, [image_dict(0, objects=0)])
    assert all(v == 0 for v in found.values())
    sum(found.values()).backward()
    assert all(p.grad is not None for p in model.heads.parameters())


@pytest.mark.parametrize("sets", [{"ALPHA_HIGH": 2.0, "ALPHA_MED": 2.0, "ALPHA_LOW": 2.0}])
def test_alphas_scale_the_loss_and_not_its_normaliser(sets):
    one, _, _ = heard(tid_model("faster"), [image_dict(0)])
    two, _, _ = heard(tid_model("faster", **sets), [image_dict(0)])
    assert two == pytest.approx({k: 2 * v for k, v in one.items()})


def test_each_alpha_has_its_area():
    one, student, teacher = heard(model := tid_model("retinanet"), [image_dict(0)])
    off, _, _ = heard(tid_model("retinanet", ALPHA_MED=0.0), [image_dict(0)])
    values = model.heads["TID"].values(student, teacher)
    mass = sum(losses.tid_mask(v).sum() for v in values)
    for level, v in zip(model.heads["TID"].levels, values):
        s, t = student.features[level.student], teacher.features[level.student]
        medium = ((v >= 0.01) & (v < 1)) * losses.tid_mask(v)
        part = (medium * (s - t).square().mean(1)).sum() / mass
        assert one[level.student] - off[level.student] == pytest.approx(part.item(), abs=1e-5)


SWITCHES = [
    {"SCORE": "cls"},
    {"SCORE": "reg"},
    {"AREA": "key"},
    {"AREA": "weak"},
    {"RAW_IOU": True},
    {"GAMMA": 0.5},
    {"TOP": 0.5},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_a_switch_reaches_its_function(switch, monkeypatch):
    calls = {}

    def spy(name):
        function = getattr(losses, name)

        def recorded(*args, **kwargs):
            calls.setdefault(name, []).append(kwargs)
            return function(*args, **kwargs)

        return recorded

    for name in ("tid_score", "tid_value"):
        monkeypatch.setattr(f"distill.heads.tid.{name}", spy(name))
    kd_losses(tid_model("retinanet", NMS_IOU=0.7, **switch), [image_dict(0)])
    name = {"SCORE": "parts", "RAW_IOU": "raw_iou", "AREA": "area"}
    for key, value in switch.items():
        key = name.get(key, key.lower())
        assert any(c.get(key) == value for found in calls.values() for c in found)
    assert all(c["nms_iou"] == 0.7 for c in calls["tid_value"])
    assert len(calls["tid_score"]) == 2


def test_classes_are_matched_by_name():
    """A teacher that lists the same classes in another order gives the same values."""
    inputs = [image_dict(0, objects=3), image_dict(4, objects=3)]
    teacher = outspoken_model("retinanet", seed=1)
    model = distilled("retinanet", ["TID"], teacher=teacher)
    found, _, _ = heard(model, inputs)
    order = [2, 0, 1]
    score = teacher.head.cls_score
    with torch.no_grad():
        for x in (score.weight, score.bias):
            x.copy_(x.view(-1, 3, *x.shape[1:])[:, order].reshape(x.shape))
    names = tuple(("circle", "square", "star")[i] for i in order)
    renamed = distilled("retinanet", ["TID"], teacher=teacher, teacher_classes=names)
    assert heard(renamed, inputs)[0] == pytest.approx(found, rel=1e-5)
    wrong, _, _ = heard(distilled("retinanet", ["TID"], teacher=teacher), inputs)
    assert wrong != pytest.approx(found, rel=1e-5)


def test_a_class_that_the_teacher_does_not_know_has_no_probability(caplog):
    model = distilled("retinanet", ["TID"], teacher_classes=("circle", "square", "x"))
    assert "TID skips classes unknown to the teacher: star" in caplog.text
    inputs = image_dict(0, objects=3)
    inputs["instances"].gt_classes[:] = 2  # star
    _, student, teacher = heard(model, [inputs])
    head = model.heads["TID"]
    for net in (student, teacher):
        score, tie, _ = head.scores(net, student, 0, (0.4, 0.5))
        assert tie.abs().sum() == 0 and score.max() <= 2


def test_half_precision_deltas_are_decoded_in_full_precision():
    net = tiny_fcos()
    deltas = [torch.rand(1, 4, 4).half() for _ in range(5)]
    sizes = [(2, 2)] * 5
    half, full = (NetworkOutputs(Batch([], (8, 8))) for _ in range(2))
    half.dense, full.dense = (
        DenseOutputs([], deltas, sizes),
        DenseOutputs([], [d.float() for d in deltas], sizes),
    )
    for outputs in (half, full):
        decode_dense(net, outputs, {"dense_boxes"})
    for a, b in zip(half.dense_boxes, full.dense_boxes):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_precomputed_proposals_have_no_dense_head():
    student = tiny_model("faster", "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    assert not build_family(student).outputs & {"dense", "dense_boxes"}
    with pytest.raises(ConfigError, match=r"TID .*compares dense, dense_boxes, which the student"):
        distilled("faster", ["TID"], student=student)


def test_thresholds_are_the_detectors_own():
    opts = ("MODEL.RETINANET.IOU_THRESHOLDS", [0.3, 0.6])
    model = tid_model("retinanet", *opts, teacher=outspoken_model("retinanet", seed=1))
    assert model.heads["TID"].thresholds == ((0.3, 0.6), (0.4, 0.5))
    assert tid_model("faster").heads["TID"].thresholds == ((0.3, 0.7), (0.3, 0.7))


def test_anchors_may_differ():
    """Points are compared, not anchors."""
    one = ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]])
    teacher = outspoken_model("faster", *one, seed=1)
    found, _, _ = heard(tid_model("faster", teacher=teacher), [image_dict(0)])
    assert sum(found.values()) > 0


def test_points_of_an_fcos_have_one_box():
    """No anchors, no matcher: RetinaNet's thresholds, and boxes by its own decoding."""
    model = distilled("retinanet", ["TID"], student=tiny_fcos(0), teacher=tiny_fcos(1))
    assert model.heads["TID"].thresholds == ((0.4, 0.5), (0.4, 0.5))
    found, student, _ = heard(model, [image_dict(0, objects=3), image_dict(1, objects=0)])
    assert sum(found.values()) > 0.1
    for level, (boxes, size) in enumerate(zip(student.dense_boxes, student.dense.sizes)):
        assert boxes.shape == (2, size[0] * size[1], 4)
        centres = cell_centres(size, 4 * 2**level, torch.device("cpu"))
        assert ((boxes[0, :, :2] <= centres) & (boxes[0, :, 2:] >= centres)).all()


@pytest.mark.parametrize(
    "family, teacher, message",
    [
        ("faster", "retinanet", "RPN .*objectness"),
        ("retinanet", "faster", "RPN .*objectness"),
    ],
)
def test_other_dense_heads_are_refused(family, teacher, message):
    with pytest.raises(ConfigError, match=rf"TID .*{message}"):
        tid_model(family, teacher=tiny_model(teacher))


def test_classes_without_a_common_name_are_refused():
    with pytest.raises(ConfigError, match=r"TID .*no name in common"):
        distilled("retinanet", ["TID"], teacher_classes=("x", "y", "z"))
    distilled("faster", ["TID"], teacher_classes=("x", "y", "z"))  # objectness knows no classes


def test_levels_are_those_of_the_dense_head():
    model = tid_model("faster", "MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5", "p6"],
                      "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256]])  # fmt: skip
    assert [x.student for x in model.heads["TID"].levels] == ["p3", "p4", "p5", "p6"]


def test_values_carry_no_gradient_and_lie_on_the_levels():
    model = tid_model("retinanet")
    _, student, teacher = heard(model, [image_dict(0), image_dict(1)])
    values = model.heads["TID"].values(student, teacher)
    assert [v.shape for v in values] == [(2, *size) for size in student.dense.sizes]
    assert not any(v.requires_grad for v in values)
    assert max(v.max() for v in values) > 0


def test_centres_go_row_by_row():
    assert cell_centres((2, 3), 8, torch.device("cpu")).tolist() == [
        *([4, 4], [12, 4], [20, 4]),
        *([4, 12], [12, 12], [20, 12]),
    ]

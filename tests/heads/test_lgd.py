"""LGD: maps made of the labels teach the student; its second run leaves no trace."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from distill.config import validate_config
from distill.engine import Trainer
from distill.errors import ConfigError
from distill.heads import unfinished_phases
from distill.heads.lgd import ImplicitTeacher
from tests.support.networks import (
    FAMILIES,
    STOCK_P3_P7,
    distill_opts,
    distilled,
    image_dict,
    kd_losses,
    outspoken_model,
    tiny_cfg,
)
from tests.support.trainings import trainable_cfg

DETECTORS = [family for family in FAMILIES if family != "semantic"]
CPU = torch.device("cpu")
DETACH = "MODEL.DISTILL.LGD.DETACH_ITERS"


def lgd_model(family="faster", *opts, detach_iters=0, **kw):
    return distilled(family, ["LGD"], DETACH, detach_iters, *opts, **kw)


def batch(objects=2):
    """Two sizes; the second image has no objects."""
    first = image_dict(0, 64, 80, objects, semantic=True)
    return [first, image_dict(1, 96, 64, objects=0, semantic=True)]


def sizes(parameters):
    """Return the gradients, or None."""
    return [None if p.grad is None else float(p.grad.abs().sum()) for p in parameters]


# ---- The whole head.


@pytest.mark.parametrize("objects", [2, 0])
@pytest.mark.parametrize("family", DETECTORS)
def test_every_detector_is_taught_by_its_own_head(family, objects):
    model = lgd_model(family)
    found = kd_losses(model, batch(objects))
    assert set(found) == {"loss_lgd/distill", "loss_lgd/teacher"}
    assert all(x.isfinite() and x > 0 and x.dtype == torch.float32 for x in found.values())
    sum(found.values()).backward()
    assert None not in sizes(model.heads.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("objects", [2, 0])
@pytest.mark.parametrize("iteration", [0, 1, 2, 3], ids=["warm-up", "detached", "on", "stopped"])
def test_every_parameter_has_a_gradient_at_every_iteration(iteration, objects):
    """Or DistributedDataParallel would stop."""
    keys = {"WARMUP_ITERS": 1, "STOP_ITER": 3, "DETACH_APPEARANCE": True}
    opts = [x for k, v in keys.items() for x in (f"MODEL.DISTILL.LGD.{k}", v)]
    model = lgd_model("faster", *opts, detach_iters=2)
    found = kd_losses(model, batch(objects), iteration)
    assert set(found) == {"loss_lgd/distill", "loss_lgd/teacher"}
    sum(found.values()).backward()
    assert None not in sizes(model.heads.parameters())


@pytest.mark.parametrize("family", ["faster", "retinanet", "fcos", "gfl"])
def test_training_steps_bring_the_maps_together(family):
    model = lgd_model(family)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for _ in range(5):
        torch.manual_seed(0)
        with EventStorage():
            losses = model([image_dict(0)])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append(float(losses["loss_lgd/distill"].detach()))
    assert history[-1] < 0.8 * history[0]


def test_the_implicit_teacher_learns_to_detect():
    """With a head that stays as it is."""
    model = lgd_model("faster")
    optimizer = torch.optim.Adam(model.heads["LGD"].teacher.parameters(), lr=1e-2)
    history = []
    for _ in range(6):
        torch.manual_seed(0)
        loss = kd_losses(model, [image_dict(0)])["loss_lgd/teacher"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[-1] < 0.8 * history[0]


@pytest.mark.parametrize(("channels", "heads"), [(16, 8), (20, 4), (9, 1)])
def test_any_number_of_channels_and_classes(channels, heads):
    model = lgd_model("retinanet", "MODEL.RETINANET.NUM_CLASSES", 1, fpn=channels)
    teacher = model.heads["LGD"].teacher
    assert teacher.relation.num_heads == heads and teacher.num_classes == 3  # names of conftest
    assert all(x.isfinite() for x in kd_losses(model, batch()).values())


def test_mixed_precision():
    model = lgd_model("faster")
    with torch.autocast("cpu", torch.bfloat16):
        found = kd_losses(model, batch())
    assert {x.dtype for x in found.values()} == {torch.float32}
    sum(found.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.heads.parameters())


def test_the_maps_are_those_that_the_head_reads():
    opts = ("MODEL.RETINANET.IN_FEATURES", ["p4", "p3"], "MODEL.ANCHOR_GENERATOR.SIZES", [[32]])
    assert lgd_model("retinanet", *opts).heads["LGD"].levels == ["p3", "p4"]
    assert lgd_model("retinanet", *STOCK_P3_P7).heads["LGD"].levels[0] == "p3"
    opts = ("MODEL.RPN.IN_FEATURES", ["p5", "p6"], "MODEL.ROI_HEADS.IN_FEATURES", ["p4", "p5"])
    head = lgd_model("faster", *opts, "MODEL.ANCHOR_GENERATOR.SIZES", [[32]]).heads["LGD"]
    assert head.levels == ["p4", "p5", "p6"]
    assert lgd_model("panoptic", *opts, "MODEL.ANCHOR_GENERATOR.SIZES", [[32]]).heads[
        "LGD"
    ].levels == ["p2", "p3", "p4", "p5", "p6"]


# ---- Whom the gradients reach.


def gradients(model, part, iteration=0):
    """Sizes of the gradients of one loss, by what the parameters belong to."""
    loss = kd_losses(model, batch(), iteration)[f"loss_lgd/{part}"]
    model.zero_grad()
    loss.backward()
    head = model.heads["LGD"]
    groups = {"adapter": head.adapter, "teacher": head.teacher, "backbone": model.student.backbone}
    rest = [p for n, p in model.student.named_parameters() if not n.startswith("backbone")]
    found = {k: sizes(v.parameters()) for k, v in groups.items()} | {"head": sizes(rest)}
    return {k: sum(x or 0 for x in v) > 0 for k, v in found.items()}


@pytest.mark.parametrize("family", ["faster", "fcos"])
def test_the_distillation_loss_reaches_the_student_after_the_first_iterations(family):
    model = lgd_model(family, detach_iters=5)
    early = {"adapter": True, "teacher": False, "backbone": False, "head": False}
    assert gradients(model, "distill", iteration=4) == early
    assert gradients(model, "distill", iteration=5) == {**early, "backbone": True}


@pytest.mark.parametrize("detached", [False, True])
def test_the_detection_loss_reaches_the_backbone_through_the_appearances(detached):
    model = lgd_model("faster", "MODEL.DISTILL.LGD.DETACH_APPEARANCE", detached, detach_iters=5)
    reached = {"adapter": False, "teacher": True, "backbone": not detached, "head": True}
    assert gradients(model, "teacher") == reached


def test_the_weights_are_factors():
    torch.manual_seed(0)
    model = lgd_model("retinanet", "MODEL.DISTILL.LGD.WEIGHT", 0.5)
    once = kd_losses(model, batch())
    model.student.loss_normalizer = 100
    model.heads["LGD"].distill_weight = 3.0
    again = kd_losses(model, batch())
    torch.testing.assert_close(again["loss_lgd/distill"], 3 * once["loss_lgd/distill"])
    torch.testing.assert_close(again["loss_lgd/teacher"], once["loss_lgd/teacher"])


# ---- The maps.

CANVAS = (64, 96)


def implicit_teacher(channels=8):
    torch.manual_seed(0)
    return ImplicitTeacher(num_classes=3, channels=channels)


def maps(num_images=2, channels=8):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(num_images, channels, *hw, generator=g) for hw in ((8, 12), (3, 5), (1, 1))]


BOXES = torch.tensor([[8.0, 8.0, 40.0, 40.0], [30.0, 20.0, 90.0, 60.0], [0.0, 0.0, 20.0, 50.0]])
CLASSES = torch.tensor([0, 2, 1])
NOTHING = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))


@torch.no_grad()
def made(teacher, features, *objects):
    boxes, classes = zip(*objects)
    return teacher(features, list(boxes), list(classes), CANVAS)


def same(a, b):
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a, b, strict=True))


def test_maps_have_the_students_shapes_and_are_normalized_in_each_image():
    found = made(implicit_teacher(), maps(), (BOXES, CLASSES), NOTHING)
    assert [x.shape for x in found] == [x.shape for x in maps()]
    for x in found:
        variance, mean = torch.var_mean(x.flatten(1), 1, correction=0)
        torch.testing.assert_close(mean, torch.zeros(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(variance, torch.ones(2), atol=1e-3, rtol=0)


def test_the_order_of_the_objects_does_not_matter():
    teacher, order = implicit_teacher(), [2, 0, 1]
    found = made(teacher, maps(), (BOXES, CLASSES), NOTHING)
    assert same(found, made(teacher, maps(), (BOXES[order], CLASSES[order]), NOTHING))


@pytest.mark.parametrize("other", [slice(0, 0), slice(0, 1), slice(0, 3)])
def test_objects_of_another_image_do_not_matter(other):
    """Neither do those that pad this one's to their number."""
    teacher, own = implicit_teacher(), (BOXES[:2], CLASSES[:2])
    alone = made(teacher, [x[:1] for x in maps()], own)
    beside = made(teacher, maps(), own, (BOXES[other] / 2, CLASSES[other]))
    assert same(alone, [x[:1] for x in beside])
    empty = made(teacher, [x[1:] for x in maps()], NOTHING)
    beside = made(teacher, maps(), own, NOTHING)
    assert same(empty, [x[1:] for x in beside])


def test_objects_classes_and_appearances_matter():
    teacher = implicit_teacher()
    found = made(teacher, maps(1), (BOXES, CLASSES))
    others = {
        "no object": made(teacher, maps(1), NOTHING),
        "one less": made(teacher, maps(1), (BOXES[:2], CLASSES[:2])),
        "another box": made(teacher, maps(1), (BOXES + 4, CLASSES)),
        "another class": made(teacher, maps(1), (BOXES, CLASSES.flip(0))),
        "another image": made(teacher, [-x for x in maps(1)], (BOXES, CLASSES)),
    }
    for name, other in others.items():
        assert not same(found[:1], other[:1]), name


def test_an_image_without_objects_has_the_map_of_the_context():
    """Whatever it shows: all attention is on the one label."""
    teacher = implicit_teacher()
    first, second = (made(teacher, [x[k : k + 1] for x in maps()], NOTHING) for k in range(2))
    assert same(first, second) and all(x.isfinite().all() for x in first)
    assert first[0].any() and not same(first[:1], made(teacher, maps(1), (BOXES, CLASSES))[:1])


def test_appearances_are_means_over_the_cells():
    teacher = implicit_teacher(channels=2)
    teacher.appearance = nn.Identity()
    level = torch.arange(24.0).view(1, 1, 4, 6) * torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    masks = torch.zeros(1, 2, 4, 6)
    masks[0, 0, 1, :2] = 1  # 6, 7
    assert teacher.seen(level, masks).tolist() == [[[11.5, 23.0], [6.5, 13.0], [0.0, 0.0]]]


def test_objects_are_drawn_over_the_context():
    teacher = implicit_teacher(channels=2)
    teacher.object = teacher.drawn = teacher.context = nn.Identity()
    teacher.refined = nn.ReLU()
    masks = torch.zeros(1, 2, 2, 3)
    masks[0, 0, :, :2] = masks[0, 1, 0, 1:] = 1
    answers = torch.tensor([[[1.0, -9.0], [10.0, 5.0], [100.0, 5.0]]])
    drawn = teacher.draw(answers, masks)
    assert drawn[0, 0].tolist() == [[11, 111, 101], [11, 11, 1]]
    assert drawn[0, 1].tolist() == [[0, 1, 0], [0, 0, 0]]  # −9 and 5, 10, 5


# ---- The second run of the head.


NORMED = {
    "retinanet": ("MODEL.RETINANET.NORM", "BN"),
    "fcos": ("MODEL.FCOS.NORM", "SyncBN"),
    "faster": ("MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.NORM", "BN"),
    "gfl": ("MODEL.GFL.NORM", "naiveSyncBN"),
}


@pytest.mark.parametrize("family", NORMED)
def test_the_second_run_leaves_no_trace(family, monkeypatch):
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", nn.BatchNorm2d.forward)  # refuses a CPU
    plain = outspoken_model(family, *NORMED[family])
    model = lgd_model(family, student=copy.deepcopy(plain))
    seen = []
    for network in (plain, model):
        torch.manual_seed(3)
        with EventStorage(11) as events:
            losses = network(batch())
        seen.append((losses, torch.get_rng_state(), events.latest()))
    (expected, state, logged), (found, other_state, other_logged) = seen
    assert torch.equal(state, other_state) and logged == other_logged
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    buffers = dict(plain.named_buffers())
    assert any(k.endswith("running_mean") for k in buffers)
    assert all(torch.equal(x, buffers[k]) for k, x in model.student.named_buffers())
    normalizers = [getattr(x, "loss_normalizer", None) for x in (plain, model.student)]
    assert normalizers[0] == normalizers[1]
    assert (normalizers[0] is None) == (family in ("faster", "gfl"))
    norms = [x for x in model.student.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)]
    assert all(x.track_running_stats and x.momentum > 0 for x in norms)


def test_the_student_is_no_module_of_the_head():
    model = lgd_model("faster")
    own = {id(p) for p in model.student.parameters()}
    assert own.isdisjoint(map(id, model.heads.parameters()))
    assert {k.split(".")[1] for k in model.heads.state_dict()} == {"teacher", "adapter"}
    twin = copy.deepcopy(model)
    assert twin.heads["LGD"].detector_losses.detector is twin.student


# ---- Switched off, and repeated.


def test_no_weight_no_run():
    model = lgd_model("mask", "MODEL.DISTILL.LGD.WEIGHT", 0.0)
    model.heads["LGD"].teacher = None
    found = kd_losses(model, batch())
    assert [float(x.detach()) for x in found.values()] == [0, 0]


@pytest.mark.e2e
def test_zero_weight_trains_bit_identically_and_a_weight_repeatably(shapes, tmp_path):
    def train(name, heads, *opts):
        (tmp_path / name).mkdir()
        opts = (*distill_opts("faster", heads), DETACH, 1, "SOLVER.MAX_ITER", 2, *opts)
        seed_all_rng(7)
        trainer = Trainer(trainable_cfg("faster", shapes, tmp_path / name, *opts, norm="BN"))
        trainer.train()
        return trainer.student.state_dict()

    plain = train("plain", ())
    silent = train("silent", ("LGD",), "MODEL.DISTILL.LGD.WEIGHT", 0.0)
    taught, again = (train(name, ("LGD",)) for name in ("taught", "again"))
    assert all(torch.equal(silent[k], plain[k]) for k in plain)
    assert all(torch.equal(again[k], taught[k]) for k in taught)
    assert any(not torch.equal(taught[k], plain[k]) for k in plain)


# ---- Configs.


def test_it_needs_no_teacher():
    cfg = tiny_cfg("fcos", *distill_opts("fcos", ["LGD"]))
    model = build_model(cfg)
    assert model.teacher is None and model.active_needs() == {"features"}


def test_a_student_without_boxes_is_refused():
    with pytest.raises(ConfigError, match=r"LGD .*SemanticSegmentor has no ground-truth boxes\.$"):
        distilled("semantic", ["LGD"])


def test_a_distillation_that_never_begins_is_warned_of():
    own = (
        "SOLVER.MAX_ITER",
        100,
        "MODEL.DISTILL.HEADS",
        ("LGD",),
        "MODEL.DISTILL.LGD.DETACH_ITERS",
    )
    assert unfinished_phases(tiny_cfg("faster", *own, 99)) == []
    (sentence,) = unfinished_phases(tiny_cfg("faster", *own, 100))
    assert "LGD.DETACH_ITERS is 100 and SOLVER.MAX_ITER 100: what follows" in sentence


@pytest.mark.parametrize(("key", "value"), [("DETACH_ITERS", -1), ("DISTILL_WEIGHT", -0.5)])
def test_values_out_of_range_are_refused(key, value):
    cfg = tiny_cfg("faster", f"MODEL.DISTILL.LGD.{key}", value)
    with pytest.raises(ConfigError, match=rf"LGD\.{key} is {value}; it must be at least 0"):
        validate_config(cfg, training=False)

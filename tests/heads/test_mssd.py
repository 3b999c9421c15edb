"""MSSD: a student with an FPN+PAN neck teaches itself; no teacher anywhere."""

import copy

import pytest
import torch
from detectron2.modeling import build_model

from distill import losses
from distill.config import validate_config
from distill.errors import ConfigError
from distill.heads import short_trainings
from tests.support.networks import (
    PAFPN,
    distill_opts,
    distilled,
    image_dict,
    kd_losses,
    outspoken_model,
    tiny_cfg,
    tiny_model,
)
from tests.support.trainings import write_teacher

LEVELS = ("p2", "p3", "p4", "p5")


def mssd_model(family="faster", **keys):
    opts = [x for k, v in keys.items() for x in (f"MODEL.DISTILL.MSSD.{k}", v)]
    return distilled(family, ["MSSD"], *PAFPN, *opts)


def student_outputs(model, batch):
    heard = []
    handle = model.heads["MSSD"].register_forward_pre_hook(lambda _, args: heard.extend(args))
    found = kd_losses(model, batch)
    handle.remove()
    assert heard[1] is heard[0]  # it is its own teacher
    return found, heard[0]


@pytest.mark.parametrize("family", ["faster", "mask", "cascade", "retinanet"])
def test_every_level_that_has_a_shallow_map_has_both_losses(family):
    model = mssd_model(family)
    found = kd_losses(model, [image_dict(0), image_dict(1, 96, 64, objects=0)])
    assert set(found) == {f"loss_mssd/{k}/{t}" for k in LEVELS for t in ("distill", "mask")}
    assert all(v > 0 for v in found.values())  # the finest level's, too: it is not its own teacher
    sum(found.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.heads.parameters())


def test_losses_are_those_of_the_equations():
    found, outputs = student_outputs(mssd_model(GAMMA=0.1, MASK_WEIGHT=3.0), [image_dict(0)])
    for level in LEVELS:
        deep, shallow = outputs.features[level], outputs.shallow[level]
        factor = 0.1 if level == "p2" else 1.0
        expected = factor * (deep - shallow).square().mean() / 4
        torch.testing.assert_close(found[f"loss_mssd/{level}/distill"], expected)


@pytest.mark.parametrize("mask, binary", [("gaussian", False), ("binary", True)])
def test_mask_loss_is_of_the_adapted_mask(mask, binary):
    model = mssd_model(MASK=mask, SIGMA2=4.0)
    found, outputs = student_outputs(model, [image_dict(0)])
    for level, stride in zip(LEVELS, (4, 8, 16, 32)):
        deep = outputs.features[level]
        m = losses.gaussian_mask(
            outputs.batch.boxes, *deep.shape[2:], stride, sigma2=4.0, binary=binary
        )
        conv = model.heads["MSSD"].mask_adapters[level][0]
        assert conv.weight.shape == (deep.shape[1], 1, 3, 3)
        adapted = torch.conv2d(m[:, None], conv.weight, conv.bias, padding=1).relu()
        expected = (adapted - deep).square().mean() / 4
        torch.testing.assert_close(found[f"loss_mssd/{level}/mask"], expected)


@pytest.mark.parametrize("off, left", [("MASK", "distill"), ("DISTILL", "mask")])
def test_a_loss_is_switched_off(off, left):
    model = mssd_model(**{f"{off}_WEIGHT": 0.0})
    assert set(kd_losses(model, [image_dict(0)])) == {f"loss_mssd/{k}/{left}" for k in LEVELS}
    assert bool(list(model.heads.parameters())) == (left == "mask")


def test_shallow_maps_are_taught_by_nobody():
    model = mssd_model(MASK_WEIGHT=0.0)
    _, outputs = student_outputs(model, [image_dict(0)])
    shallow = [outputs.shallow[k] for k in LEVELS]
    # Only through the bottom-up pathway, which reads them, does a gradient reach them.
    neck = model.student.backbone
    frozen = {k: x.detach() for k, x in outputs.shallow.items()}
    deep = {}
    path = None
    for k in LEVELS:
        path = frozen[k] + (0 if path is None else neck.down_convs[k](path).relu())
        deep[k] = neck.output_convs[k](path)
    parts = [losses.mssd(deep[k], s.requires_grad_()) for k, s in zip(LEVELS, shallow)]
    assert all(g is None for g in torch.autograd.grad(sum(parts), shallow, allow_unused=True))


def test_no_teacher_is_configured_built_or_asked():
    cfg = tiny_cfg("faster", *distill_opts("faster", ["MSSD"]), *PAFPN)
    cfg.DATASETS.TRAIN = ()
    assert cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE == ""
    model = build_model(cfg)
    assert model.teacher is None and list(model.heads) == ["MSSD"]
    assert "features" in model.active_needs() and not model.active_needs(teacher="")


def test_a_teacher_beside_it_is_asked_for_the_others_needs_alone(tmp_path):
    teacher = write_teacher(tmp_path, "faster")
    opts = distill_opts("faster", ["MSSD", "ROIKD"])
    model = build_model(tiny_cfg("faster", *opts, *PAFPN, *teacher)).train()
    assert model.active_needs(teacher="") == {"rois"}
    found = kd_losses(model, [image_dict(0)])
    assert {k.split("/")[0] for k in found} == {"loss_mssd", "loss_roikd"}


def test_a_neck_without_shallow_maps_is_refused():
    with pytest.raises(ConfigError, match=r"MSSD .*neck has no bottom-up pathway; .*_pafpn_backb"):
        distilled("faster", ["MSSD"])


def test_a_student_without_boxes_is_refused():
    with pytest.raises(ConfigError, match=r"MSSD .*SemanticSegmentor has no ground-truth boxes\.$"):
        distilled("semantic", ["MSSD"], *PAFPN)


def test_a_head_that_needs_a_teacher_is_refused_without_one():
    cfg = tiny_cfg("faster", *distill_opts("faster", ["MKD"]))
    with pytest.raises(ConfigError, match=r"TEACHER\.CONFIG_FILE is empty"):
        build_model(cfg)
    with pytest.raises(ConfigError, match=r"DATASETS\.TRAIN is empty"):  # the teacher is not missed
        validate_config(tiny_cfg("faster", *distill_opts("faster", ["MSSD"]), *PAFPN))


def test_other_heads_compare_the_deep_maps_alone():
    student = outspoken_model("faster", *PAFPN)
    model = distilled("faster", ["FitNet"], student=student, teacher=tiny_model("faster"))
    assert [x.student for x in model.heads["FitNet"].levels] == [*LEVELS, "p6"]
    same = distilled("faster", ["FitNet"], student=student, teacher=copy.deepcopy(student))
    assert all(v == 0 for v in kd_losses(same, [image_dict(0)]).values())


def test_a_training_of_a_few_epochs_is_warned_of() -> None:
    opts = ("MODEL.DISTILL.HEADS", ("MSSD",), "SOLVER.MAX_ITER", 40, "SOLVER.IMS_PER_BATCH", 4)
    cfg = tiny_cfg("faster", *opts)
    assert short_trainings(cfg, 8) == []  # 20 epochs
    (sentence,) = short_trainings(cfg, 100)
    assert sentence.startswith("MSSD made students worse") and "this one has 1.6;" in sentence
    cfg.MODEL.DISTILL.HEADS = ("FitNet",)
    assert short_trainings(cfg, 100) == []

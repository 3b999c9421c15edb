"""RTMDet and YOLO with their own necks are distilled, and their scores are compared."""

from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from distill.errors import ConfigError
from distill.heads import DISTILL_HEAD_REGISTRY
from distill.losses import cwd
from distill.nets.dense import ObjectnessDetector
from distill.structures import NetworkOutputs
from tests.support.cases import for_each
from tests.support.networks import (
    YOLO,
    distilled,
    image_dict,
    kd_losses,
    network_info,
    outspoken_model,
    tiny_cfg,
    tiny_model,
)
from tests.support.networks import record as record_outputs
from tests.support.yolo import NETWORKS

HEADS = ("FitNet", "IMA", "MKD", "TID", "DenseKD", "CWD", "PKD", "FGD", "ReviewKD", "MSSD")
EQUAL_CHANNELS = ("GID", "LGD")  # which need levels of equal channels


def own_neck(family: str, width: float = 0.125) -> tuple[Any, ...]:
    """Overrides for the backbone that the authors use, whose levels have different channels."""
    backbone, section = NETWORKS[YOLO[family]]
    return (
        *("MODEL.BACKBONE.NAME", f"build_{backbone}_backbone"),
        *(f"MODEL.{section}.DEPTH", 0.33, f"MODEL.{section}.WIDTH", width),
    )


def batch() -> list[dict[str, Any]]:
    return [image_dict(0, 64, 96), image_dict(1, 96, 64, objects=0)]


@pytest.mark.slow
@for_each("family", YOLO)
def test_heads_with_the_authors_necks(family: str) -> None:
    """The teacher is twice as wide; MSSD compares maps of the student only."""
    teacher = outspoken_model(family, *own_neck(family, 0.25), seed=1)
    heads = HEADS + EQUAL_CHANNELS if family.startswith("rtmdet") else HEADS
    model = distilled(family, heads, *own_neck(family), teacher=teacher)
    with EventStorage():
        losses = model(batch())
    for head in heads:
        own = [x for k, x in losses.items() if k.split("/")[0] == f"loss_{head.lower()}"]
        assert own and all(x.isfinite() for x in own) and sum(own) > 0, head
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@for_each("family", YOLO)
def test_mssd_pairs_the_authors_maps(family: str) -> None:
    info = network_info("student", tiny_model(family, *own_neck(family)))
    outer = family in ("yolox", "yolov5")
    assert info.shallow == (("p3", "p4", "p5") if outer else ("o3", "o4", "o5"))
    losses = kd_losses(distilled(family, ["MSSD"], *own_neck(family)), batch())
    assert all(x.isfinite() and x.requires_grad for x in losses.values()) and sum(losses.values())


# ---- The maps before the norms of RTMDet's neck


MMYOLO = (
    *("MODEL.DISTILL.CWD.NORMALIZE", "channel", "MODEL.DISTILL.CWD.WEIGHT", 1.0),
    *("MODEL.DISTILL.CWD.IN_FEATURES", ("conv_p3", "conv_p4", "conv_p5")),
    *("MODEL.DISTILL.CWD.STOP_ITER", 280),
)


@for_each("norm", ["BN", ""])
@torch.no_grad()
def test_the_convolutions_of_the_neck(norm: str) -> None:
    opts = (*own_neck("rtmdet"), "MODEL.CSPNEXT.NORM", norm)
    model: Any = tiny_model("rtmdet", *opts).eval()
    maps = model.backbone(torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)))
    layer = model.backbone.graph["p4"]
    inner = layer.conv(maps["o4"])
    torch.testing.assert_close(maps["conv_p4"], inner)
    torch.testing.assert_close(maps["p4"], layer(maps["o4"]))
    torch.testing.assert_close(maps["p4"], nn.functional.silu(layer.norm(inner)))
    info = network_info("student", model)
    assert {"conv_p3", "conv_p4", "conv_p5", "o3", "o4", "o5"} == {*info.inner}
    assert info.outer_maps.keys() == {"p3", "p4", "p5"}
    assert info.features["conv_p4"] == info.features["p4"]


@for_each("family", ["rtmdet", "rtmdet_ins"])
def test_the_recipe_of_mmyolo(family: str) -> None:
    """Same maps of both networks, normalized, with weight 1 per level, until an iteration."""
    teacher = outspoken_model(family, *own_neck(family, 0.25), seed=1)
    model = distilled(family, ["CWD"], *own_neck(family), *MMYOLO, teacher=teacher)
    assert [(x.student, x.teacher) for x in model.heads["CWD"].levels] == [
        (f"conv_p{k}", f"conv_p{k}") for k in (3, 4, 5)
    ]
    losses, student, asked = record_outputs(model, batch())
    adapt = model.heads["CWD"].adapters["conv_p4"]
    expected = cwd(adapt(student.features["conv_p4"]), asked.features["conv_p4"], 1.0, "channel")
    torch.testing.assert_close(losses["loss_cwd/conv_p4"], expected)
    sum(losses.values()).backward()
    neck: Any = model.student.backbone.graph
    assert neck["p4"].conv.weight.grad.abs().sum() > 0 and neck["p4"].norm.weight.grad is None
    stopped = kd_losses(model, batch(), iteration=280)
    assert not any(stopped.values())


def test_other_teachers_have_only_outputs() -> None:
    mkd = DISTILL_HEAD_REGISTRY.get("MKD")
    cfg = tiny_cfg("rtmdet", "MODEL.DISTILL.MKD.IN_FEATURES", ("conv_p3", "p4"))
    student = network_info("student", tiny_model("rtmdet", *own_neck("rtmdet")))
    head = mkd(cfg, student, network_info("teacher", tiny_model("fcos")))
    assert [(x.student, x.teacher) for x in head.levels] == [("conv_p3", "p3"), ("p4", "p4")]
    with pytest.raises(ConfigError, match="has no output 'conv_p3'"):
        mkd(cfg, network_info("student", tiny_model("yolox", *own_neck("yolox"))), student)


def test_levels_of_different_channels() -> None:
    yolo = network_info("student", tiny_model("yolox", *own_neck("yolox")))
    equal = network_info("student", tiny_model("yolox"))
    for name in EQUAL_CHANNELS:
        reason = DISTILL_HEAD_REGISTRY.get(name).problem(yolo, yolo)
        assert reason.endswith("have [32, 64, 128] channels")
        assert not DISTILL_HEAD_REGISTRY.get(name).problem(equal, equal)
    gid = DISTILL_HEAD_REGISTRY.get("GID")
    with pytest.raises(ConfigError, match=r"SHARED_ADAPTER is True, but .* \[32, 64, 128\]"):
        gid(tiny_cfg("yolox"), yolo, equal)
    gid(tiny_cfg("yolox", "MODEL.DISTILL.GID.SHARED_ADAPTER", False), yolo, equal)


def test_instances_are_cropped_from_levels_of_different_channels() -> None:
    head = distilled("yolox", ["IMA"], *own_neck("yolox")).heads["IMA"]
    assert head.scope == "box"
    assert [x.student for x in head.levels] == ["p3", "p4", "p5"]


@for_each("head", ["CrossKD", "LD", "ROIKD", "MaskLogitKD"])
@for_each("family", YOLO)
def test_what_does_not_fit_is_refused(head: str, family: str) -> None:
    info = network_info("student", tiny_model(family))
    assert DISTILL_HEAD_REGISTRY.get(head).problem(info, info).count(YOLO[family]) == 1


def test_networks_with_other_points_are_refused() -> None:
    """RTMDet's points are corners, YOLOv5 has anchors, and GFL's levels are others."""
    nets = {k: network_info("teacher", tiny_model(k)) for k in ("rtmdet", "yolox", "yolov5", "gfl")}
    head = DISTILL_HEAD_REGISTRY.get("DenseKD")
    reasons = [head.problem(nets["yolox"], nets[k]) for k in ("yolov5", "gfl")]
    assert "anchors per cell" in reasons[0] and "strides differ" in reasons[1]


# ---- Scores


def test_the_logits_of_scores() -> None:
    """They are those of the products of both probabilities, and exact for large numbers."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 3, 4, generator=generator) * 3
    objectness = torch.randn(2, 2, 3, 4, generator=generator) * 3
    found = ObjectnessDetector.score_logits(None, logits, objectness)  # type: ignore[arg-type]
    scores = logits.sigmoid() * objectness.sigmoid().repeat_interleave(3, 1)
    torch.testing.assert_close(found.sigmoid(), scores)
    large = torch.tensor([50.0, -50.0, 50.0, -50.0]).view(4, 1, 1, 1)
    other = torch.tensor([50.0, -50.0, 0.0, 0.0]).view(4, 1, 1, 1)
    found = ObjectnessDetector.score_logits(None, large, other)  # type: ignore[arg-type]
    expected = torch.tensor(
        [50 - torch.tensor(2.0).log(), -100.0, 0.0, -50 - torch.tensor(2.0).log()]
    )
    torch.testing.assert_close(found.flatten(), expected)
    assert ObjectnessDetector.score_logits(None, large.half(), other.half()).dtype == torch.float32  # type: ignore[arg-type]


@for_each("family", ["yolox", "yolov5", "yolov7"])
def test_heads_compare_scores(family: str) -> None:
    """Student and teacher, to the order of the anchors."""
    model = distilled(family, ["DenseKD"])
    _, *both = record_outputs(model, batch())
    for outputs, network in zip(both, (model.student, model.teacher.model)):
        check_scores(outputs, network)


@torch.no_grad()
def check_scores(outputs: NetworkOutputs, network: nn.Module) -> None:
    model: Any = network
    assert outputs.dense is not None
    maps = [outputs.features[name] for name in model.head_in_features]
    logits, _, objectness, *_ = model.rows(model.head(maps))
    for found, c, o in zip(outputs.dense.logits, logits, objectness):
        torch.testing.assert_close(found.sigmoid(), model.scores(c, o), rtol=1e-4, atol=1e-6)

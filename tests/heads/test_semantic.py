"""Test heads on networks with a semantic head: the compared maps, families and labels."""

from typing import Any

import pytest
import torch

from distill.errors import ConfigError
from distill.heads import CIRKD, IFVD, SKD, FitNet, build_heads
from distill.structures import SEM_SEG_HEAD
from tests.support.heads import semantic_images
from tests.support.networks import (
    built_head,
    distilled,
    kd_losses,
    network_info,
    outspoken_model,
    tiny_cfg,
    tiny_model,
)

EVERY = ("CWD", "CWDLogits", "PixelKD", "SKD", "IFVD", "CIRKD", "MasKDLogits")


def test_features_of_the_head_are_compared_by_name() -> None:
    opts = ("MODEL.DISTILL.FITNET.IN_FEATURES", ("p3", SEM_SEG_HEAD))
    head = built_head(FitNet, "semantic", *opts)
    assert [(x.student, x.teacher, x.stride) for x in head.levels] == [
        (SEM_SEG_HEAD, SEM_SEG_HEAD, 4),
        ("p3", "p3", 8),
    ]
    assert head.needs == {"features", "sem_seg"} and FitNet.needs == {"features"}
    losses = kd_losses(distilled("semantic", ["FitNet"], *opts), semantic_images())
    assert set(losses) == {"loss_fitnet/p3", f"loss_fitnet/{SEM_SEG_HEAD}"}
    assert min(float(x.detach()) for x in losses.values()) > 0


def test_by_default_feature_heads_compare_the_backbones() -> None:
    assert SEM_SEG_HEAD not in [x.student for x in built_head(FitNet, "semantic").levels]


def test_a_network_without_a_semantic_head_has_no_such_features() -> None:
    cfg = tiny_cfg("semantic", "MODEL.DISTILL.FITNET.IN_FEATURES", (SEM_SEG_HEAD,))
    student, teacher = tiny_model("semantic"), tiny_model("retinanet")
    with pytest.raises(ConfigError, match="the teacher has no semantic head"):
        FitNet(cfg, network_info("student", student), network_info("teacher", teacher))
    with pytest.raises(ConfigError, match="has no output 'sem_seg_head'"):
        FitNet(cfg, network_info("student", teacher), network_info("teacher", student))


@pytest.mark.parametrize("name", [x for x in EVERY if x not in ("CWD", "SKD")])
def test_detectors_are_refused(name: str) -> None:
    cfg = tiny_cfg("retinanet", "MODEL.DISTILL.HEADS", (name,))
    spec = network_info("student", tiny_model("retinanet"))
    with pytest.raises(ConfigError, match=f"{name} does not work here .* sem_seg"):
        build_heads(cfg, spec, spec)


@pytest.mark.parametrize("head", [SKD, IFVD, CIRKD])
def test_relations_need_no_adapters(head: Any) -> None:
    built = built_head(head, "semantic", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 8, teacher_channels=24)
    assert [x.student for x in built.levels] == [SEM_SEG_HEAD]
    assert not list(built.adapters.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_panoptic_students_have_a_semantic_head_too(name: str) -> None:
    losses = kd_losses(distilled("panoptic", [name]), semantic_images())
    assert sum(float(x.detach()) for x in losses.values()) > 0


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("height, width", [(64, 64), (61, 83)])
def test_ignored_pixels_and_odd_sizes(name: str, height: int, width: int) -> None:
    """Finite with all pixels ignored, with one class, and with labels of 255."""
    model = distilled("semantic", [name], teacher=outspoken_model("semantic", seed=1, fpn=24))
    for value in (255, 0):
        batch = semantic_images(2, height, width)
        for x in batch:
            x["sem_seg"] = torch.full_like(x["sem_seg"], value)
        losses = kd_losses(model, batch)
        sum(losses.values()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(x.isfinite().all() for x in (*gradients, *losses.values()))

"""Heads of semantic segmentation: which maps they compare, what they remember, what they learn."""

from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor

from distill.errors import ConfigError
from distill.heads import CIRKD, IFVD, SKD, FitNet, MasKDLogits, PixelKD, build_heads
from distill.heads.fpn import cell_labels
from distill.losses import cwd, pixel_kd
from distill.structures import SEM_SEG_HEAD, Batch, NetworkOutputs, SemSeg
from tests.support.networks import (
    CLASSES,
    built_head,
    distilled,
    distilled_from_itself,
    kd_losses,
    network_info,
    outspoken_model,
    picture,
    tiny_cfg,
    tiny_model,
)

EVERY = ("CWD", "CWDLogits", "PixelKD", "SKD", "IFVD", "CIRKD", "MasKDLogits")
NAMES = (*CLASSES, "background")


def pictures(count: int = 2, height: int = 64, width: int = 64) -> list[dict[str, Any]]:
    return [picture(k, height, width, semantic=True) for k in range(count)]


def signal(
    logits: Tensor, padded_size: tuple[int, int], labels: Tensor | None = None
) -> NetworkOutputs:
    """Return outputs with only these logits, which are the features too."""
    rows = (
        labels if labels is not None else torch.zeros(len(logits), *padded_size, dtype=torch.long)
    )
    batch = Batch([{"sem_seg": x} for x in rows], padded_size)
    return NetworkOutputs(batch, features={"p2": logits}, sem_seg=SemSeg(logits, logits))


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- Which maps.


def test_features_of_the_head_are_compared_by_name() -> None:
    opts = ("MODEL.DISTILL.FITNET.IN_FEATURES", ("p3", SEM_SEG_HEAD))
    head = built_head(FitNet, "semantic", *opts)
    assert [(x.student, x.teacher, x.stride) for x in head.levels] == [
        (SEM_SEG_HEAD, SEM_SEG_HEAD, 4),
        ("p3", "p3", 8),
    ]
    assert head.needs == {"features", "sem_seg"} and FitNet.needs == {"features"}
    losses = kd_losses(distilled("semantic", ["FitNet"], *opts), pictures())
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


def test_similarities_of_detectors() -> None:
    losses = kd_losses(distilled("retinanet", ["SKD"]), pictures())
    assert set(losses) == {f"loss_skd/p{k}" for k in range(2, 7)}


def test_one_picture_a_process_is_too_few_for_relations(caplog: Any) -> None:
    built_head(CIRKD, "semantic", "SOLVER.IMS_PER_BATCH", 1)
    assert "each process has only one" in caplog.text


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
    losses = kd_losses(distilled("panoptic", [name]), pictures())
    assert sum(float(x.detach()) for x in losses.values()) > 0


# ---- Logits.


def pixel_head(student: tuple[str, ...], teacher: tuple[str, ...], **kw: Any) -> PixelKD:
    model = tiny_model("semantic")
    specs = [network_info(n, model) for n in ("student", "teacher")]
    object.__setattr__(specs[0], "sem_seg_classes", student)
    object.__setattr__(specs[1], "sem_seg_classes", teacher)
    return PixelKD(tiny_cfg("semantic"), *specs)


def test_logits_are_compared_by_class_name() -> None:
    head = pixel_head(("road", "car", "sky"), ("sky", "tree", "road"))
    s, t = maps(0, 2, 3, 5, 7), maps(1, 2, 3, 5, 7)
    (loss,) = head.losses(signal(s, (20, 28)), signal(t, (20, 28))).values()
    assert torch.equal(loss, pixel_kd(s[:, [0, 2]], t[:, [2, 0]]))


def test_the_teachers_output_stride_and_padding_do_not_matter() -> None:
    """Constant logits stay what they are at any resolution; its padding is cut off."""
    head = pixel_head(NAMES, NAMES)
    s = maps(0, 1, 4, 1, 1).expand(1, 4, 9, 9)  # stride 4 of 36 pixels
    t = torch.full((1, 4, 14, 14), 99.0)  # the teacher pads to 56
    t[..., :9, :9] = s
    (same,) = head.losses(signal(s, (36, 36)), signal(t, (36, 36))).values()
    head.teacher_stride = 8
    coarse = torch.full((1, 4, 7, 7), 99.0)
    coarse[..., :5, :5] = s[..., :5, :5]
    (other,) = head.losses(signal(s, (36, 36)), signal(coarse, (36, 36))).values()
    assert float(same) == pytest.approx(0, abs=1e-6) == float(other)


def test_channel_distributions_of_features_and_logits() -> None:
    opts = ("MODEL.DISTILL.CWD.IN_FEATURES", (SEM_SEG_HEAD,), "MODEL.DISTILL.CWD.WEIGHT", 1.0)
    opts += ("MODEL.DISTILL.CWDLOGITS.WEIGHT", 1.0)
    model = distilled("semantic", ["CWD", "CWDLogits"], *opts)
    heard: dict[str, tuple[NetworkOutputs, NetworkOutputs]] = {}
    for name, head in model.heads.items():
        head.register_forward_pre_hook(lambda _, args, name=name: heard.update({name: args}))
    losses = kd_losses(model, pictures())
    student, teacher = heard["CWD"]
    expected = cwd(student.sem_seg.features, teacher.sem_seg.features, 1.0)
    assert torch.equal(losses[f"loss_cwd/{SEM_SEG_HEAD}"], expected)
    expected = cwd(student.sem_seg.logits, teacher.sem_seg.logits, 4.0)
    assert torch.equal(losses["loss_cwdlogits"], expected)


# ---- Labels.


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("height, width", [(64, 64), (61, 83)])
def test_ignored_pixels_and_odd_sizes(name: str, height: int, width: int) -> None:
    """Finite with all pixels ignored, with one class, and with labels of 255."""
    model = distilled("semantic", [name], teacher=outspoken_model("semantic", seed=1, fpn=24))
    for value in (255, 0):
        batch = pictures(2, height, width)
        for x in batch:
            x["sem_seg"] = torch.full_like(x["sem_seg"], value)
        losses = kd_losses(model, batch)
        sum(losses.values()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(x.isfinite().all() for x in (*gradients, *losses.values()))


def test_without_a_label_classes_teach_nothing() -> None:
    model = distilled("semantic", ["IFVD", "CIRKD"])
    batch = pictures()
    for x in batch:
        x["sem_seg"] = torch.full_like(x["sem_seg"], 255)
    losses = kd_losses(model, batch)
    assert float(losses["loss_cirkd/minibatch"].detach()) > 0
    for name in (f"loss_ifvd/{SEM_SEG_HEAD}", "loss_cirkd/pixel", "loss_cirkd/region"):
        assert float(losses[name].detach()) == 0
    assert int(model.heads["CIRKD"].pixel_memory.count.sum()) == 0


# ---- CIRKD.


def test_memory_holds_the_teachers_regions_and_pixels() -> None:
    model = distilled("semantic", ["CIRKD"])
    head, batch = model.heads["CIRKD"], pictures()
    heard: list[Any] = []
    head.register_forward_pre_hook(lambda _, args: heard.extend(args))
    kd_losses(model, batch)
    features = torch.nn.functional.normalize(heard[1].sem_seg.features, dim=1)
    labels = cell_labels(heard[0].batch.sem_seg, *features.shape[2:])
    for k in range(4):
        regions = []
        for f, own in zip(features, labels):
            if (own == k).any():
                mean = f[:, own == k].mean(1)
                regions.append(mean / mean.norm())
        held = head.region_memory.queue[k, : int(head.region_memory.count[k])]
        assert len(held) == len(regions)
        if regions:
            assert torch.allclose(held, torch.stack(regions), atol=1e-5)
        cells = torch.cat([f[:, own == k].T for f, own in zip(features, labels)])
        pixels = head.pixel_memory.queue[k, : int(head.pixel_memory.count[k])]
        assert len(pixels) == sum(min(16, int((own == k).sum())) for own in labels)
        if len(pixels):
            assert float((pixels @ cells.T).max(1).values.min()) > 1 - 1e-5
    assert {"pixel_memory.queue", "region_memory.pointer"} <= head.state_dict().keys()


def test_memory_of_a_student_that_is_its_teacher_teaches_once_the_projection_differs() -> None:
    losses = kd_losses(distilled_from_itself("semantic", ["CIRKD"]), pictures())
    assert float(losses["loss_cirkd/minibatch"].detach()) == pytest.approx(0, abs=1e-6)
    assert float(losses["loss_cirkd/pixel"].detach()) > 0


# ---- MasKDLogits.


def test_tokens_are_learned_first_and_then_distil() -> None:
    model = distilled("semantic", ["MasKDLogits"], "MODEL.DISTILL.MASKDLOGITS.TOKEN_ITERS", 3)
    head: MasKDLogits = model.heads["MasKDLogits"]
    first = kd_losses(model, pictures(), iteration=2)
    assert float(first["loss_maskdlogits/masks"].detach()) == 0
    sum(first.values()).backward()
    assert head.drawn.tokens.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in head.drawn.weighting.parameters())
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.student.parameters())
    model.zero_grad()
    then = kd_losses(model, pictures(), iteration=3)
    assert (
        float(then["loss_maskdlogits/tokens"].detach())
        == 0
        < float(then["loss_maskdlogits/masks"].detach())
    )
    sum(then.values()).backward()
    assert all(p.grad.abs().sum() == 0 for p in head.drawn.parameters())
    assert sum(float(p.grad.abs().sum()) for p in model.student.parameters()) > 0


def test_masks_stay_as_they_were_learned() -> None:
    """Weight decay and momentum move parameters whose gradient is zero."""
    model = distilled("semantic", ["MasKDLogits"], "MODEL.DISTILL.MASKDLOGITS.TOKEN_ITERS", 2)
    head: MasKDLogits = model.heads["MasKDLogits"]
    optimizer = torch.optim.SGD(head.drawn.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    learned = []
    for iteration in range(5):
        optimizer.zero_grad()
        sum(kd_losses(model, pictures(), iteration).values()).backward()
        optimizer.step()
        learned.append(head.learned.tokens.clone())
    assert not torch.equal(learned[0], learned[1])
    assert torch.equal(learned[1], learned[4]) and not torch.equal(head.drawn.tokens, learned[4])
    assert "learned.tokens" in head.state_dict()


def test_tokens_learn_masks_that_differ() -> None:
    model = distilled("semantic", ["MasKDLogits"])
    head: MasKDLogits = model.heads["MasKDLogits"]
    optimizer = torch.optim.Adam(head.drawn.parameters(), 0.05)
    batch, values = pictures(), []
    for _ in range(30):
        with EventStorage(0):
            loss = model(batch)["loss_maskdlogits/tokens"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < values[0] - 0.1

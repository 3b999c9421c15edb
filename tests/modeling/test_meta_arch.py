"""The distilled model: zero for a copy, invisible at weight zero, honest about unlike networks."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import Boxes
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from distill import DistillModel, DistillRCNN, DistillRetinaNet, DistillSemanticSegmentor
from distill.data.datasets import load_training_sets
from distill.data.loader import build_train_loader
from distill.engine import Trainer
from distill.engine.train_loop import repeatable, seed_step
from distill.engine.trainer import train_mapper
from distill.errors import ConfigError
from distill.families import build_family
from distill.structures import NetworkOutputs
from tests.support.networks import (
    CLASSES,
    DENSE,
    FAMILIES,
    HEADS,
    STOCK_P3_P7,
    YOLO,
    distill_opts,
    distilled,
    distilled_from_itself,
    image_dict,
    kd_losses,
    outspoken_model,
    record,
    tiny_cfg,
    tiny_model,
)
from tests.support.trainings import trainable_cfg, write_teacher

# Without what a head learns beside the student.
UNLEARNED = ("MODEL.DISTILL.CIRKD.PIXEL_WEIGHT", 0.0, "MODEL.DISTILL.CIRKD.REGION_WEIGHT", 0.0)
UNLEARNED += ("MODEL.DISTILL.MASKDLOGITS.TOKEN_ITERS", 0, "MODEL.DISTILL.FRS.WARMUP_ITERS", 0)
UNLEARNED += ("MODEL.DISTILL.MASKD.TOKEN_ITERS", 0)
# A copy is no zero where the student passes learned layers, or in a cross entropy.
NEVER_ZERO = ("MGD", "FGFI", "DeFeat", "FRS", "FKD", "ReviewKD", "GID", "LGD")
UNMASKED = ("MODEL.DISTILL.IMA.MASK_RATIO", 0.0, "MODEL.DISTILL.MKD.MASK_RATIO", 0.0)
NORMS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "FrozenBN": ((), {}),
    "GN": (
        # detectron2's GroupNorm has 32 groups.
        (
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32),
            *("MODEL.FPN.NORM", "GN", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),
        ),
        {"norm": "GN", "fpn": 32},
    ),
}
IMA_SCOPES = {
    "faster": ("image", "box"),
    "mask": ("image", "box", "mask"),
    "cascade": ("image", "box", "mask"),
    "panoptic": ("image", "box", "mask", "class"),
    **dict.fromkeys(("retinanet", *DENSE, *YOLO), ("image", "box")),
    "semantic": ("image", "class"),
}


def image_dicts() -> list[dict[str, Any]]:
    """Two sizes; the second has nothing on it."""
    return [image_dict(0, 64, 80, semantic=True), image_dict(1, 96, 64, objects=0, semantic=True)]


# ---- A copy of the student has nothing to teach it.


@cache
def networks(family: str, norm: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A student, its copy, and a teacher that differs from them."""
    opts, kw = NORMS[norm]
    student = outspoken_model(family, *opts, **kw)
    return student, copy.deepcopy(student), outspoken_model(family, *opts, seed=1, **kw)


@pytest.mark.parametrize("norm", ["FrozenBN", pytest.param("GN", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_equal_to_student_gives_zero(family: str, norm: str) -> None:
    scope, *others = IMA_SCOPES[family]
    check_copy(family, norm, HEADS[family], scope)
    for scope in others:
        check_copy(family, norm, ("IMA",), scope)


def check_copy(family: str, norm: str, heads: tuple[str, ...], scope: str) -> None:
    """Assert that a copy of the student gives zero in every head, and another teacher does not."""
    opts, kw = NORMS[norm]
    opts = (*opts, *UNMASKED, *UNLEARNED, "MODEL.DISTILL.IMA.SCOPE", scope)
    student, twin, other = networks(family, norm)
    model = distilled(family, heads, *opts, student=student, teacher=twin, **kw)
    same = kd_losses(model, image_dicts())
    model = distilled(family, heads, *opts, student=student, teacher=other, **kw)
    losses = kd_losses(model, image_dicts())
    assert same.keys() == losses.keys()
    weights = [p for p in student.backbone.parameters() if p.requires_grad]
    for head in heads:
        own = [k for k in losses if k.split("/")[0] == f"loss_{head.lower()}"]
        limit = 1e-4 if head == "CrossKD" else 1e-6  # it standardizes features and multiplies back
        zeros = [same[k] for k in own if k != "loss_crosskd/centerness"]
        largest = max(abs(float(x.detach())) for x in zeros)
        assert head in NEVER_ZERO or largest < limit, head

        loss = sum(losses[k] for k in own)
        assert float(loss.detach()) > 1e-5, head
        found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        gradients = [x for x in found if x is not None]
        assert all(x.isfinite().all() for x in gradients), head
        assert sum(float(x.abs().sum()) for x in gradients) > 0, head


def test_train_on_pred_boxes_asks_about_the_boxes_that_were_pooled() -> None:
    """The option rewrites the proposals' boxes after the student has pooled them."""
    opts = ("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True)
    model = distilled_from_itself("mask", ["ROIKD", "MaskLogitKD"], *opts)
    losses, student, _ = record(model, image_dicts())
    assert student.rois[0].boxes[0].shape == (16, 4)
    assert all(float(x.detach()) == 0 for x in losses.values())


# ---- Weight zero leaves no trace.


class StockTrainer(DefaultTrainer):
    """detectron2's trainer, given the random numbers of ours."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_train_loader(cfg, load_training_sets(cfg), train_mapper(cfg), seed=cfg.SEED)

    def run_step(self) -> None:
        seed_step(self._trainer.model, self.cfg.SEED, self.iter)
        with repeatable("cpu"):
            super().run_step()


def train(
    trainer_class: Callable[[CfgNode], DefaultTrainer], cfg: CfgNode
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The trained student and its state."""
    seed_all_rng(7)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    student: Any = getattr(trainer, "student", trainer._trainer.model)
    return student, student.state_dict()


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("family", ["mask", "retinanet"])
def test_zero_weights_train_bit_identically_to_detectron2(
    family: str, shapes: tuple[str, str, str], tmp_path: Path
) -> None:
    teacher = write_teacher(
        tmp_path / "teacher",
        family,
        *("MODEL.ROI_HEADS.NUM_CLASSES", 8, "MODEL.RETINANET.NUM_CLASSES", 8),
        fpn=24,
    )
    heads = HEADS[family]
    distillation = [*distill_opts(family, heads), *teacher, "SOLVER.MAX_ITER", 5]
    off = [x for head in heads for x in (f"MODEL.DISTILL.{head.upper()}.WEIGHT", 0.0)]

    def cfg(name: str, *opts: Any) -> CfgNode:
        (tmp_path / name).mkdir()
        return trainable_cfg(family, shapes, tmp_path / name, *opts, norm="BN")

    plain, expected = train(StockTrainer, cfg("plain", "SOLVER.MAX_ITER", 5))
    silent, state = train(Trainer, cfg("silent", *distillation, *off))
    _, taught = train(Trainer, cfg("taught", *distillation))

    assert state.keys() == expected.keys() == taught.keys()
    assert [k for k in expected if not torch.equal(state[k], expected[k])] == []
    assert getattr(silent, "loss_normalizer", 0) == getattr(plain, "loss_normalizer", 0)
    assert any(not torch.equal(taught[k], expected[k]) for k in expected)


# ---- The teacher stays outside.


def test_teacher_is_outside_the_module_tree() -> None:
    model = distilled("mask", HEADS["mask"], teacher=outspoken_model("mask", fpn=24, seed=1))
    optimizer = Trainer.build_optimizer(tiny_cfg("mask"), model)
    frozen = {id(p) for p in model.teacher.model.parameters()}
    assert frozen.isdisjoint(map(id, model.parameters()))
    assert frozen.isdisjoint(id(p) for g in optimizer.param_groups for p in g["params"])
    assert {k.split(".")[0] for k in model.state_dict()} == {"student", "heads"}

    model.train()
    before = {k: v.clone() for k, v in model.teacher.model.state_dict().items()}
    sum(kd_losses(model, image_dicts()).values()).backward()
    optimizer.step()
    assert not any(m.training for m in model.teacher.model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.model.state_dict().items())


def test_deepcopy_shares_the_teacher_and_listens_to_the_copy() -> None:
    model = distilled("faster", ["FitNet"])
    twin = copy.deepcopy(model)
    assert twin.teacher is model.teacher
    assert twin.family.model is twin.student is not model.student
    with torch.no_grad():
        next(twin.student.backbone.parameters()).zero_()
    a, b = (sum(kd_losses(m, image_dicts()).values()) for m in (model, twin))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_is_the_student_alone(family: str) -> None:
    model = distilled(family, HEADS[family]).eval()
    model.teacher.ask = None
    inputs = image_dicts()[:1]
    with torch.no_grad():
        ours, plain = model(inputs)[0], model.student(inputs)[0]
    assert ours.keys() == plain.keys()
    if "instances" in plain:
        a, b = ours["instances"].get_fields(), plain["instances"].get_fields()
        assert all(torch.equal(_tensor(a[k]), _tensor(b[k])) for k in b)
    else:
        assert torch.equal(ours["sem_seg"], plain["sem_seg"])


def _tensor(x: Any) -> Tensor:
    return x.tensor if isinstance(x, Boxes) else x


# ---- Unlike networks.


class PatchBackbone(Backbone):
    """One strided convolution a level: no cell sees beyond its own pixels, so padding is inert."""

    def __init__(self, divisibility: int, square: int = 0):
        super().__init__()
        self.divisibility, self.square = divisibility, square
        g = torch.Generator().manual_seed(0)
        self.kernels = nn.ParameterDict(
            {f"p{k}": torch.randn(16, 3, 2**k, 2**k, generator=g) / 2**k for k in range(2, 7)}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {n: F.conv2d(x, k, stride=k.shape[-1]) for n, k in self.kernels.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {n: ShapeSpec(channels=16, stride=k.shape[-1]) for n, k in self.kernels.items()}

    @property
    def size_divisibility(self) -> int:
        return self.divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"square_size": self.square}


@pytest.mark.parametrize(("divisibility", "square"), [(128, 0), (0, 192)])
@pytest.mark.parametrize("family", ["faster", "retinanet"])
def test_teacher_that_pads_further_is_compared_on_the_shared_cells(
    family: str, divisibility: int, square: int
) -> None:
    student, teacher = outspoken_model(family), outspoken_model(family)
    student.backbone = PatchBackbone(64)
    teacher.backbone = PatchBackbone(divisibility, square)
    heads = ["FitNet", "IMA", "DenseKD"]
    model = distilled(family, heads, *UNMASKED, student=student, teacher=teacher)
    losses, s, t = record(model, [image_dict(0, 60, 120), image_dict(1, 50, 70)])
    assert s.batch.padded_size == (64, 128)
    assert t.features["p2"].shape[-2:] == ((32, 32) if divisibility else (48, 48))
    assert s.dense.sizes == t.dense.sizes
    assert max(abs(float(x.detach())) for x in losses.values()) < 1e-6


def test_teacher_with_a_smaller_square_than_the_image_is_refused() -> None:
    teacher = outspoken_model("faster")
    teacher.backbone = PatchBackbone(0, square=64)
    model = distilled("faster", ["FitNet"], teacher=teacher)
    with pytest.raises(ConfigError, match="128"):
        kd_losses(model, [image_dict(0, 60, 120)])


def test_other_channels_train_an_adapter() -> None:
    model = distilled("faster", ["FitNet"], teacher=outspoken_model("faster", fpn=24, seed=1))
    losses, s, t = record(model, image_dicts())
    adapter = model.heads["FitNet"].adapters["p4"]
    expected = F.mse_loss(adapter(s.features["p4"]), t.features["p4"]) / 5
    torch.testing.assert_close(losses["loss_fitnet/p4"], expected)
    sum(losses.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.heads.parameters())


def test_levels_are_matched_by_stride() -> None:
    """A P3-P7 student of a P2-P6 teacher: three strides more than names in common."""
    student = outspoken_model("retinanet", *STOCK_P3_P7)
    model = distilled("retinanet", ["FitNet"], student=student)
    losses, s, t = record(model, image_dicts())
    assert {k.split("/")[1] for k in losses} == {"p3", "p4", "p5", "p6"}
    expected = F.mse_loss(s.features["p6"], t.features["p6"]) / 4
    torch.testing.assert_close(losses["loss_fitnet/p6"], expected)


def test_named_level_without_its_stride_is_resized_from_the_nearest() -> None:
    teacher = outspoken_model("retinanet", *STOCK_P3_P7)
    opts = ("MODEL.DISTILL.FITNET.IN_FEATURES", ("p2",))
    losses, s, t = record(distilled("faster", ["FitNet"], *opts, teacher=teacher), image_dicts())
    target = F.interpolate(
        t.features["p3"], s.features["p2"].shape[-2:], mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(losses["loss_fitnet/p2"], F.mse_loss(s.features["p2"], target))


def test_teacher_sees_its_own_channel_order_mean_and_std() -> None:
    opts = ("MODEL.PIXEL_MEAN", [10.0, 20.0, 30.0], "MODEL.PIXEL_STD", [1.0, 2.0, 3.0])
    teacher = outspoken_model("faster", *opts, seed=1)
    model = distilled("faster", ["FitNet"], teacher=teacher, teacher_format="RGB")
    inputs = image_dicts()
    _, _, said = record(model, inputs)

    def ask(channels: list[int]) -> Tensor:
        padded = torch.zeros(2, 3, 96, 96)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (opts[1], opts[3]))
        for row, entry in zip(padded, inputs):
            image = (entry["image"][channels] - mean) / std
            row[:, : image.shape[1], : image.shape[2]] = image
        with torch.no_grad():
            return teacher.backbone(padded)["p3"]

    torch.testing.assert_close(said.features["p3"], ask([2, 1, 0]))
    assert not torch.allclose(said.features["p3"], ask([0, 1, 2]), rtol=0.1)


# ---- Other classes.


def with_classes_in_order(model: nn.Module, order: list[int]) -> nn.Module:
    """A copy whose class ``i`` is class ``order[i]`` of ``model``."""
    model = copy.deepcopy(model)
    if hasattr(model, "roi_heads"):
        heads = model.roi_heads
        rows = {heads.box_predictor.cls_score: [*order, len(order)]}  # background last
        rows[heads.box_predictor.bbox_pred] = [4 * i + j for i in order for j in range(4)]
        rows[heads.mask_head.predictor] = order
    else:
        layer = model.head.cls_score
        anchors = range(0, layer.out_channels, len(order))
        rows = {layer: [first + i for first in anchors for i in order]}
    for layer, index in rows.items():
        for parameter in layer.parameters():
            parameter.data = parameter.data[index]
    return model


@pytest.mark.parametrize("family", ["mask", "retinanet"])
def test_classes_are_matched_by_name(family: str) -> None:
    order = [2, 0, 1]
    heads = [h for h in HEADS[family] if h in ("ROIKD", "MaskLogitKD", "DenseKD")]
    teacher = outspoken_model(family, seed=1)
    shuffled = with_classes_in_order(teacher, order)
    names = [CLASSES[i] for i in order]
    same, _, _ = record(distilled(family, heads, teacher=teacher), image_dicts())
    named, _, _ = record(
        distilled(family, heads, teacher=shuffled, teacher_classes=names), image_dicts()
    )
    unnamed, _, _ = record(distilled(family, heads, teacher=shuffled), image_dicts())
    assert same.keys() == named.keys()
    for key, value in same.items():
        torch.testing.assert_close(named[key], value, rtol=1e-4, atol=0)
        if "loss_densekd" not in key or family == "retinanet":  # the RPN knows no classes
            assert not torch.isclose(unnamed[key], value, rtol=1e-2, atol=0)


TEACHER_SUBSET = ("star", "hexagon", "circle")  # its columns 2, 0 are the student's 0, 2


def test_roi_and_mask_losses_skip_what_the_teacher_does_not_know() -> None:
    model = distilled(
        "mask",
        ["ROIKD", "MaskLogitKD"],
        *("MODEL.DISTILL.ROIKD.FOREGROUND_WEIGHT", 2.0),
        *("MODEL.DISTILL.ROIKD.BACKGROUND_WEIGHT", 0.5),
        *("MODEL.DISTILL.ROIKD.TEMPERATURE", 3.0),
        teacher_classes=TEACHER_SUBSET,
    )
    losses, s, t = record(model, [image_dict(seed, objects=4) for seed in (4, 8)])
    roi, said = s.rois[0], t.rois[0]
    known, background = (roi.labels == 0) | (roi.labels == 2), roi.labels == 3
    assert known.any() and background.any() and (roi.labels == 1).any()
    divergence = 9 * F.kl_div(
        (roi.logits[:, [0, 2, 3]] / 3).log_softmax(1),
        (said.logits[:, [2, 0, 3]] / 3).softmax(1),
        reduction="none",
    ).sum(1)
    expected = (2 * divergence[known].sum() + 0.5 * divergence[background].sum()) / len(roi.labels)
    torch.testing.assert_close(losses["loss_roikd/cls"], expected)

    in_teacher = torch.tensor([2, -1, 0])
    labels, rows = roi.labels[known], torch.arange(int(known.sum()))
    gap = roi.deltas[known][rows, labels] - said.deltas[known][rows, in_teacher[labels]]
    torch.testing.assert_close(losses["loss_roikd/box"], gap.abs().sum() / len(rows))

    known = s.masks.labels != 1
    labels, rows = s.masks.labels[known], torch.arange(int(known.sum()))
    p = torch.distributions.Bernoulli(logits=t.masks.logits[known][rows, in_teacher[labels]])
    q = torch.distributions.Bernoulli(logits=s.masks.logits[known][rows, labels])
    expected = torch.distributions.kl_divergence(p, q).mean()
    torch.testing.assert_close(losses["loss_masklogitkd"], expected)


def test_dense_loss_compares_the_shared_classes() -> None:
    model = distilled("retinanet", ["DenseKD"], teacher_classes=TEACHER_SUBSET)
    losses, s, t = record(model, image_dicts())
    pairs = [(a[..., [0, 2]], b[..., [2, 0]]) for a, b in zip(s.dense.logits, t.dense.logits)]
    bernoulli = torch.distributions.Bernoulli
    level = [
        (
            b.sigmoid().amax(-1)
            * torch.distributions.kl_divergence(bernoulli(logits=b), bernoulli(logits=a)).sum(-1)
        ).sum()
        for a, b in pairs
    ]
    mass = sum(b.sigmoid().amax(-1).sum() for _, b in pairs)
    for k, value in enumerate(level):
        expected = value / mass
        # Divergences this small are differences of float32 cross entropies.
        torch.testing.assert_close(losses[f"loss_densekd/level{k}"], expected, rtol=1e-3, atol=5e-9)


# ---- Cascades and single stages.


def test_cascade_teacher_of_a_single_stage_gives_mean_scores_and_first_deltas() -> None:
    teacher = outspoken_model("cascade", seed=1)
    _, s, t = record(distilled("faster", ["ROIKD"], teacher=teacher), image_dicts())
    heads = teacher.roi_heads
    with torch.no_grad():
        features = teacher.backbone(teacher.preprocess_image(image_dicts()).tensor)
        pooled = heads.box_pooler(
            [features[f] for f in heads.box_in_features], [Boxes(b) for b in s.rois[0].boxes]
        )
        outputs = [heads.box_predictor[k](heads.box_head[k](pooled)) for k in range(3)]
    scores = sum(logits.softmax(1) for logits, _ in outputs) / 3
    torch.testing.assert_close(t.rois[0].logits.softmax(1), scores)
    deltas = outputs[0][1].view(-1, 1, 4) / torch.tensor([10.0, 10.0, 5.0, 5.0])
    torch.testing.assert_close(t.rois[0].deltas, deltas)


def test_single_stage_teacher_of_a_cascade_answers_for_every_stage() -> None:
    """Labels of later stages are those that detectron2 itself gives their boxes."""
    teacher = outspoken_model("mask", seed=1)
    model = distilled("cascade", ["ROIKD"], teacher=teacher)
    relabelled = []
    heads = model.student.roi_heads
    match = heads._match_and_label_boxes

    def recorded(*args: Any) -> Any:
        relabelled.append(match(*args))
        return relabelled[-1]

    heads._match_and_label_boxes = recorded
    losses, s, t = record(model, [image_dict(seed, objects=4) for seed in (4, 8)])
    assert len(s.rois) == len(t.rois) == 3
    for roi, proposals in zip(s.rois[1:], relabelled):
        assert torch.equal(roi.labels, torch.cat([p.gt_classes for p in proposals]))
        assert torch.equal(roi.boxes[0], proposals[0].proposal_boxes.tensor)

    with torch.no_grad():
        features = teacher.backbone(teacher.preprocess_image(s.batch.inputs).tensor)
        maps = [features[f] for f in teacher.roi_heads.box_in_features]
        expected = torch.zeros(2)
        for roi in s.rois:
            pooled = teacher.roi_heads.box_pooler(maps, [Boxes(b) for b in roi.boxes])
            logits, deltas = teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(pooled))
            expected[0] += F.kl_div(
                roi.logits.log_softmax(1), logits.log_softmax(1), log_target=True,
                reduction="batchmean",
            ) / 3  # fmt: skip
            fg = (roi.labels < 3).nonzero()[:, 0]
            theirs = deltas.view(-1, 3, 4)[fg, roi.labels[fg]] / torch.tensor([10, 10, 5, 5])
            expected[1] += (roi.deltas[fg, 0] - theirs).abs().sum() / len(fg) / 3
    torch.testing.assert_close(losses["loss_roikd/cls"].detach(), expected[0])
    torch.testing.assert_close(losses["loss_roikd/box"].detach(), expected[1])
    # The student's own deltas are compared without its stage's weights.
    raw = []
    for k in range(3):
        heads.box_predictor[k].register_forward_hook(lambda _m, _a, out: raw.append(out[1]))
    torch.manual_seed(0)
    kd_losses(model, s.batch.inputs)
    for roi, deltas, (xy, wh) in zip(s.rois, raw, ((10, 5), (20, 10), (30, 15))):
        weights = torch.tensor([xy, xy, wh, wh])
        torch.testing.assert_close(roi.deltas[:, 0] * weights, deltas)


# ---- Refusals, each one sentence at start-up.


def _c4(*heads: str) -> DistillModel:
    opts = ("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["res4"])
    opts += ("MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ANCHOR_GENERATOR.SIZES", [[32]])
    opts += ("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 50)
    opts += ("MODEL.RESNETS.OUT_FEATURES", ["res4"], "MODEL.RESNETS.WIDTH_PER_GROUP", 4)
    return distilled("faster", heads, teacher=tiny_model("faster", *opts))


def _double_anchors() -> nn.Module:
    return tiny_model("faster", "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]])


REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "no shared class": (
        lambda: distilled("faster", ["ROIKD"], teacher_classes=("x", "y", "z")),
        "ROIKD .*no name in common",
    ),
    "objectness against classes": (
        lambda: distilled("faster", ["DenseKD"], teacher=tiny_model("retinanet")),
        "DenseKD .*RPN .*objectness",
    ),
    "other anchors": (
        lambda: distilled("faster", ["DenseKD"], teacher=_double_anchors()),
        "DenseKD .*anchors of level 0 differ",
    ),
    "other strides": (
        lambda: distilled("retinanet", ["DenseKD"], teacher=tiny_model("retinanet", *STOCK_P3_P7)),
        r"DenseKD .*strides differ \(student \[4",
    ),
    "student without masks": (
        lambda: distilled("faster", ["MaskLogitKD"], teacher=tiny_model("mask")),
        "MaskLogitKD .*masks, which the student .*does not produce; heads that do: .*FitNet",
    ),
    "teacher without masks": (
        lambda: distilled("mask", ["MaskLogitKD"], teacher=tiny_model("faster")),
        "MaskLogitKD .*masks, which the teacher",
    ),
    "dense teacher of boxes": (
        lambda: distilled("faster", ["ROIKD"], teacher=tiny_model("retinanet")),
        r"ROIKD .*rois, which the teacher \(RetinaNet\)",
    ),
    "boxes of a semantic student": (
        lambda: distilled("semantic", ["IMA"], "MODEL.DISTILL.IMA.SCOPE", "box"),
        "IMA.SCOPE is box, .* SemanticSegmentor",
    ),
    "masks of boxes": (
        lambda: distilled("semantic", ["IMA"], "MODEL.DISTILL.IMA.SCOPE", "mask"),
        "IMA.SCOPE is mask, .* SemanticSegmentor",
    ),
    "boxes of C4": (lambda: _c4("ROIKD"), "ROIKD .*rois, which the teacher"),
    "RetinaNet model, R-CNN student": (
        lambda: DistillRetinaNet(student=tiny_model("faster"), teacher=None, heads=nn.ModuleDict()),
        "DistillRetinaNet distils DenseDetector students, not GeneralizedRCNN",
    ),
    "R-CNN model, semantic student": (
        lambda: DistillRCNN(student=tiny_model("semantic"), teacher=None, heads=nn.ModuleDict()),
        "DistillRCNN distils GeneralizedRCNN students, not SemanticSegmentor",
    ),
    "semantic model, RetinaNet student": (
        lambda: DistillSemanticSegmentor(
            student=tiny_model("retinanet"), teacher=None, heads=nn.ModuleDict()
        ),
        "DistillSemanticSegmentor distils SemanticSegmentor students, not RetinaNet",
    ),
}


def test_a_c4_teaches_its_features_and_objectness() -> None:
    model = _c4("FitNet", "IMA")
    assert [x.student for x in model.heads["FitNet"].levels] == ["p4"]
    found = kd_losses(model, [image_dict(0)])
    assert all(x.isfinite() and x > 0 for x in found.values())


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case: str) -> None:
    build, message = REFUSALS[case]
    with pytest.raises(ConfigError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_model_that_is_no_detector_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no family; it must be a subclass of one of"):
        build_family(nn.Linear(1, 1))


# ---- Schedule.


def test_teacher_is_asked_only_while_a_head_is_active() -> None:
    opts = ("MODEL.DISTILL.FITNET.WARMUP_ITERS", 2, "MODEL.DISTILL.FITNET.STOP_ITER", 4)
    opts += ("MODEL.DISTILL.ROIKD.STOP_ITER", 3)
    model = distilled("faster", ["FitNet", "ROIKD"], *opts)
    asked: list[frozenset[str]] = []
    ask = model.teacher.ask

    def counted(student: NetworkOutputs, needs: frozenset[str], *more: Any) -> NetworkOutputs:
        asked.append(needs)
        return ask(student, needs, *more)

    model.teacher.ask = counted
    losses = []
    for iteration in range(6):
        torch.manual_seed(0)
        losses.append(kd_losses(model, image_dicts(), iteration))
    both, features = frozenset({"features", "rois"}), frozenset({"features"})
    assert asked == [{"rois"}, both, both, features]
    sums = [float(sum(v for k, v in x.items() if "fitnet" in k).detach()) for x in losses]
    assert sums == pytest.approx([0, sums[2] / 2, sums[2], sums[2], 0, 0])
    assert sums[2] > 0


def test_loss_names_do_not_depend_on_the_schedule() -> None:
    """Writers and ratios would go on showing the last value of a name that is gone."""
    for family, scope in (("mask", "auto"), ("retinanet", "image")):
        opts = [x for h in HEADS[family] for x in (f"MODEL.DISTILL.{h.upper()}.WARMUP_ITERS", 1)]
        opts += [x for h in HEADS[family] for x in (f"MODEL.DISTILL.{h.upper()}.STOP_ITER", 2)]
        model = distilled(family, HEADS[family], *opts, "MODEL.DISTILL.IMA.SCOPE", scope)
        before, during, after = (kd_losses(model, image_dicts(), i) for i in range(3))
        assert before.keys() == during.keys() == after.keys()
        assert all(float(x.detach()) == 0 for x in (*before.values(), *after.values()))


# ---- Hard batches and precision.


@pytest.mark.parametrize("objects", [2, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_without_annotations_and_mixed_sizes_train(family: str, objects: int) -> None:
    teacher = outspoken_model(family, seed=1, fpn=24)
    model = distilled(family, HEADS[family], teacher=teacher)
    inputs = [image_dict(0, 64, 80, objects, semantic=True), *image_dicts()[1:]]
    with EventStorage():
        losses = model(inputs)
    assert all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_autocast_keeps_the_losses_in_float32(family: str) -> None:
    model = distilled(family, HEADS[family], teacher=outspoken_model(family, seed=1, fpn=24))
    with torch.autocast("cpu", torch.bfloat16):
        losses = kd_losses(model, image_dicts())
    assert {x.dtype for x in losses.values()} == {torch.float32}
    assert all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.heads.parameters() if p.requires_grad)

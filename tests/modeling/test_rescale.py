"""A teacher at another image size: levels by effective stride, boxes in the student's pixels."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from torch import Tensor, nn

from distill.config.resume import changed_values, takes_effect, training_values
from distill.config.validate import check_values
from distill.errors import ConfigError
from distill.families import build_family
from distill.heads import DISTILL_HEAD_REGISTRY
from distill.heads.fpn import match_levels
from distill.modeling.rescale import (
    rescaled_image,
    rescaled_instances,
    rescaled_padding,
    rescaled_size,
    rescaled_truth,
)
from distill.modeling.teacher import Teacher
from distill.structures import Batch, NetworkInfo, NetworkOutputs
from tests.support.networks import (
    CLASSES,
    FAMILIES,
    HEADS,
    STOCK_P3_P7,
    distilled,
    image_dict,
    kd_losses,
    network_info,
    outspoken_model,
    record,
    tiny_cfg,
    tiny_model,
)

SCALE = "MODEL.DISTILL.TEACHER.SCALE"
# At SCALE 2 its strides and anchors are those of a student on P2 to P6.
DOUBLE = (*STOCK_P3_P7, "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]])


def image_dicts() -> list[dict[str, Any]]:
    """Two sizes; the second has no object."""
    return [image_dict(0, 64, 80, semantic=True), image_dict(1, 96, 64, objects=0, semantic=True)]


def info_at(scale: float, model: nn.Module) -> NetworkInfo:
    family = build_family(model)
    teacher = Teacher(family, input_format="BGR", student_format="BGR", scale=scale)
    return teacher.info(CLASSES, (*CLASSES, "background") if family.sem_seg_shape else ())


# ---- Images


@pytest.mark.parametrize("scale", [0.25, 1 / 3, 0.7, 1.1, 1.5, 2.0, 4.0])
def test_images_are_resized_by_exactly_the_scale(scale: float) -> None:
    ramp = torch.arange(64.0).expand(3, 48, 64)
    resized = rescaled_image(ramp, scale)
    assert resized.shape == (3, *rescaled_size((48, 64), scale))
    centres = (torch.arange(resized.shape[2]) + 0.5) / scale - 0.5
    inside = (centres > 8) & (centres < 55)
    expected = centres[inside].expand(3, resized.shape[1], -1)
    torch.testing.assert_close(resized[..., inside], expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("scale", [0.25, 1 / 3, 0.5, 0.9, 1.5])
def test_an_image_of_one_pixel_keeps_one(scale: float) -> None:
    for size in ((1, 1), (1, 37), (3, 2)):
        resized = rescaled_image(torch.full((3, *size), 7, dtype=torch.uint8), scale)
        padded = rescaled_padding(size, scale)
        assert resized.shape[1:] == rescaled_size(size, scale)
        assert all(1 <= a <= b for a, b in zip(resized.shape[1:], padded))
        torch.testing.assert_close(resized, torch.full_like(resized, 7))


def test_a_smaller_image_is_averaged() -> None:
    stripes = (torch.arange(32) % 2 * 100.0).expand(1, 32, 32)
    resized = rescaled_image(stripes, 0.25)[..., 2:-2]
    assert (resized - 50).abs().max() < 10  # without antialias: 0 or 100


@pytest.mark.parametrize("family", ["mask", "retinanet", "semantic"])
def test_scale_1_is_a_training_without_the_key(family: str) -> None:
    heads = ["FitNet", *({"ROIKD", "MaskLogitKD", "DenseKD", "PixelKD"} & {*HEADS[family]})]
    model = distilled(family, heads, SCALE, 1.0)
    teacher = model.teacher
    batch = Batch(image_dicts(), (96, 96))
    expected = teacher.family.preprocess([x["image"] for x in batch.inputs], (96, 96))
    assert torch.equal(teacher.preprocess(batch), expected)
    losses, _, _ = record(model, image_dicts())
    model.teachers[""] = Teacher(teacher.family, input_format="BGR", student_format="BGR")
    plain, _, _ = record(model, image_dicts())
    assert all(torch.equal(x, plain[k]) for k, x in losses.items())


@pytest.mark.parametrize("scale", [0.5, 1.5, 2.0])
def test_the_teachers_padded_size_is_the_students_times_the_scale(scale: float) -> None:
    model = distilled("faster", ["FitNet"], SCALE, scale)
    seen = model.teacher.preprocess(Batch(image_dicts(), (128, 192)))
    assert seen.shape[-2:] == (128 * scale, 192 * scale)


def test_channel_order_is_that_of_the_teacher_at_any_scale() -> None:
    model = distilled("faster", ["FitNet"], SCALE, 2.0, teacher_format="RGB")
    batch = Batch(image_dicts(), (96, 96))
    seen = model.teacher.preprocess(batch)
    mean, std = model.teacher.model.pixel_mean, model.teacher.model.pixel_std
    first = (rescaled_image(batch.inputs[0]["image"].flip(0), 2.0) - mean) / std
    torch.testing.assert_close(seen[0, :, :128, :160], first)
    assert not seen[0, :, 128:].any() and not seen[0, :, :, 160:].any()


def test_a_square_that_is_smaller_than_the_scaled_image_is_refused() -> None:
    teacher = outspoken_model("faster")
    teacher.backbone = AveragePools(square=128)
    model = distilled("faster", ["FitNet"], SCALE, 2.0, teacher=teacher)
    with pytest.raises(
        ConfigError, match=r"128 x 128.*has 192 x 192; lower MODEL\.DISTILL\.TEACHER\.SCALE"
    ):
        kd_losses(model, image_dicts())


# ---- Levels


@pytest.mark.parametrize(
    ("scale", "pairs"),
    [
        (0.5, [("p3", "p2"), ("p4", "p3"), ("p5", "p4"), ("p6", "p5")]),
        (1.5, [(k, k) for k in ("p2", "p3", "p4", "p5", "p6")]),
        (2.0, [("p2", "p3"), ("p3", "p4"), ("p4", "p5"), ("p5", "p6")]),
    ],
)
def test_levels_are_matched_by_effective_stride(scale: float, pairs: Any) -> None:
    model = tiny_model("faster")
    own, theirs = network_info("student", model), info_at(scale, model)
    expected = [s.stride / scale for s in own.features.values()]
    assert [s.stride for s in theirs.features.values()] == expected
    assert [(x.student, x.teacher) for x in match_levels(own.maps, theirs.maps, ())] == pairs


def test_whole_strides_stay_whole() -> None:
    strides = [s.stride for s in info_at(2.0, tiny_model("faster")).features.values()]
    assert strides == [2, 4, 8, 16, 32] and all(isinstance(x, int) for x in strides)


def test_the_semantic_head_has_an_effective_stride() -> None:
    assert info_at(2.0, tiny_model("semantic")).sem_seg.stride == 2
    assert info_at(0.5, tiny_model("panoptic")).sem_seg.stride == 8


class AveragePools(Backbone):
    """Each cell of each level is the mean of its pixels."""

    def __init__(self, square: int = 0):
        super().__init__()
        self.square = square

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {f"p{k}": F.avg_pool2d(x, 2**k, ceil_mode=True) for k in range(2, 7)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"p{k}": ShapeSpec(channels=3, stride=2**k) for k in range(2, 7)}

    @property
    def size_divisibility(self) -> int:
        return 32

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"square_size": self.square}


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.5, 2.0, 3.0])
def test_a_cell_is_compared_with_the_same_place_of_the_image(scale: float) -> None:
    """A mean over a ramp is the position of the cell's centre, at every scale."""
    model = distilled("semantic", ["FitNet"])
    for net in (model.student, model.teacher.model):
        net.backbone = AveragePools()
    model.teacher.scale = scale
    inputs = [{"image": torch.arange(192.0).expand(3, 192, 192)}]
    images = model.family.preprocess([inputs[0]["image"]], (192, 192))
    batch = Batch(inputs, (192, 192))
    student = NetworkOutputs(batch, features=model.student.backbone(images))
    teacher = model.teacher.ask(student, frozenset({"features"}))
    own, theirs = network_info("student", model.student), info_at(scale, model.teacher.model)
    head = DISTILL_HEAD_REGISTRY.get("FitNet")(tiny_cfg("semantic"), own, theirs)
    for level, (s, t) in zip(head.levels, head.maps(student, teacher)):
        inside = slice(2, -2) if level.stride <= 16 else slice(1, -1)
        gap = (s - t)[..., inside, inside] * model.student.pixel_std  # in pixels
        assert s.shape == t.shape and gap.numel()
        assert gap.abs().max() < 0.05, level


# ---- Boxes


def test_boxes_of_an_rcnn_are_cropped_from_the_scaled_maps() -> None:
    model = distilled("mask", ["ROIKD", "MaskLogitKD"], SCALE, 2.0)
    losses, s, t = record(model, image_dicts())
    heads = model.teacher.model.roi_heads
    with torch.no_grad():
        features = model.teacher.model.backbone(model.teacher.preprocess(s.batch))
        maps = [features[f] for f in heads.box_in_features]
        pooled = heads.box_pooler(maps, [Boxes(2 * b) for b in s.rois[0].boxes])
        logits, _ = heads.box_predictor(heads.box_head(pooled))
        pooled = heads.mask_pooler(maps, [Boxes(2 * b) for b in s.masks.boxes])
        masks = heads.mask_head.layers(pooled)
    torch.testing.assert_close(t.rois[0].logits, logits)
    torch.testing.assert_close(t.masks.logits, masks)
    for a, b in ((s.rois[0], t.rois[0]), (s.masks, t.masks)):
        assert all(torch.equal(x, y) for x, y in zip(a.boxes, b.boxes))
    assert s.batch is t.batch and all(x.isfinite() for x in losses.values())


@pytest.mark.parametrize("family", ["faster", "retinanet"])
def test_boxes_that_the_teacher_predicts_come_back_in_the_students_pixels(family: str) -> None:
    teacher = outspoken_model(family, seed=1)
    layer = teacher.head.bbox_pred if family == "retinanet" else None
    layer = layer or teacher.proposal_generator.rpn_head.anchor_deltas
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    model = distilled(family, ["FitNet"], SCALE, 2.0, teacher=teacher)
    batch = Batch(image_dicts(), (96, 96))
    images = model.family.preprocess([x["image"] for x in batch.inputs], batch.padded_size)
    needs = frozenset({"dense", "dense_boxes"})
    with torch.no_grad():
        student = model.family.ask(images, NetworkOutputs(batch), needs)
    boxes = model.teacher.ask(student, needs).dense_boxes[0]
    # The first cell's anchors of 16 pixels at SCALE 2 have 8 of the student's pixels.
    sides = boxes[:, :3, 2:] - boxes[:, :3, :2]
    torch.testing.assert_close(sides.prod(-1), torch.full((2, 3), 64.0))


# ---- Dense heads


def test_dense_heads_work_where_the_grids_coincide() -> None:
    teacher = outspoken_model("retinanet", *DOUBLE, seed=1)
    heads = ("DenseKD", "CrossKD", "GID", "TID")
    model = distilled("retinanet", heads, SCALE, 2.0, teacher=teacher)
    losses, s, t = record(model, image_dicts())
    assert s.dense.sizes == t.dense.sizes
    assert [x.shape for x in s.dense_boxes] == [x.shape for x in t.dense_boxes]
    assert all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    own, theirs = (x.dense for x in (network_info("s", model.student), info_at(2.0, teacher)))
    for a, b in zip(own.anchors, theirs.anchors):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scale", [0.5, 1.5, 2.0])
@pytest.mark.parametrize("head", ["DenseKD", "CrossKD", "GID", "TID", "FRS"])
def test_dense_heads_refuse_other_grids(head: str, scale: float) -> None:
    message = f"{head} does not work .*strides differ .*{SCALE} {scale:g}\\)"
    with pytest.raises(ConfigError, match=message) as error:
        distilled("retinanet", [head], SCALE, scale)
    assert "\n" not in str(error.value)


def test_dense_heads_refuse_other_anchors_in_the_students_pixels() -> None:
    teacher = tiny_model("retinanet", *STOCK_P3_P7)
    with pytest.raises(ConfigError, match=r"anchors of level 0 differ .*teacher .*8 x 8"):
        distilled("retinanet", ["DenseKD"], SCALE, 2.0, teacher=teacher)


# ---- Ground truth in the teacher's pixels


def test_every_field_of_the_ground_truth_is_scaled() -> None:
    truth = Instances((8, 10))
    truth.gt_boxes = Boxes(torch.tensor([[1.0, 2.0, 5.0, 6.0]]))
    truth.gt_classes = torch.tensor([2])
    truth.gt_keypoints = Keypoints(torch.tensor([[[3.0, 4.0, 2.0]]]))
    truth.gt_masks = PolygonMasks([[[1.0, 2.0, 5.0, 2.0, 5.0, 6.0]]])
    scaled = rescaled_instances(truth, (16, 20), 2.0)
    assert scaled.image_size == (16, 20) and scaled.gt_classes.tolist() == [2]
    assert scaled.gt_boxes.tensor.tolist() == [[2, 4, 10, 12]]
    assert scaled.gt_keypoints.tensor.tolist() == [[[6, 8, 2]]]
    assert scaled.gt_masks.polygons[0][0].tolist() == [2, 4, 10, 4, 10, 12]
    mask = torch.zeros(1, 8, 10, dtype=torch.bool)
    mask[:, 2:6, 1:5] = True
    truth.gt_masks = BitMasks(mask)
    found = rescaled_instances(truth, (16, 20), 2.0).gt_masks.tensor
    expected = torch.zeros(1, 16, 20, dtype=torch.bool)
    expected[:, 4:12, 2:10] = True
    assert torch.equal(found, expected)


def test_the_truth_of_a_batch_keeps_ignored_labels_and_empty_images() -> None:
    inputs = image_dicts()
    inputs[0]["sem_seg"][0, 0] = 255
    batch = Batch(inputs, (96, 96), [x["instances"] for x in inputs])
    scaled = rescaled_truth(batch, 0.5)
    assert scaled.padded_size == (48, 48) and scaled.sem_seg.shape == (2, 48, 48)
    assert set(scaled.sem_seg.unique().tolist()) <= {-1, 0, 1, 2, 3, 255}
    assert [x["image"].shape for x in scaled.inputs] == [(3, 32, 40), (3, 48, 32)]
    assert len(scaled.instances[1]) == 0 and scaled.instances[1].gt_masks.tensor.shape[0] == 0
    assert all(torch.equal(a * 0.5, b) for a, b in zip(batch.boxes, scaled.boxes))


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("family", ["mask", "panoptic", "retinanet"])
def test_maskd_trains_its_tokens_on_the_scaled_ground_truth(family: str, scale: float) -> None:
    opts = ("MODEL.DISTILL.MASKD.TOKEN_ITERS", 5)
    model = distilled(family, ["MasKD"], *opts, SCALE, scale)
    losses, s, t = record(model, image_dicts())
    assert losses["loss_maskd/tokens"].isfinite()
    losses["loss_maskd/tokens"].backward()
    assert model.heads["MasKD"].drawn["p4"].tokens.grad.abs().sum() > 0

    losses_of = info_at(scale, model.teacher.model).detector_losses
    own = build_family(model.teacher.model).info("teacher", CLASSES).detector_losses
    with torch.no_grad():
        torch.manual_seed(0)
        found = losses_of(t.features, s.batch)
        torch.manual_seed(0)
        expected = own(t.features, rescaled_truth(s.batch, scale))
    assert all(torch.equal(x, expected[k]) for k, x in found.items())


# ---- Every family


@pytest.mark.parametrize("scale", [0.5, pytest.param(2.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_of_every_family(family: str, scale: float) -> None:
    student, teacher = outspoken_model(family), outspoken_model(family, seed=1)
    own, theirs = network_info("student", student), info_at(scale, teacher)
    working = [
        name
        for name in HEADS[family]
        if not DISTILL_HEAD_REGISTRY.get(name).problem(own, theirs)
        and name in ("FitNet", "ROIKD", "MaskLogitKD", "CWDLogits", "PixelKD", "KD", "DKD")
    ]
    assert "FitNet" in working and ("ROIKD" in working) == ("rois" in own.outputs)
    model = distilled(family, working, SCALE, scale, student=student, teacher=teacher)
    before = copy.deepcopy(teacher.state_dict())
    losses, _, _ = record(model, image_dicts())
    assert all(x.isfinite() for x in losses.values())
    total = sum(losses.values())
    assert float(total.detach()) > 0
    total.backward()
    gradients = [p.grad for p in student.backbone.parameters() if p.grad is not None]
    assert gradients and all(x.isfinite().all() for x in gradients)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(x, before[k]) for k, x in teacher.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.5, 1.5, 2.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_that_accepts_the_networks_trains(family: str, scale: float) -> None:
    student, teacher = outspoken_model(family), outspoken_model(family, seed=1)
    own, theirs = network_info("student", student), info_at(scale, teacher)
    for name in HEADS[family]:
        if DISTILL_HEAD_REGISTRY.get(name).problem(own, theirs):
            continue
        model = distilled(family, [name], SCALE, scale, student=student, teacher=teacher)
        losses, _, _ = record(model, image_dicts())
        assert all(x.isfinite() for x in losses.values()), name
        sum(losses.values()).backward()


# ---- Config


@pytest.mark.parametrize("value", [0.0, 0.2, 4.5, -1.0, float("nan")])
def test_other_scales_are_refused(value: float) -> None:
    cfg = tiny_cfg("faster")
    cfg.MODEL.DISTILL.TEACHER.SCALE = value
    with pytest.raises(ConfigError, match=f"{SCALE} is {value}; it must be"):
        check_values(cfg)


def test_a_resume_with_another_scale_is_refused_by_name() -> None:
    saved = training_values(tiny_cfg("faster"))
    own = training_values(tiny_cfg("faster", SCALE, 2.0))
    assert changed_values(saved, own) == {SCALE: (1.0, 2.0)} and not takes_effect(SCALE)
    del saved[SCALE]  # a checkpoint of a version without the key
    assert changed_values(saved, training_values(tiny_cfg("faster"))) == {}

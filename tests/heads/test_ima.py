"""The instances of IMA: images, boxes, masks and semantic classes."""

import re

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from distill.errors import ConfigError
from distill.heads import IMA
from distill.heads.fpn import Level, cell_labels
from distill.heads.ima import CROP_SIZE
from distill.heads.instances import TeacherInstances
from distill.losses import fitnet, ima_classes
from distill.structures import Batch
from tests.support.networks import (
    built_head,
    distilled,
    feature_head,
    image_dict,
    kd_losses,
    network_info,
    outputs,
    outspoken_model,
    tiny_cfg,
    tiny_model,
)

BOX = (0.0, 0.0, 32.0, 32.0)


def ramp(stride, height, width):
    """(1, 2, H, W): x and y of each cell's centre in pixels."""
    y, x = ((torch.arange(n) + 0.5) * stride for n in (height, width))
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)])[None]


@pytest.mark.parametrize(
    "family, scope",
    [
        ("faster", "box"),
        ("mask", "mask"),
        ("cascade", "mask"),
        ("panoptic", "mask"),
        ("retinanet", "box"),
        ("fcos", "box"),
        ("semantic", "class"),
    ],
)
def test_default_scope_of_ima(family, scope):
    ima_head = built_head(IMA, family)
    assert ima_head.scope == scope
    levels = ["p2", "p3", "p4", "p5"]  # instances lie on the levels that the box head pools from
    assert [x.student for x in ima_head.levels] == levels + ["p6"] * (
        family in ("retinanet", "fcos", "semantic")
    )


def test_scope_and_options_of_a_config():
    ima_head = built_head(
        IMA,
        "faster",
        *("MODEL.DISTILL.IMA.SCOPE", "image", "MODEL.DISTILL.IMA.MASK_RATIO", 0.3),
        *("MODEL.DISTILL.IMA.SCALE_ON", "raw", "MODEL.DISTILL.IMA.SCALE_FLOOR", 0.7),
        *("MODEL.DISTILL.IMA.STANDARDIZE_TEACHER", False),
    )
    assert (ima_head.scope, ima_head.masks.mask_ratio) == ("image", 0.3)
    assert len(ima_head.levels) == 5
    assert ima_head.options == {
        "standardize": True,
        "standardize_teacher": False,
        "deflate": True,
        "scale_on": "raw",
        "scale_floor": 0.7,
    }


def test_building_does_not_change_the_given_config():
    cfg = tiny_cfg("faster", "MODEL.DISTILL.HEADS", ("IMA",))
    cfg.freeze()
    before = cfg.dump()
    spec = network_info("student", tiny_model("faster"))
    IMA(cfg, spec, spec)
    assert cfg.dump() == before


def ima_head(scope, level=None, channels=(2, 2), **options):
    defaults = {
        "mask_ratio": 0.0,
        "standardize": False,
        "standardize_teacher": True,
        "deflate": False,
        "scale_on": "standardized",
        "scale_floor": 0.1,
    }
    return feature_head(
        IMA, level or Level("p2", "p2", 4, 4), channels, scope=scope, **defaults | options
    )


def batch_of(image_dicts):
    return Batch([{"instances": x} for x in image_dicts], (64, 64), image_dicts)


def halves(boxes, masks="bits", size=64, part="left"):
    """Instances whose masks are one half of their boxes."""
    instances = Instances((size, size))
    instances.gt_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
    parts = [half(box, part) for box in boxes]
    if masks == "bits":
        bits = torch.zeros(len(boxes), size, size, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(bits, parts):
            mask[int(y1) : int(y2), int(x1) : int(x2)] = True
        instances.gt_masks = BitMasks(bits)
    elif masks == "polygons":
        instances.gt_masks = PolygonMasks(
            [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in parts]
        )
    return instances


def half(box, part):
    x1, y1, x2, y2 = box
    middle = (x1 + x2) / 2
    return (x1, y1, middle, y2) if part == "left" else (middle, y1, x2, y2)


@pytest.mark.parametrize("masks", ["bits", "polygons"])
def test_masks_are_cropped_to_the_boxes_grid(masks):
    image_dicts = [
        halves([], masks),
        halves([BOX, (16.0, 8.0, 48.0, 40.0)], masks),
        halves([(8.0, 8.0, 36.0, 64.0)], masks, part="right"),
    ]
    weight = IMA.instance_masks(batch_of(image_dicts))
    assert weight.shape == (3, 1, CROP_SIZE, CROP_SIZE)
    assert weight.dtype == torch.float32
    left = torch.zeros(CROP_SIZE, CROP_SIZE)
    left[:, : CROP_SIZE // 2] = 1
    for found, expected in zip(weight[:, 0], (left, left, 1 - left)):
        # Rasterising may move the mask's border by a cell.
        assert (found != expected).float().mean() <= 2 / CROP_SIZE
        assert torch.equal(found[2:-2, [1, 4, 9, 12]], expected[2:-2, [1, 4, 9, 12]])


@pytest.mark.parametrize("masks", ["bits", "polygons"])
def test_no_masks_at_all(masks):
    weight = IMA.instance_masks(batch_of([halves([], masks)] * 2))
    assert weight.shape == (0, 1, CROP_SIZE, CROP_SIZE)


@pytest.mark.parametrize("scope, counts", [("mask", False), ("box", True)])
def test_cells_off_the_mask_count_for_boxes_only(scope, counts):
    student = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    teacher = student.clone()
    teacher[1, :, :8, 6:8] += 5  # in the second image's box, right of its mask and the border
    teacher[0] += 5  # the first image has no box
    instances = [halves([]), halves([BOX])]
    loss = ima_head(scope)(
        outputs((64, 64), instances, p2=student),
        outputs((64, 64), instances, p2=teacher),
    )["loss_ima"]
    assert (loss > 1) == counts
    teacher[1, :, :8, :2] += 5  # on the mask
    loss = ima_head(scope)(
        outputs((64, 64), instances, p2=student),
        outputs((64, 64), instances, p2=teacher),
    )["loss_ima"]
    assert loss > 1


def test_boxes_crop_both_networks_at_the_same_place():
    # A gap of 3 in one box, of 1 in the other, and of 100 outside of both.
    gap = torch.full((1, 1, 16, 16), 100.0)
    gap[..., :8, :8], gap[..., 8:, 8:] = 3.0, 1.0
    student = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    inner = [(4.0, 4.0, 28.0, 28.0), (36.0, 36.0, 60.0, 60.0)]  # away from the gap's border
    instances = [halves(inner)]
    loss = ima_head("box", channels=(1, 1))(
        outputs((64, 64), instances, p2=student),
        outputs((64, 64), instances, p2=student - gap),
    )["loss_ima"]
    torch.testing.assert_close(loss, torch.tensor((9.0 + 1.0) / 2))


def test_large_boxes_are_read_on_coarse_levels():
    levels = [Level("p4", "p4", 16, 16), Level("p5", "p5", 32, 32)]
    features = {"p4": torch.zeros(1, 1, 32, 32), "p5": torch.zeros(1, 1, 16, 16)}
    teacher = {"p4": torch.full((1, 1, 32, 32), 2.0), "p5": torch.full((1, 1, 16, 16), 3.0)}
    one = ima_head("box", channels=(1, 1))
    both = IMA(
        levels=levels,
        channels=[(1, 1), (1, 1)],
        scope="box",
        mask_ratio=0.0,
        **{**one.options, "standardize": False},
    )
    for size, expected in ((100.0, 4.0), (500.0, 9.0)):  # 224 px lie on stride 16 in FPN
        instances = [halves([(0.0, 0.0, size, size)], masks="", size=512)]
        loss = both(
            outputs((512, 512), instances, **features),
            outputs((512, 512), instances, **teacher),
        )["loss_ima"]
        torch.testing.assert_close(loss, torch.tensor(expected))


def wide_levels(scope="box"):
    """A head of two levels, of 1 and 3 channels, and student and teacher maps of 512 pixels."""
    levels = [Level("p4", "p4", 16, 16), Level("p5", "p5", 32, 32)]
    options = ima_head(scope).options | {"standardize": False}
    head = IMA(levels=levels, channels=[(1, 1), (3, 3)], scope=scope, mask_ratio=0.0, **options)
    shapes = {"p4": (2, 1, 32, 32), "p5": (2, 3, 16, 16)}
    student = {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}
    teacher = {name: torch.full(x, 2.0 + k) for k, (name, x) in enumerate(shapes.items())}
    return head, student, teacher


@pytest.mark.parametrize("sizes, expected", [((100.0, 90.0, 500.0), 17 / 3), ((500.0,), 9.0)])
@pytest.mark.parametrize("scope", ["box", "mask"])
def test_levels_of_different_channels(scope, sizes, expected):
    """Each instance is cropped from its level, and all weigh the same."""
    head, student, teacher = wide_levels(scope)
    boxes = [(0.0, 0.0, size, size) for size in sizes]
    instances = [halves(boxes, size=512, part="all"), halves([], size=512)]
    pair = (outputs((512, 512), instances, **maps) for maps in (student, teacher))
    loss = head(*pair)["loss_ima"]
    torch.testing.assert_close(loss, torch.tensor(expected))
    loss.backward()
    assert student["p5"].grad[0].abs().sum() > 0 and student["p5"].grad[1].abs().sum() == 0


def test_levels_of_different_channels_without_instances():
    head, student, teacher = wide_levels()
    pair = (outputs((512, 512), [halves([])] * 2, **maps) for maps in (student, teacher))
    loss = head(*pair)["loss_ima"]
    loss.backward()
    assert loss == 0 and all((x.grad == 0).all() for x in student.values())


@pytest.mark.parametrize("scope", ["box", "mask"])
def test_a_batch_without_instances_is_a_connected_zero(scope):
    one = ima_head(scope, channels=(2, 3))
    student = torch.randn(2, 2, 16, 16, requires_grad=True)
    instances = [halves([]), halves([])]
    loss = one(
        outputs((64, 64), instances, p2=student),
        outputs((64, 64), instances, p2=torch.zeros(2, 3, 16, 16)),
    )["loss_ima"]
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()
    assert all((p.grad == 0).all() for p in one.parameters())


def test_image_scope_with_all_parts_off_is_fitnet():
    student, teacher = torch.randn(2, 2, 2, 8, 8)
    losses = ima_head("image")(outputs((32, 32), p2=student), outputs((32, 32), p2=teacher))
    torch.testing.assert_close(losses["loss_ima/p2"], fitnet(student, teacher))


def test_masks_change_from_step_to_step_and_come_back_with_the_state():
    one = ima_head("image", mask_ratio=0.5, seed=3)
    student, teacher = (outputs((32, 32), p2=torch.randn(1, 2, 8, 8)) for _ in range(2))
    state = one.state_dict()
    first, second = (one(student, teacher)["loss_ima/p2"].item() for _ in range(2))
    assert first != second
    again = ima_head("image", mask_ratio=0.5, seed=3)
    again.load_state_dict(state)
    assert [again(student, teacher)["loss_ima/p2"].item() for _ in range(2)] == [first, second]


def test_precomputed_proposals_leave_the_boxes():
    student = tiny_model("faster", "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    spec = network_info("student", student)
    assert IMA(tiny_cfg("faster"), spec, spec).scope == "box"


# ---- Detections of the teacher.

DETECTED = ("MODEL.DISTILL.IMA.INSTANCES", "teacher", "MODEL.DISTILL.IMA.INSTANCE_SCORE", 0.0)


@pytest.mark.parametrize("family", ["faster", "mask", "retinanet", "gfl"])
def test_instances_of_the_teacher_need_no_labels(family):
    teacher = outspoken_model(family, seed=1, fpn=24)
    teacher.test_score_thresh = 0.0  # a dense detector that is not trained is sure of nothing
    model = distilled(family, ["IMA"], *DETECTED, teacher=teacher)
    head, seen = model.heads["IMA"], []
    crops = head.crops
    head.crops = lambda maps, boxes: seen.append(boxes) or crops(maps, boxes)
    found = kd_losses(model, [image_dict(0, objects=0), image_dict(1, 96, 64)])
    assert all(len(x) > 0 for x in seen[0])
    assert all((x >= 0).all() and (x <= torch.tensor([64, 96] * 2)).all() for x in seen[0])
    assert found["loss_ima"] > 0
    found["loss_ima"].backward()
    assert head.adapters["p2"].weight.grad.abs().sum() > 0  # small boxes are on the finest level


def detected(*scores, masks=None):
    """A teacher's detections in one image: the box, so often, with these scores."""
    found = Instances((64, 64), scores=torch.tensor(scores))
    found.pred_boxes = Boxes(torch.tensor([BOX] * len(scores)).view(-1, 4))
    if masks is not None:
        found.pred_masks = masks
    return found


def test_a_detection_below_the_score_is_no_instance():
    head = ima_head("box", selection=TeacherInstances(0.5, (), ()))
    said = outputs((64, 64), [halves([])] * 2)
    said.detections = [detected(0.5, 0.49), detected()]
    boxes, weight = head.instances(said, said)
    assert [x.tolist() for x in boxes] == [[[*BOX]], []] and weight is None


def test_masks_of_detections_are_averaged_to_the_crops_grid():
    masks = torch.zeros(2, 1, 28, 28)
    masks[0, :, :, :13] = 1  # half of the seventh column of 14
    masks[1, :, :, 15:] = 0.9
    head = ima_head("mask", selection=TeacherInstances(0.5, (), ()))
    said = outputs((64, 64), [halves([])] * 2)
    said.detections = [detected(0.9, 0.6, masks=masks), detected(masks=torch.zeros(0, 1, 28, 28))]
    _, weight = head.instances(said, said)
    assert weight.shape == (2, 1, CROP_SIZE, CROP_SIZE)
    columns = torch.arange(CROP_SIZE)
    assert torch.equal(weight[0, 0], (columns <= 6).float().expand(CROP_SIZE, -1))
    assert torch.equal(weight[1, 0], (columns >= 8).float().expand(CROP_SIZE, -1))


@pytest.mark.parametrize(
    "family, teacher, scope, sentence",
    [
        ("retinanet", "retinanet", "image", "SCOPE is image; set SCOPE box or mask"),
        ("mask", "faster", "mask", "teacher (GeneralizedRCNN) have no masks; set SCOPE box"),
        ("semantic", "semantic", "box", "(SemanticSegmentor) predicts no detections"),
    ],
)
def test_a_teacher_that_cannot_name_instances_is_refused(family, teacher, scope, sentence):
    nets = network_info("student", tiny_model(family)), network_info("teacher", tiny_model(teacher))
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        IMA(tiny_cfg(family, *DETECTED, "MODEL.DISTILL.IMA.SCOPE", scope), *nets)


# ---- Semantic classes.


def test_class_scope_compares_the_classes_of_every_level():
    opts = ("MODEL.DISTILL.IMA.MASK_RATIO", 0.0)
    model = distilled("semantic", ["IMA"], *opts)
    heard = []
    model.heads["IMA"].register_forward_pre_hook(lambda _, args: heard.extend(args))
    inputs = [image_dict(0, 64, 96, semantic=True), image_dict(1, semantic=True)]
    inputs[0]["sem_seg"][:20] = 255
    found = kd_losses(model, inputs)
    student, teacher = heard
    assert set(found) == {f"loss_ima/p{k}" for k in range(2, 7)}
    padded_size = torch.full((2, 64, 96), -1)
    for labels, x in zip(padded_size, inputs):
        height, width = x["sem_seg"].shape
        labels[:height, :width] = x["sem_seg"]
    for level in model.heads["IMA"].levels[:4]:  # the canvas is a multiple of their strides
        s, t = student.features[level.student], teacher.features[level.student]
        half = level.stride // 2
        labels = padded_size[:, half :: level.stride, half :: level.stride]
        total, count = ima_classes(s, t, labels, 4, scale_floor=0.1)
        expected = total / max(count, 1) / 5
        torch.testing.assert_close(found[f"loss_ima/{level.student}"], expected)


def test_padding_and_ignored_cells_belong_to_no_class():
    model = distilled("semantic", ["IMA"], "MODEL.DISTILL.IMA.MASK_RATIO", 0.0)
    inputs = image_dict(0, semantic=True)
    inputs["sem_seg"][:] = 255
    found = kd_losses(model, [inputs])
    assert all(v == 0 for v in found.values())
    sum(found.values()).backward()


@pytest.mark.parametrize("size, stride", [((8, 12), 4), ((6, 10), 4), ((7, 7), 2), ((1, 1), 8)])
def test_cells_take_the_label_at_their_centre(size, stride):
    labels = torch.arange(size[0] * size[1]).view(1, *size)
    cells = [-(-n // stride) for n in size]
    found = cell_labels(labels, *cells)
    for i in range(cells[0]):
        for j in range(cells[1]):
            y, x = (int((k + 0.5) * n / c) for k, n, c in zip((i, j), size, cells))
            assert found[0, i, j] == labels[0, y, x]


def test_a_panoptic_student_may_choose_its_semantic_classes():
    ima_head = built_head(IMA, "panoptic", "MODEL.DISTILL.IMA.SCOPE", "class")
    assert (ima_head.scope, ima_head.num_classes) == ("class", 4)

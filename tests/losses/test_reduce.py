"""Test properties of all losses: precision, shape checks, empty batches, the connected zero."""

import re

import pytest
import torch

from distill import losses
from distill.losses.reduce import connected_zero, full_precision, same_shape
from tests.support.cases import for_each
from tests.support.operations import Recorder

MAP, ROWS = (2, 3, 4, 5), (6, 4)


def all_pass(x):
    """Return the frequency mask that removes nothing."""
    return torch.ones(len(x), 1, x.shape[2], x.shape[3] // 2 + 1)


def labels(x):
    """Return labels of three classes in each image, and some cells of no class."""
    cells = torch.arange(x.shape[2] * x.shape[3]) % 4
    return cells.where(cells < 3, 255).view(1, *x.shape[2:]).expand(len(x), -1, -1)


def cells(x):
    """Return a mask that is 1 at every other cell."""
    return torch.ones(len(x), *x.shape[2:]).cumsum(2) % 2


def objects(x):
    """Return one box per image of 32 x 40 pixels."""
    return [torch.tensor([[4.0, 8.0, 20.0, 30.0]])] * len(x)


LOSSES = {
    "at": (losses.at, MAP),
    "cosine": (losses.cosine, MAP),
    "binary_kl": (losses.binary_kl, ROWS),
    "categorical_kl": (losses.categorical_kl, ROWS),
    "channel_alignment": (losses.channel_alignment, MAP),
    "cross_image_relation": (lambda s, t: losses.cross_image_relation(s, t, pool=2), MAP),
    "crosskd_classes": (lambda s, t: losses.crosskd_classes(s, t, 1.0), ROWS),
    "cwd": (losses.cwd, MAP),
    "defeat": (lambda s, t: losses.defeat(s, t, cells(s)), MAP),
    "dense_kd": (losses.dense_kd, MAP),
    "dkd": (lambda s, t: losses.dkd(s, t, torch.arange(len(s)) % 4, 1.0, 0.25, 1.0), ROWS),
    "fgd": (lambda s, t: losses.fgd(s, t, objects(s), (32, 40)), MAP),
    "fgfi": (lambda s, t: losses.fgfi(s, t, cells(s) > 0), MAP),
    "fitnet": (losses.fitnet, MAP),
    "fkd": (lambda s, t: losses.fkd(s, t, cells(s)), MAP),
    "frequency_masked_mse": (lambda s, t: losses.frequency_masked_mse(s, t, all_pass(s)), MAP),
    "frs": (lambda s, t: losses.frs(s, t, cells(s)), MAP),
    "frs_classes": (lambda s, t: losses.frs_classes(s, t, cells(s)), MAP),
    "gid_feature": (losses.gid_feature, MAP),
    "gid_relation": (losses.gid_relation, ROWS),
    "hcl": (lambda s, t: losses.hcl([s], [t]), MAP),
    "ifvd": (lambda s, t: losses.ifvd(s, t, labels(s), 19), MAP),
    "ima": (losses.ima, MAP),
    "ima_classes": (lambda s, t: losses.ima_classes(s, t, labels(s), 19), MAP),
    "kd": (losses.kd, ROWS),
    "ld": (lambda s, t: losses.ld(s, t, torch.ones(len(s)), 10.0), ROWS),
    "length_of_gap": (losses.length_of_gap, MAP),
    "lgd": (lambda s, t: losses.lgd([s], [t]), MAP),
    "maskd": (lambda s, t: losses.maskd(s, t, torch.ones(len(s), 6, *s.shape[2:])), MAP),
    "memory_contrast": (lambda s, t: losses.memory_contrast(s, t, torch.eye(s.shape[1])), ROWS),
    "mgd": (lambda s, t: losses.mgd(s, t, torch.nn.Identity(), cells(s)[:, None]), MAP),
    "mkd": (lambda s, t: sum(losses.mkd(s, t, all_pass(s)).values()), MAP),
    "mssd": (losses.mssd, MAP),
    "multi_scale": (losses.multi_scale, MAP),
    "pairwise_affinity": (losses.pairwise_affinity, MAP),
    "pixel_kd": (losses.pixel_kd, MAP),
    "pkd": (losses.pkd, MAP),
    "ssim": (losses.ssim, MAP),
    "tid": (lambda s, t: losses.tid(s, t, torch.ones(len(s), *s.shape[2:])), MAP),
}
NO_LOSSES = {
    "IMA_STATISTICS",
    "NORMALIZE",
    "MKD_TERMS",
    "TID_AREAS",
    "TID_OUTSIDE_KEY",
    "TID_SCORES",
}
NO_LOSSES |= {"channel_normalized", "frequency_mask", "gaussian_mask"}
NO_LOSSES |= {"joint_attention", "matched_iou", "tid_by_value", "tid_information", "tid_mask"}
NO_LOSSES |= {"ld_region", "tid_score", "tid_value"}
NO_LOSSES |= {"DeFeatTerms", "FGDTerms", "defeat_masks", "feature_richness", "fgd_attention"}
NO_LOSSES |= {"fgfi_mask", "fgfi_masks", "fkd_mask", "general_instances", "padded"}
NO_LOSSES |= {"lgd_labels", "lgd_masks", "lgd_pooled", "lgd_rendered", "crosskd_aligned"}
# test_methods.py tests the losses of boxes, of rows, and of more than two tensors.
NO_LOSSES |= {"crosskd_bins", "crosskd_boxes", "dkd_rows", "gid_response"}
NO_LOSSES |= {"ClassQueues", "class_pixels", "class_regions", "dice_overlap", "receptive_masks"}
every_loss = for_each("loss, shape", LOSSES.values())


def outputs(value):
    return value if isinstance(value, tuple) else (value,)


def pair(shape, dtype=torch.float32, seed=0):
    return torch.randn((2, *shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_table_has_every_public_loss():
    assert set(LOSSES) == set(losses.__all__) - NO_LOSSES


@every_loss
@for_each("dtype", [torch.float16, torch.bfloat16])
@for_each("autocast", [False, True])
def test_half_precision_enters_as_float32(loss, shape, dtype, autocast):
    student, teacher = pair(shape, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = outputs(loss(student, teacher))
    for value, expected in zip(found, outputs(loss(student.float(), teacher.float()))):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


@every_loss
def test_large_half_precision_values_do_not_overflow(loss, shape):
    student = torch.full(shape, 6e4, dtype=torch.float16)
    assert all(x.isfinite().all() for x in outputs(loss(student, -student)))


@every_loss
def test_an_empty_batch_is_zero_and_has_a_backward(loss, shape):
    student = torch.zeros((0, *shape[1:]), requires_grad=True)
    value = outputs(loss(student, torch.zeros_like(student)))[0].sum()
    value.backward()
    assert value == 0
    assert student.grad is not None and student.grad.shape == student.shape


@every_loss
def test_other_shapes_are_refused_by_name(loss, shape):
    student, teacher = torch.zeros(shape), torch.zeros((shape[0] + 1, *shape[1:]))
    with pytest.raises(ValueError) as e:
        loss(student, teacher)
    assert re.fullmatch(
        r"student \(.*\) and teacher \(.*\) differ in (shape|batch or size)", str(e.value)
    )
    assert all(str(tuple(x.shape)) in str(e.value) for x in (student, teacher))


@every_loss
def test_no_gradient_reaches_a_detached_teacher_and_a_finite_one_the_student(loss, shape):
    student, teacher = pair(shape, seed=1)
    student.requires_grad_()
    outputs(loss(student, teacher))[0].sum().backward()
    assert student.grad.isfinite().all() and student.grad.abs().max() > 0


def test_full_precision_keeps_float64_and_does_not_copy_float32():
    double, single = torch.ones(2, dtype=torch.float64), torch.ones(2)
    assert full_precision(double) is double
    assert full_precision(single) is single
    assert full_precision(torch.ones(2, dtype=torch.int64)).dtype == torch.float32


def test_same_shape_allows_broadcastable_shapes_no_more_than_others():
    with pytest.raises(ValueError, match=r"student \(2, 1\) and teacher \(2, 3\) differ in shape"):
        same_shape(torch.zeros(2, 1), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_connected_zero_reaches_every_tensor_without_overflow(dtype):
    # Their plain sum is infinite in float16, and infinity times 0 is NaN.
    feature = torch.full((8, 8), 6e4, dtype=dtype, requires_grad=True)
    parameters = list(torch.nn.Conv2d(2, 3, 1).parameters())
    zero = connected_zero(feature, parameters=parameters)
    zero.backward()
    assert zero == 0
    for x in (feature, *parameters):
        assert x.grad is not None and (x.grad == 0).all()


def test_connected_zero_of_an_empty_tensor():
    empty = torch.zeros(0, 4, requires_grad=True)
    connected_zero(empty).backward()
    assert empty.grad is not None and empty.grad.shape == (0, 4)


def boxes(count, height, width):
    corner = torch.rand((count, 2), generator=torch.Generator().manual_seed(0))
    corner = corner * torch.tensor([width, height])
    return torch.cat([corner, corner + corner.flip(0) / 4 + 1], 1)


def anchors(count, each):
    return boxes(count * each, 400, 672).view(count, each, 4)


LEVEL = (2, 64, 50, 84)  # 400 x 672 pixels at stride 8
POINTS = LEVEL[2] * LEVEL[3]
HELPERS = {  # with 100 objects per image
    "gaussian_mask": lambda: losses.gaussian_mask([boxes(100, 400, 672)] * 2, 50, 84, 8),
    "matched_iou": lambda: losses.matched_iou(anchors(POINTS, 9), boxes(100, 400, 672)),
    "tid_information": lambda: losses.tid_information(
        anchors(POINTS, 1)[:, 0, :2], boxes(100, 400, 672)
    ),
    "tid_mask": lambda: losses.tid_mask(torch.linspace(0, 4, POINTS)),
    "tid_score": lambda: losses.tid_score(*torch.rand(2, POINTS), 0.5, 0.4),
}


@every_loss
def test_no_tensor_of_forward_or_backward_is_larger_than_two_maps(loss, shape):
    if shape == MAP:
        shape = LEVEL
    student, teacher = (x.clone() for x in pair(shape))
    student.requires_grad_()
    with Recorder() as recorder:
        outputs(loss(student, teacher))[0].sum().backward()
    assert student.grad is not None
    assert recorder.largest <= 2 * student.numel() * student.element_size()


@pytest.mark.parametrize("helper", HELPERS.values(), ids=HELPERS)
def test_many_objects_take_no_more_than_two_maps(helper):
    with Recorder() as recorder:
        helper()
    assert 0 < recorder.largest <= 2 * 4 * 256 * POINTS


@every_loss
def test_no_loss_waits_for_the_device(loss, shape):
    student, teacher = pair(shape)
    with Recorder() as recorder:
        outputs(loss(student.requires_grad_(), teacher))[0].sum().backward()
    assert not recorder.waits


@pytest.mark.parametrize("helper", HELPERS.values(), ids=HELPERS)
def test_no_helper_waits_for_the_device(helper):
    with Recorder() as recorder:
        helper()
    assert not recorder.waits


def test_the_recorder_sees_backward_and_waiting():
    x = torch.ones(5, requires_grad=True)
    with Recorder() as recorder:
        x.tanh().sum().backward()
    assert "tanh_backward" in recorder.names and not recorder.waits
    with Recorder() as recorder:
        (x[:, None] * x).sum().item()
        x[x > 0], x.nonzero()
    assert recorder.largest == 4 * 5 * 5
    assert recorder.waits == {"_local_scalar_dense", "index", "nonzero"}

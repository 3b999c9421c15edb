"""What every loss shares: precision on entry, shape checks, empty batches, the connected zero."""

import pytest
import torch

from distill import losses
from distill.losses.reduce import connected_zero, full_precision, same_shape

ALL_ONES = torch.ones(1, 1, 4, 3)  # half spectrum of a 4x5 map
MAP, ROWS = (2, 3, 4, 5), (6, 4)
LOSSES = {
    "binary_kl": (losses.binary_kl, ROWS),
    "categorical_kl": (losses.categorical_kl, ROWS),
    "dense_kd": (losses.dense_kd, MAP),
    "fitnet": (losses.fitnet, MAP),
    "frequency_masked_mse": (lambda s, t: losses.frequency_masked_mse(s, t, ALL_ONES), MAP),
    "ima": (losses.ima, MAP),
    "kd": (losses.kd, ROWS),
}
every_loss = pytest.mark.parametrize("loss, shape", LOSSES.values(), ids=LOSSES)


def outputs(value):
    return value if isinstance(value, tuple) else (value,)


def pair(shape, dtype=torch.float32, seed=0):
    return torch.randn((2, *shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_table_has_every_public_loss():
    assert set(LOSSES) == set(losses.__all__) - {"frequency_mask"}


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
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
    assert str(e.value) == (
        f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape"
    )


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
    # The plain sum of these is infinite in float16, and infinity times 0 is NaN.
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

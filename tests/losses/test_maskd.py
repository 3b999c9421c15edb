"""Test masked distillation: receptive masks, their overlap, and the error under them."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit

from distill.losses import dice_overlap, maskd, receptive_masks

SHAPES = [(1, 1, 1, 1), (2, 3, 4, 4), (1, 2, 5, 7), (3, 4, 3, 2)]
TOKENS = 3


def tensors(shape, seed=0, dtype=torch.float32):
    """Return (student, teacher, masks, weights)."""
    batch, _, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn((2, *shape), generator=generator, dtype=dtype)
    masks = torch.rand((batch, TOKENS, height, width), generator=generator, dtype=dtype)
    weights = torch.randn((batch, TOKENS), generator=generator, dtype=dtype).softmax(1)
    return student, teacher, masks, weights


def doubles(*tensors):
    return [x.detach().double().numpy() for x in tensors]


def literal_maskd(student, teacher, masks, weights):
    batch, channels, height, width = student.shape
    total = 0.0
    for n, t, c in np.ndindex(batch, masks.shape[1], channels):
        error = area = 0.0
        for i, j in np.ndindex(height, width):
            m = masks[n, t, i, j]
            error += (m * student[n, c, i, j] - m * teacher[n, c, i, j]) ** 2
            area += m
        total += weights[n, t] * error / (area + 1e-5) / channels
    return total / batch / 2


def literal_dice(masks):
    found = [
        2 * (a * b).sum() / ((a * a).sum() + (b * b).sum())
        for image_dict in masks
        for i, a in enumerate(image_dict)
        for j, b in enumerate(image_dict)
        if i != j
    ]
    return np.mean(found)


def test_value_by_hand():
    # Gaps (2, 4) under the masks (1, 0) and (1/2, 1/2): 4 / 1 and (1 + 4) / 1.
    student, teacher = torch.tensor([[[[2.0, 4.0]]]]), torch.zeros(1, 1, 1, 2)
    masks = torch.tensor([[[[1.0, 0.0]], [[0.5, 0.5]]]])
    found = maskd(student, teacher, masks)
    torch.testing.assert_close(found, torch.tensor((4 + 5) / 2 / 2), rtol=2e-5, atol=0)
    found = maskd(student, teacher, masks, torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(found, torch.tensor((1 + 3.75) / 2), rtol=2e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_literal_form(shape):
    student, teacher, masks, weights = tensors(shape)
    expected = literal_maskd(*doubles(student, teacher, masks, weights))
    np.testing.assert_allclose(maskd(student, teacher, masks, weights), expected, rtol=1e-5)
    equal = torch.full_like(weights, 1 / TOKENS)
    expected = literal_maskd(*doubles(student, teacher, masks, equal))
    np.testing.assert_allclose(maskd(student, teacher, masks), expected, rtol=1e-5)


def test_gradient():
    student, teacher, masks, weights = tensors((2, 2, 3, 2), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: maskd(s, teacher, masks, weights), student.requires_grad_()
    )


def test_only_the_student_gets_a_gradient():
    parts = [x.requires_grad_() for x in (y.clone() for y in tensors((1, 2, 3, 3)))]
    grads = torch.autograd.grad(maskd(*parts), parts, allow_unused=True)
    assert grads[0].abs().max() > 0 and grads[1:] == (None, None, None)


def test_empty_masks_and_equal_maps_give_exactly_zero():
    student, teacher, masks, _ = tensors((2, 3, 4, 5))
    student.requires_grad_()
    value = maskd(student, teacher, torch.zeros_like(masks))
    value.backward()
    assert value == 0 and (student.grad == 0).all()
    assert maskd(teacher, teacher.clone(), masks) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    student, teacher, masks, weights = (x.to(dtype) for x in tensors((2, 4, 5, 5)))
    tokens = torch.randn(TOKENS, 4).to(dtype)
    whole = [x.float() for x in (student, teacher, masks, weights)]
    for found, expected in (
        (maskd(student, teacher, masks, weights), maskd(*whole)),
        (receptive_masks(tokens, teacher), receptive_masks(tokens.float(), teacher.float())),
        (dice_overlap(masks), dice_overlap(masks.float())),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)


def test_receptive_masks():
    # The first token reads channel 1, the second token reads minus channel 2.
    tokens = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    features = torch.tensor([[[[0.0, math.log(3)]], [[0.0, 2 * math.log(3)]]]])
    expected = torch.tensor([[[[0.5, 0.75]], [[0.5, 0.75]]]])
    torch.testing.assert_close(receptive_masks(tokens, features), expected)
    tokens, features = torch.randn(TOKENS, 4), torch.randn(2, 4, 3, 5)
    found = receptive_masks(tokens, features)
    for n, t, i, j in np.ndindex(*found.shape):
        product = np.dot(*doubles(tokens[t], features[n, :, i, j]))
        np.testing.assert_allclose(found[n, t, i, j], expit(product), rtol=1e-5)


def test_dice_by_hand():
    # (1, 1) and (1, 0) give 2 · 1 / (2 + 1). Disjoint masks have an overlap of 0, equal ones 1.
    found = dice_overlap(torch.tensor([[[[1.0, 1.0]], [[1.0, 0.0]]]]))
    torch.testing.assert_close(found, torch.tensor(2 / 3))
    assert dice_overlap(torch.eye(2).view(1, 2, 1, 2)) == 0
    torch.testing.assert_close(dice_overlap(torch.full((2, 4, 3, 3), 0.3)), torch.tensor(1.0))


@pytest.mark.parametrize("shape", SHAPES)
def test_dice_equals_the_literal_form(shape):
    masks = tensors(shape)[2]
    np.testing.assert_allclose(dice_overlap(masks), literal_dice(*doubles(masks)), rtol=1e-5)


def test_gradients_of_stage_one():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn((2, 3), generator=generator, dtype=torch.float64, requires_grad=True)
    features = torch.randn((2, 3, 2, 2), generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda k, x: dice_overlap(receptive_masks(k, x)), (tokens, features.requires_grad_())
    )


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 1, 4, 4), (2, 3, 4, 4)])
def test_dice_without_pairs_and_of_zeros_is_a_connected_zero(shape):
    masks = torch.zeros(shape, requires_grad=True)
    value = dice_overlap(masks)
    value.backward()
    assert value == 0 and masks.grad.isfinite().all() and masks.grad.shape == shape


def test_wrong_shapes_are_refused():
    student, teacher, masks, weights = tensors((2, 3, 4, 5))
    for wrong, message in (
        ((student, teacher, masks[:, :, 1:]), r"masks \(2, 3, 3, 5\) do not fit maps \(2, 3, 4, 5"),
        ((student, teacher, masks, weights[:1]), r"weights \(1, 3\) do not fit masks \(2, 3, 4, 5"),
        ((student, teacher[:, 1:], masks), "differ in shape"),
    ):
        with pytest.raises(ValueError, match=message):
            maskd(*wrong)
    with pytest.raises(ValueError, match=r"tokens \(3, 4\) do not fit maps \(2, 3, 4, 5\)"):
        receptive_masks(torch.zeros(3, 4), student)

"""Structural distillation: means, deviations and covariance in a window around each cell."""

import math

import numpy as np
import pytest
import torch

from distill.losses import ssim
from tests.support.networks import distilled, image_dict, kd_losses, outspoken_model


def maps(shape, seed=0, dtype=torch.float32):
    return torch.randn((2, *shape), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def literal_ssim(student, teacher):
    batch, channels, height, width = student.shape
    rows, columns = np.ogrid[:height, :width]
    total = 0.0
    for n in range(batch):
        span = teacher[n].max() - teacher[n].min()
        c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
        for c, y, x in np.ndindex(channels, height, width):
            near = (abs(rows - y) <= 5) & (abs(columns - x) <= 5)
            weight = near * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * 1.5**2))
            weight = weight / weight.sum()
            s, t = student[n, c], teacher[n, c]
            mean_s, mean_t = (weight * s).sum(), (weight * t).sum()
            var_s, var_t = (weight * (s - mean_s) ** 2).sum(), (weight * (t - mean_t) ** 2).sum()
            covariance = (weight * (s - mean_s) * (t - mean_t)).sum()
            luminance = (2 * mean_s * mean_t + c1) / (mean_s**2 + mean_t**2 + c1)
            total += luminance * (2 * covariance + c2) / (var_s + var_t + c2)
    return 1 - total / student.size


def test_value_by_hand():
    # Single cells have no deviation. The range is 4, so that c₁ = 0.0016.
    student, teacher = torch.tensor([[[[1.0]], [[0.0]]]]), torch.tensor([[[[3.0]], [[-1.0]]]])
    expected = 1 - ((6 + 0.0016) / (10 + 0.0016) + 0.0016 / (1 + 0.0016)) / 2
    torch.testing.assert_close(ssim(student, teacher), torch.tensor(expected))


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 2, 3, 5), (1, 3, 1, 9), (1, 2, 13, 16)])
@pytest.mark.parametrize("shift, scale", [(0.0, 1.0), (50.0, 1.0), (0.0, 1000.0)])
def test_against_the_literal_form(shape, shift, scale):
    student, teacher = scale * maps(shape) + shift
    expected = literal_ssim(student.double().numpy(), teacher.double().numpy())
    np.testing.assert_allclose(ssim(student, teacher), expected, rtol=1e-4, atol=1e-6)


def test_equal_maps_have_no_loss_and_opposite_ones_nearly_two():
    x, _ = maps((2, 3, 8, 9))
    assert abs(ssim(x, x.clone())) < 1e-6
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1  # all means are near 0
    assert 1.8 < ssim(-board[None, None], board[None, None]) <= 2


def test_a_constant_teacher_is_finite():
    student, teacher = maps((1, 2, 4, 4))
    teacher = torch.full_like(teacher, 3.0)
    student.requires_grad_()
    loss = ssim(student, teacher)
    loss.backward()
    assert math.isfinite(loss.detach()) and student.grad.isfinite().all()


def test_gradient():
    student, teacher = maps((1, 2, 3, 4), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: ssim(s, teacher), student.requires_grad_())


def test_the_head_adapts_channels_and_learns():
    model = distilled("faster", ["SSIM"], teacher=outspoken_model("faster", seed=1, fpn=24))
    found = kd_losses(model, [image_dict(0)])
    assert set(found) == {f"loss_ssim/p{k}" for k in range(2, 7)}
    sum(found.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.heads["SSIM"].adapters.parameters())

"""Test frequency masks against the literal transforms of the papers."""

import numpy as np
import pytest
import torch

from distill.losses import fitnet, frequency_mask, frequency_masked_mse
from distill.losses.frequency import half_spectrum_weight
from tests.support.cases import for_each

SIZES = [(1, 1), (1, 2), (2, 1), (1, 5), (5, 1), (4, 4), (5, 8), (8, 5), (7, 7), (6, 9)]
every_size = pytest.mark.parametrize("height, width", SIZES)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def full_mask(half, width):
    """Return the full (H, W) mask from (H, W // 2 + 1), entry by entry: M[k] = M[-k]."""
    height = len(half)
    full = np.empty((height, width))
    for y in range(height):
        for x in range(width):
            full[y, x] = half[y, x] if x <= width // 2 else half[-y % height, width - x]
    return full


def filtered(x, half):
    """Return F⁻¹(M ⊙ F(x)) of one (H, W) map with the complex transforms."""
    return np.fft.ifft2(full_mask(half, x.shape[-1]) * np.fft.fft2(x))


@every_size
def test_mask_is_hermitian(height, width):
    for half in frequency_mask(8, height, width, 0.5, generator())[:, 0].numpy():
        full = full_mask(half, width)
        rows, columns = -np.arange(height) % height, -np.arange(width) % width
        np.testing.assert_array_equal(full, full[rows][:, columns])


@every_size
def test_half_spectrum_filter_equals_the_complex_one(height, width):
    mask = frequency_mask(6, height, width, 0.4, generator(1))
    x = torch.randn(6, 1, height, width, dtype=torch.float64)
    found = torch.fft.irfft2(mask * torch.fft.rfft2(x), s=(height, width))
    for n in range(6):
        expected = filtered(x[n, 0].numpy(), mask[n, 0].numpy())
        assert np.abs(expected.imag).max() < 1e-12
        np.testing.assert_allclose(found[n, 0], expected.real, atol=1e-12)


@every_size
@pytest.mark.parametrize("mask_ratio", [0.15, 0.7])
def test_expected_share_of_removed_frequencies(height, width, mask_ratio):
    batch = 4000
    halves = frequency_mask(batch, height, width, mask_ratio, generator())[:, 0]
    assert halves.shape == (batch, height, width // 2 + 1)
    assert set(halves.unique().tolist()) == {0, 1}
    removed = 1 - halves.mean(0).numpy()  # per frequency, also in the mirrored columns
    np.testing.assert_allclose(removed, mask_ratio, atol=5 * np.sqrt(0.25 / batch))


def test_mask_is_a_function_of_its_generator_alone():
    before = torch.get_rng_state()
    mask = frequency_mask(2, 8, 9, 0.5, generator(3))
    assert torch.equal(mask, frequency_mask(2, 8, 9, 0.5, generator(3)))
    assert not torch.equal(mask, frequency_mask(2, 8, 9, 0.5, generator(4)))
    assert not torch.equal(mask[0], mask[1])
    source = generator(3)
    frequency_mask(2, 8, 9, 0.5, source)
    assert not torch.equal(mask, frequency_mask(2, 8, 9, 0.5, source))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mask_ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratio_out_of_range(mask_ratio):
    with pytest.raises(ValueError, match=rf"mask_ratio must be in \[0, 1\), got {mask_ratio}"):
        frequency_mask(1, 4, 4, mask_ratio, generator())


@pytest.mark.parametrize(
    "width, weight", [(1, [1]), (2, [1, 1]), (5, [1, 2, 2]), (6, [1, 2, 2, 1])]
)
def test_half_spectrum_stands_for_the_full_one(width, weight):
    found = half_spectrum_weight(width, torch.device("cpu"))
    assert found.tolist() == weight
    assert found.sum() == width


def test_value_by_hand():
    # Without its alternating frequency, (3, 1) is (2, 2). The teacher has (1, 1).
    student, teacher = torch.tensor([[[[3.0, 1.0]]]]), torch.ones(1, 1, 1, 2)
    mask = torch.tensor([[[[1.0, 0.0]]]])
    torch.testing.assert_close(frequency_masked_mse(student, teacher, mask), torch.tensor(1.0))


@for_each("seed", range(20))
def test_parseval_form_equals_the_inverse_transform(seed):
    rng = np.random.default_rng(seed)
    height, width = SIZES[seed % len(SIZES)]
    batch, channels = 1 + seed % 3, 1 + seed % 2
    student, teacher = rng.normal(1, 2, (2, batch, channels, height, width))
    mask = frequency_mask(batch, height, width, 0.3, generator(seed))
    squares = [
        np.abs(filtered(student[n, c], mask[n, 0].numpy()) - teacher[n, c]) ** 2
        for n in range(batch)
        for c in range(channels)
    ]
    found = frequency_masked_mse(torch.from_numpy(student), torch.from_numpy(teacher), mask)
    np.testing.assert_allclose(found.item(), np.mean(squares), rtol=1e-10)


@every_size
def test_ratio_zero_is_plain_feature_distillation(height, width):
    student, teacher = torch.randn(2, 3, 2, height, width, dtype=torch.float64)
    mask = frequency_mask(3, height, width, 0.0, generator())
    assert (mask == 1).all()
    found = frequency_masked_mse(student, teacher, mask)
    torch.testing.assert_close(found, fitnet(student, teacher), rtol=1e-12, atol=0)


def test_equal_maps_give_the_removed_energy():
    x = torch.randn(1, 1, 5, 6, dtype=torch.float64, generator=generator())
    mask = frequency_mask(1, 5, 6, 0.5, generator(2))
    removed = x[0, 0].numpy() - filtered(x[0, 0].numpy(), mask[0, 0].numpy()).real
    found = frequency_masked_mse(x, x.clone(), mask).item()
    assert found > 0.1
    np.testing.assert_allclose(found, np.mean(removed**2), rtol=1e-10)


@pytest.mark.parametrize("height, width", [(3, 4), (4, 3), (1, 1)])
def test_gradient(height, width):
    student, teacher = torch.randn(2, 2, 2, height, width, dtype=torch.float64)
    mask = frequency_mask(2, height, width, 0.3, generator())
    assert torch.autograd.gradcheck(
        lambda s: frequency_masked_mse(s, teacher, mask), student.requires_grad_()
    )

"""Test multi-knowledge distillation: pooled maps, masked frequencies, aligned channels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import (
    channel_alignment,
    channel_normalized,
    fitnet,
    frequency_mask,
    frequency_masked_mse,
    mkd,
    multi_scale,
)
from tests.reference import literal
from tests.support.cases import for_each
from tests.support.processes import needs_loopback, spawn, starts_processes

SIZES = [(1, 1), (1, 2), (3, 1), (4, 4), (5, 8), (8, 5), (7, 9)]
every_seed = for_each("seed", range(21))
few_examples = settings(max_examples=30, deadline=None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def maps(seed, dtype=torch.float32, scale=1.0):
    """Return (student, teacher), (N, C, H, W) of every size."""
    shape = (1 + seed % 3, 1 + seed % 4, *SIZES[seed % len(SIZES)])
    return scale * torch.randn((2, *shape), generator=generator(seed), dtype=dtype)


def draw_mask(like, mask_ratio=0.3, seed=0):
    batch, _, height, width = like.shape
    return frequency_mask(batch, height, width, mask_ratio, generator(seed))


def doubles(*tensors):
    return [x.double().numpy() for x in tensors]


def gradient(value, x):
    (grad,) = torch.autograd.grad(value, x)
    return grad


def peaked_map(seed=0, channels=32, height=100, width=168, objects=12):
    """Return a map like a trained pyramid's finest level: weak noise, objects in some channels."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 0.4, (channels, height, width))
    rows, columns = np.ogrid[:height, :width]
    for _ in range(objects):
        y, z, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(2, 8)
        bump = np.exp(-((rows - y) ** 2 + (columns - z) ** 2) / (2 * radius**2))
        x += rng.normal(0, 4, (channels, 1, 1)) * (rng.random((channels, 1, 1)) < 0.5) * bump
    return torch.from_numpy(x[None]).float()


def test_multi_scale_by_hand():
    # Four rows of the gap (4, 0, 2, 2): windows of 2 have the mean 2, and so has the whole.
    teacher = torch.zeros(1, 1, 4, 4)
    student = torch.tensor([4.0, 0.0, 2.0, 2.0]).expand(1, 1, 4, 4)
    squares = {1: 4 * 24, 2: 4 * 2**2, 4: 2**2}
    for scales in ((1,), (2,), (4,), (1, 2, 4)):
        expected = sum(squares[k] for k in scales) / 16
        found = multi_scale(student, teacher, scales=scales)
        torch.testing.assert_close(found, torch.tensor(expected))
        expected = sum(math.sqrt(squares[k]) for k in scales) / 16
        found = multi_scale(student, teacher, scales=scales, power=1)
        torch.testing.assert_close(found, torch.tensor(expected))
    torch.testing.assert_close(multi_scale(student, teacher), torch.tensor(116 / 16))


@for_each("size", [(1, 1), (3, 5)])
def test_a_scale_above_the_map_is_dropped(size):
    student, teacher = torch.randn((2, 2, 3, *size), generator=generator())
    student.requires_grad_()
    nothing = multi_scale(student, teacher, scales=(4, 8))
    assert nothing == 0 and gradient(nothing, student).abs().sum() == 0
    dropped = multi_scale(student, teacher, scales=(1, 4))
    torch.testing.assert_close(dropped, multi_scale(student, teacher, scales=(1,)))


def test_a_distance_has_a_gradient_at_equal_maps():
    student = maps(4)[0].requires_grad_()
    found = multi_scale(student, student.detach(), scales=(1, 2), power=1)
    cells = student.shape[2] * student.shape[3]
    torch.testing.assert_close(found, torch.tensor(2 * 1e-3 / cells))
    assert gradient(found, student).abs().sum() == 0


@every_seed
@for_each("power", [1, 2])
def test_multi_scale_equals_the_literal_form(seed, power):
    student, teacher = maps(seed)
    scales = ((1, 2, 4), (2,), (3, 8))[seed % 3]
    found = multi_scale(student, teacher, scales, power)
    expected = literal.multi_scale(*doubles(student, teacher), scales, power)
    np.testing.assert_allclose(found.item(), expected, rtol=1e-5)


def test_at_scale_one_it_is_plain_feature_distillation():
    student, teacher = maps(4)
    torch.testing.assert_close(multi_scale(student, teacher, scales=(1,)), fitnet(student, teacher))


@for_each("attention", [False, True])
def test_channel_alignment_by_hand(attention):
    # (3/4, 1/4) against (1/2, 1/2). The attention is 1 at the first cell; the second cell is 0.
    student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([[[[math.log(3), 0.0]]]])
    expected = torch.tensor(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    torch.testing.assert_close(channel_alignment(student, teacher, attention=attention), expected)
    found = channel_alignment(student, 2 * teacher, 2.0, attention)
    torch.testing.assert_close(found, 4 * expected)


def test_attention_by_hand():
    # |x| = (5, 4) ln 2 and τ = 1/2: attention (4, 1) / 5 of both networks, A = (1, 1/4).
    teacher = math.log(2) * torch.tensor([[[[5.0, 4.0]]]])
    found = channel_alignment(
        -teacher, teacher
    )  # A x = ±(5, 1) ln 2: (16, 1)/17 against (1, 16)/17
    torch.testing.assert_close(found, torch.tensor(15 / 17 * math.log(16)))
    found = channel_alignment(-teacher, teacher, attention=False)  # (2, 1)/3 against (1, 2)/3
    torch.testing.assert_close(found, torch.tensor(math.log(2) / 3))


@every_seed
@for_each("attention", [False, True])
@for_each("temperature", [1.0, 0.5, 4.0])
def test_channel_alignment_equals_the_literal_form(seed, attention, temperature):
    student, teacher = maps(seed, scale=2.0)
    found = channel_alignment(student, teacher, temperature, attention)
    expected = literal.channel_alignment(*doubles(student, teacher), temperature, attention)
    np.testing.assert_allclose(found.item(), expected, rtol=1e-5, atol=1e-6)


def test_the_attention_is_a_constant_of_the_gradient():
    student, teacher = maps(4, torch.float64)
    attention = [literal.joint_attention(*pair) for pair in zip(*doubles(student, teacher))]
    fixed = torch.from_numpy(np.stack(attention))[:, None]
    student.requires_grad_()
    found = gradient(channel_alignment(student, teacher), student)
    plain = channel_alignment(fixed * student, fixed * teacher, attention=False)
    torch.testing.assert_close(found, gradient(plain, student))
    assert found.abs().max() > 1e-3


@for_each("seed", range(3))
def test_attention_leaves_more_than_a_hundredth_of_the_cells(seed):
    teacher = peaked_map(seed)
    student = torch.zeros_like(teacher).requires_grad_()
    a = literal.joint_attention(*doubles(student.detach()[0], teacher[0]))
    found = gradient(channel_alignment(student, teacher), student)

    # For a constant student the gradient is A ⊙ (1/HW - φ(G^T)) / C, from which φ follows.
    channels, height, width = teacher.shape[1:]
    phi = 1 / (height * width) - channels * found / torch.from_numpy(a).float()
    support = 1 / phi.flatten(2).square().sum(2)  # participation ratio, in cells
    assert support.median() > 0.01 * height * width
    assert support.mean() > 0.01 * height * width
    # With an attention of mean 1 the support would be one cell and the ratio at least 600.
    assert found.norm() < 50 * gradient(fitnet(student, teacher), student).norm()


@pytest.mark.parametrize("height, width", [(3, 4), (5, 3), (1, 1)])
@pytest.mark.parametrize(
    "loss",
    [
        multi_scale,
        lambda s, t: multi_scale(s, t, (1, 2), power=1),
        lambda s, t: channel_alignment(s, t, 1.0, attention=False),
        lambda s, t: channel_alignment(s, t, 2.0, attention=False),
    ],
)
def test_gradient(loss, height, width):
    student, teacher = torch.randn(
        (2, 2, 2, height, width), generator=generator(), dtype=torch.float64
    )
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


@few_examples
@given(st.integers(0, 20), st.integers(0, 2**31))
def test_symmetries(case, seed):
    student, teacher = maps(case, torch.float64)
    batch, channels, height, width = student.shape
    image, channel = (torch.randperm(n, generator=generator(seed)) for n in (batch, channels))
    cell = torch.randperm(height * width, generator=generator(seed))

    def shuffled(x):
        return x[image][:, channel]

    def scattered(x):
        return x.flatten(2)[..., cell].view_as(x)

    for loss in (multi_scale, channel_alignment):
        expected = loss(student, teacher)
        torch.testing.assert_close(loss(shuffled(student), shuffled(teacher)), expected)
        assert expected >= -1e-12
        assert loss(teacher, teacher.clone()).abs() < 1e-12
    # A softmax over cells depends neither on their order nor on a constant per channel.
    expected = channel_alignment(student, teacher)
    torch.testing.assert_close(channel_alignment(scattered(student), scattered(teacher)), expected)
    plain = channel_alignment(student, teacher, attention=False)
    moved = channel_alignment(student + 3, teacher - 2, attention=False)
    torch.testing.assert_close(moved, plain, rtol=1e-9, atol=1e-12)


@every_seed
def test_the_terms_are_the_losses_on_their_own(seed):
    student, teacher = maps(seed)
    mask = draw_mask(student, seed=seed)
    expected = {
        "fea": fitnet(student, teacher),
        "multiscale": multi_scale(student, teacher),
        "fdmd": frequency_masked_mse(student, teacher, mask),
        "fad": channel_alignment(student, teacher),
    }
    found = mkd(student, teacher, mask)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_options_and_terms_reach_the_losses():
    student, teacher = maps(6)
    mask = draw_mask(student)
    found = mkd(student, teacher, mask, ("multiscale",), scales=(3,))
    assert set(found) == {"multiscale"}
    torch.testing.assert_close(found["multiscale"], multi_scale(student, teacher, (3,)))
    found = mkd(student, teacher, mask, ("fad", "fea"), temperature=2.0, attention=False)
    assert set(found) == {"fad", "fea"}
    torch.testing.assert_close(found["fad"], channel_alignment(student, teacher, 2.0, False))
    found = mkd(student, teacher)  # without a mask no frequency is removed
    assert found["fdmd"] == found["fea"]


@pytest.mark.parametrize(
    "loss, options, message",
    [
        (multi_scale, {"scales": ()}, r"scales must be at least 1 each, got \(\)"),
        (multi_scale, {"scales": (1, 0)}, r"scales must be at least 1 each, got \(1, 0\)"),
        (multi_scale, {"power": 3}, "power must be 1 or 2, got 3"),
        (mkd, {"normalize": "batch"}, "normalize must be none or channel, got 'batch'"),
        (channel_alignment, {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_options_out_of_range(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(*maps(0), **options)


@every_seed
def test_masked_frequencies_equal_the_literal_form(seed):
    student, teacher = maps(seed)
    mask = draw_mask(student, seed=seed)
    expected = literal.frequency_masked_mse(*doubles(student, teacher, mask))
    np.testing.assert_allclose(
        mkd(student, teacher, mask)["fdmd"].item(), expected, rtol=1e-5, atol=1e-6
    )


@for_each("seed", range(7))
def test_without_removed_frequencies_fdmd_is_fea(seed):
    student, teacher = maps(seed, torch.float64)
    terms = mkd(student, teacher, draw_mask(student, mask_ratio=0.0))
    torch.testing.assert_close(terms["fdmd"], terms["fea"], rtol=1e-12, atol=0)


def test_at_equal_maps_fdmd_is_the_removed_energy_and_the_others_are_zero():
    x, _ = maps(4)
    mask = draw_mask(x, 0.5)
    terms = mkd(x, x.clone(), mask)
    removed = [x_n - literal.filtered(x_n, m[0]) for x_n, m in zip(*doubles(x, mask))]
    np.testing.assert_allclose(terms.pop("fdmd").item(), np.mean(np.square(removed)), rtol=1e-5)
    assert np.mean(np.square(removed)) > 0.1
    for name, value in terms.items():
        assert abs(value) < 1e-6, name


@pytest.mark.parametrize("name", ["fea", "multiscale", "fdmd"])
def test_gradient_of_each_term(name):
    student, teacher = torch.randn((2, 2, 2, 5, 4), generator=generator(), dtype=torch.float64)
    mask = draw_mask(student)
    assert torch.autograd.gradcheck(lambda s: mkd(s, teacher, mask)[name], student.requires_grad_())


def test_shared_work_does_not_change_gradients():
    student, teacher = maps(5, torch.float64)
    student.requires_grad_()
    mask = draw_mask(student)
    found = gradient(sum(mkd(student, teacher, mask).values()), student)
    expected = sum(
        gradient(value, student)
        for value in (
            fitnet(student, teacher),
            multi_scale(student, teacher),
            frequency_masked_mse(student, teacher, mask),
            channel_alignment(student, teacher),
        )
    )
    torch.testing.assert_close(found, expected)


# ---- Normalized channels.


def normalized(seed):
    """Maps with at least eight values per channel."""
    shape = (2, 1 + seed % 4, *((2, 2), (1, 4), (5, 8), (7, 9))[seed % 4])
    return torch.randn((2, *shape), generator=generator(seed))


@every_seed
def test_normalized_terms_are_those_of_normalized_maps(seed):
    student, teacher = normalized(seed)
    mask = draw_mask(student, seed=seed)
    options = {"attention": bool(seed % 2), "power": 1 + seed % 2}
    found = mkd(student, teacher, mask, normalize="channel", **options)
    pair = [torch.from_numpy(literal.channel_normalized(x)) for x in doubles(student, teacher)]
    expected = mkd(*pair, mask, **options)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-6, msg=name)


@every_seed
def test_the_size_of_the_values_does_not_matter(seed):
    student, teacher = normalized(seed)
    mask = draw_mask(student, seed=seed)
    found = mkd(300 * student, 300 * teacher, mask, normalize="channel")
    for name, value in mkd(student, teacher, mask, normalize="channel").items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


@for_each("shape", [(0, 3, 4, 4), (1, 3, 1, 1), (1, 3, 1, 7), (2, 3, 1, 3)])
@for_each("power", [1, 2])
def test_too_few_values_have_no_loss(shape, power):
    student, teacher = torch.randn((2, *shape), generator=generator())
    student.requires_grad_()
    found = mkd(student, teacher, draw_mask(student), power=power, normalize="channel")
    assert all(x == 0 for x in found.values()) and len(found) == 4
    assert gradient(sum(found.values()), student).abs().sum() == 0


def test_a_channel_of_one_value_is_0():
    student, teacher = normalized(3)
    student[:, 0] = 5.0
    (x, _), enough = channel_normalized(student, teacher)
    assert enough == 1 and torch.equal(x[:, 0], torch.zeros_like(x[:, 0]))


def test_gradient_of_normalized_terms():
    student, teacher = torch.randn((2, 2, 2, 3, 4), generator=generator(), dtype=torch.float64)
    mask = draw_mask(student)

    def terms(s):
        return tuple(mkd(s, teacher, mask, attention=False, normalize="channel").values())

    assert torch.autograd.gradcheck(terms, student.requires_grad_())


@for_each("dtype", [torch.float16, torch.bfloat16])
def test_normalized_maps_of_half_precision(dtype):
    """Sums of squares of large values do not overflow."""
    student, teacher = 1000 * torch.randn((2, 1, 2, 40, 40), generator=generator())
    halves = student.to(dtype), teacher.to(dtype)
    found = mkd(*halves, draw_mask(student), normalize="channel")
    expected = mkd(*(x.float() for x in halves), draw_mask(student), normalize="channel")
    assert all(torch.equal(found[name], expected[name]) and found[name] > 0 for name in found)


def write_normalized(rank, folder):
    """Write this process' part of the normalized maps, and the gradient of their cubes' sum."""
    student, teacher = torch.load(folder / "maps.pth")
    own = slice(0, 2) if rank == 0 else slice(2, 3)
    leaf = student[own].clone().requires_grad_()
    (x, y), enough = channel_normalized(leaf, teacher[own])
    x.pow(3).sum().backward()
    torch.save((x.detach(), y, enough, leaf.grad), folder / f"{rank}.pth")


@starts_processes
@needs_loopback
def test_two_processes_normalize_together(tmp_path):
    """Each has another number of images; values and gradients are those of the joint batch."""
    student, teacher = torch.randn((2, 3, 2, 1, 3), generator=generator())
    torch.save((student, teacher), tmp_path / "maps.pth")
    spawn(write_normalized, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pth") for rank in range(2)]
    student.requires_grad_()
    (x, y), _ = channel_normalized(student, teacher)
    x.pow(3).sum().backward()
    for index, expected in ((0, x), (1, y), (3, student.grad)):
        torch.testing.assert_close(torch.cat([part[index] for part in parts]), expected)
    assert all(part[2] == 1 for part in parts)  # 9 values, though the second has 3

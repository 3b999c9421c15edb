"""Test instance mask alignment against the literal form of the paper.

The package computes the loss from moments and spectra. The reference below transforms back,
standardizes, scales and subtracts, instance by instance.
"""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from distill.losses import fitnet, frequency_mask, frequency_masked_mse, ima, ima_classes
from tests.reference import literal
from tests.support.cases import for_each

EPS = 1e-5
SIZES = [(1, 1), (1, 2), (2, 1), (1, 5), (4, 4), (5, 8), (8, 5), (7, 7), (6, 3)]
OPTIONS: list[dict[str, Any]] = [
    {"standardize": a, "standardize_teacher": b, "deflate": c, "scale_on": d}
    for a, b, c, d in product(*[(True, False)] * 3, ("standardized", "raw"))
]
every_option = for_each("options", OPTIONS)
# The many have all of SIZES.
few_and_many_seeds = pytest.mark.parametrize(
    "seeds", [range(4), pytest.param(range(4, 13), marks=pytest.mark.slow)], ids=["few", "many"]
)
PLAIN: dict[str, Any] = {"standardize": False, "deflate": False}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_mask(like, mask_ratio=0.3, seed=0):
    batch, _, height, width = like.shape
    return frequency_mask(batch, height, width, mask_ratio, generator(seed))


def gradient(value, x):
    (grad,) = torch.autograd.grad(value, x)
    return grad


def literal_ima(
    student,
    teacher,
    mask=None,
    standardize=True,
    standardize_teacher=True,
    deflate=True,
    scale_on="standardized",
    scale_floor=0.1,
    weight=None,
    scales=None,
):
    """Return (loss, scales): Eq. 1-10 in NumPy; a whole-number ``weight`` repeats the cells.

    ``scales`` replaces the computed α.
    """
    losses, used = [], []
    for n, (s, t) in enumerate(zip(student, teacher)):
        if mask is not None:
            s = literal.filtered(s, mask[n, 0])
        s, t = s.reshape(len(s), -1), t.reshape(len(t), -1)
        if weight is not None and weight[n].any():
            times = weight[n].astype(int).ravel()
            s, t = np.repeat(s, times, axis=1), np.repeat(t, times, axis=1)
        raw = s, t
        if standardize:
            s = literal.standardized(s)
            t = literal.standardized(t) if standardize_teacher else t
        scale = 1.0
        if deflate:
            cosine = literal.cosine_similarity(*(raw if scale_on == "raw" else (s, t)))
            scale = scale_floor + (1 - scale_floor) * np.clip(cosine, 0, 1)
        scale = scale if scales is None else scales[n]
        losses.append(np.mean((scale * s - t) ** 2))
        used.append(scale)
    return np.mean(losses), used


def maps(seed, kind="ordinary"):
    """Return (student, teacher), (N, C, H, W) float64 arrays with cosines of both signs."""
    rng = np.random.default_rng(seed)
    shape = (2 + seed % 2, 1 + seed % 3, *SIZES[seed % len(SIZES)])
    student, teacher = rng.normal(0, 1, (2, *shape))
    teacher = teacher + np.array([1.5, -1.5, 0.5])[: len(teacher), None, None, None] * student
    if kind == "dead channels":
        student[:, 0], teacher[:, -1] = 0.0, 3.0
    elif kind == "tiny scale":
        student, teacher = 1e-4 * student, 1e-4 * teacher
    elif kind == "large mean":
        student, teacher = 100 + 0.05 * student, 100 + 0.05 * teacher
    return student, teacher


def weights(seed, student):
    """Return whole-number weights; those of the last instance are 0."""
    shape = (len(student), 1, *student.shape[-2:])
    weight = np.random.default_rng(seed).integers(0, 3, shape).astype(float)
    weight[-1] = 0
    return weight


def both(student, teacher, masked, weighted, seed, dtype=torch.float64, **options):
    """Return the package's value and the literal one."""
    s, t = torch.from_numpy(student).to(dtype), torch.from_numpy(teacher).to(dtype)
    mask = weight = None
    if masked:
        mask = draw_mask(s, seed=seed)
    if weighted:
        weight = torch.from_numpy(weights(seed, student))
    found = ima(s, t, mask, weight=weight, **options).item()
    expected, _ = literal_ima(
        s.double().numpy(),  # rounded like the package's input
        t.double().numpy(),
        None if mask is None else mask.numpy(),
        weight=None if weight is None else weight.numpy(),
        **options,
    )
    return found, expected


@few_and_many_seeds
@every_option
@for_each("masked, weighted", list(product([False, True], repeat=2)))
@for_each("kind", ["ordinary", "dead channels", "tiny scale", "large mean"])
def test_equals_the_literal_form(seeds, options, masked, weighted, kind):
    for seed in seeds:
        floor = (0.0, 0.1, 0.5, 1.0)[seed % 4]
        student, teacher = maps(seed, kind)
        found, expected = both(
            student, teacher, masked, weighted, seed, scale_floor=floor, **options
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12, err_msg=f"seed {seed}")


@every_option
@for_each("masked, weighted", list(product([False, True], repeat=2)))
@for_each("kind", ["ordinary", "dead channels", "tiny scale", "large mean"])
def test_float32_is_as_good_as_its_input(options, masked, weighted, kind):
    for seed in (4, 5, 6):
        student, teacher = maps(seed, kind)
        found, expected = both(
            student, teacher, masked, weighted, seed, dtype=torch.float32, **options
        )
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-12, err_msg=f"seed {seed}")


def test_value_by_hand():
    # Both maps standardize to ±1 (up to ε). Their cosine is -1, so that α = f = 0.1.
    student, teacher = torch.tensor([[[[3.0, 1.0]]]]), torch.tensor([[[[-1.0, 1.0]]]])
    torch.testing.assert_close(ima(student, teacher), torch.tensor(1.1**2 / (1 + EPS)))
    torch.testing.assert_close(ima(student, teacher, scale_floor=0.0), torch.tensor(1 / (1 + EPS)))
    torch.testing.assert_close(ima(student, teacher, deflate=False), torch.tensor(4 / (1 + EPS)))
    # The raw cosine is (-3 + 1) / √20 < 0 as well. The plain loss is ((3 + 1)² + 0²) / 2.
    torch.testing.assert_close(
        ima(student, teacher, standardize=False, scale_floor=0.0), torch.tensor(1.0)
    )
    torch.testing.assert_close(ima(student, teacher, **PLAIN), torch.tensor(8.0))


def test_deflation_by_hand():
    # The raw cosine of (1, 0) and (1, 1) is 1/√2. The mean is over (α - 1)² and 1.
    student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.ones(1, 1, 1, 2)
    alpha = 0.2 + 0.8 / 2**0.5
    found = ima(student, teacher, standardize=False, scale_floor=0.2)
    torch.testing.assert_close(found, torch.tensor(((alpha - 1) ** 2 + 1) / 2))


@for_each("seed", range(5))
def test_with_all_parts_off_it_is_plain_feature_distillation(seed):
    student, teacher = map(torch.from_numpy, maps(seed))
    torch.testing.assert_close(ima(student, teacher, **PLAIN), fitnet(student, teacher))
    mask = draw_mask(student, seed=seed)
    torch.testing.assert_close(
        ima(student, teacher, mask, **PLAIN), frequency_masked_mse(student, teacher, mask)
    )


@every_option
def test_equal_maps_give_zero(options):
    if options["standardize"] and not options["standardize_teacher"]:
        options = {**options, "standardize_teacher": True}  # else other targets by design
    x = torch.randn(3, 2, 5, 6, generator=generator())
    assert ima(x, x.clone(), **options).abs() < 1e-6
    assert ima(x, x.clone(), weight=torch.rand(3, 1, 5, 6), **options).abs() < 1e-6


def test_standardization_forgets_the_students_scale_and_mean():
    student, teacher = torch.randn(2, 3, 4, 6, 6, generator=generator(), dtype=torch.float64)
    moved = 7 * student + torch.arange(4)[:, None, None]
    torch.testing.assert_close(ima(moved, teacher), ima(student, teacher), rtol=1e-4, atol=0)


def test_a_mask_of_ones_is_no_mask():
    student, teacher = torch.randn(2, 2, 3, 5, 4, generator=generator(), dtype=torch.float64)
    for options in OPTIONS:
        torch.testing.assert_close(
            ima(student, teacher, torch.ones(2, 1, 5, 3), **options),
            ima(student, teacher, **options),
        )


def test_weight_counts_relative_to_its_sum():
    student, teacher = torch.randn(2, 2, 3, 5, 4, generator=generator(), dtype=torch.float64)
    weight = torch.rand(2, 1, 5, 4, generator=generator())
    torch.testing.assert_close(
        ima(student, teacher, weight=3.7 * weight), ima(student, teacher, weight=weight)
    )


def test_cells_without_weight_do_not_count():
    student, teacher = torch.randn(2, 2, 3, 4, 4, generator=generator())
    weight = torch.ones(2, 1, 4, 4)
    weight[..., 2:] = 0
    other = student.clone()
    other[..., 2:] = 50.0
    other.requires_grad_()
    value = ima(other, teacher, weight=weight)
    torch.testing.assert_close(value, ima(student, teacher, weight=weight))
    torch.testing.assert_close(value, ima(student[..., :2], teacher[..., :2]))
    on_students = gradient(value, other)
    assert (on_students[..., 2:] == 0).all()
    assert (on_students[..., :2] != 0).any()


def test_an_instance_without_weight_is_a_full_rectangle():
    student, teacher = torch.randn(2, 2, 3, 4, 5, generator=generator())
    found = ima(student, teacher, weight=torch.zeros(2, 1, 4, 5))
    torch.testing.assert_close(found, ima(student, teacher))


def test_instances_count_alike():
    student, teacher = torch.randn(2, 3, 2, 4, 4, generator=generator())
    single = [ima(student[n : n + 1], teacher[n : n + 1]) for n in range(3)]
    torch.testing.assert_close(ima(student, teacher), sum(single) / 3)


@for_each("masked, weighted", list(product([False, True], repeat=2)))
@pytest.mark.parametrize("options", [{"deflate": False}, {"scale_floor": 1.0}, PLAIN])
@for_each("standardize_teacher", [True, False])
def test_gradient(masked, weighted, options, standardize_teacher):
    student, teacher = torch.randn(2, 2, 2, 3, 4, generator=generator(), dtype=torch.float64)
    mask = draw_mask(student) if masked else None
    weight = torch.rand(2, 1, 3, 4, generator=generator()).double() if weighted else None
    assert torch.autograd.gradcheck(
        lambda s: ima(
            s, teacher, mask, weight=weight, standardize_teacher=standardize_teacher, **options
        ),
        student.requires_grad_(),
    )


@pytest.mark.parametrize("scale_on", ["standardized", "raw"])
@pytest.mark.parametrize("standardize", [True, False])
@for_each("masked, weighted", list(product([False, True], repeat=2)))
def test_no_gradient_flows_through_the_scale(scale_on, standardize, masked, weighted):
    student, teacher = maps(4)  # 2 instances of 2 channels, 4x4
    mask = draw_mask(student) if masked else None
    weight = torch.from_numpy(weights(4, student)) if weighted else None
    options: dict[str, Any] = {"scale_on": scale_on, "standardize": standardize}
    x = torch.from_numpy(student).requires_grad_()
    found = gradient(ima(x, torch.from_numpy(teacher), mask, weight=weight, **options), x)

    options["mask"], options["weight"] = (v.numpy() if v is not None else v for v in (mask, weight))
    _, scales = literal_ima(student, teacher, **options)
    assert any(0.1 < a < 1 for a in scales)  # otherwise the clamp, not the detach, is tested
    expected, step = np.zeros_like(student), 1e-6
    for index in np.ndindex(student.shape):
        sides = []
        for sign in (1, -1):
            moved = student.copy()
            moved[index] += sign * step
            sides.append(literal_ima(moved, teacher, scales=scales, **options)[0])
        expected[index] = (sides[0] - sides[1]) / (2 * step)
    np.testing.assert_allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize("scale_on", ["standardized", "raw"])
@for_each("masked", [False, True])
def test_gradient_at_negative_cosine(scale_on, masked):
    student = torch.randn(2, 3, 4, 4, generator=generator())
    teacher = -student.clone()
    mask = draw_mask(student, 0.15) if masked else None

    def largest(**options):
        x = student.clone().requires_grad_()
        return gradient(ima(x, teacher, mask, scale_on=scale_on, **options), x).abs().max()

    assert largest(standardize=False) > 1e-3
    assert largest(standardize=False, scale_floor=0.0) == 0
    # Opposite standardized maps are a stationary point for every scale: move slightly away.
    student = student + 0.5 * torch.randn(2, 3, 4, 4, generator=generator(1))
    assert largest() > 1e-3
    assert largest(scale_floor=0.0) == 0


def test_gradient_is_finite_on_dead_channels():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 4, generator=generator())
    found = gradient(ima(student, teacher), student)
    assert found.isfinite().all() and found.abs().max() > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale_on": "cosine"}, "scale_on must be 'standardized' or 'raw', got 'cosine'"),
        ({"scale_floor": 1.5}, r"scale_floor must be in \[0, 1\], got 1.5"),
        ({"scale_floor": -0.1}, r"scale_floor must be in \[0, 1\], got -0.1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ima(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), **options)


@every_option
@for_each("weighted", [False, True])
def test_no_instance_is_a_connected_zero(options, weighted):
    student = torch.zeros(0, 3, 14, 14, requires_grad=True)
    mask = draw_mask(student)
    weight = torch.zeros(0, 1, 14, 14) if weighted else None
    value = ima(student, torch.zeros(0, 3, 14, 14), mask, weight=weight, **options)
    value.backward()
    assert value == 0
    assert student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_mask_and_weight_enters_as_float32(dtype):
    student, teacher = torch.randn(2, 2, 3, 5, 6, generator=generator()).to(dtype)
    mask = draw_mask(student)
    weight = torch.rand(2, 1, 5, 6, generator=generator()).to(dtype)
    for w in (None, weight):
        found = ima(student, teacher, mask, weight=w)
        assert found.dtype == torch.float32
        expected = ima(
            student.float(), teacher.float(), mask, weight=None if w is None else w.float()
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Scope "class": an instance is the set of cells of one class in one image.

NUM_CLASSES = 3


every_class_option = for_each(
    "options", [{**x, "statistics": y} for x in OPTIONS for y in ("instance", "image")]
)


def draw_labels(seed, student, ignored=(255, -1, NUM_CLASSES)):
    """Draw (N, H, W) labels: some cells are ignored and the last image lacks a class."""
    shape = (len(student), *student.shape[-2:])
    labels = np.random.default_rng(seed).choice([*range(NUM_CLASSES), *ignored], shape)
    labels[-1][labels[-1] == 1] = 0
    return labels


def both_classes(student, teacher, masked, seed, dtype=torch.float64, **options):
    """Return the package's (sum, count) and the literal ones."""
    s, t = torch.from_numpy(student).to(dtype), torch.from_numpy(teacher).to(dtype)
    mask = draw_mask(s, seed=seed) if masked else None
    labels = draw_labels(seed, student)
    total, count = ima_classes(s, t, torch.from_numpy(labels), NUM_CLASSES, mask, **options)
    expected, scales = literal.ima_classes(
        s.double().numpy(),
        t.double().numpy(),
        labels,
        NUM_CLASSES,
        None if mask is None else mask.numpy(),
        **options,
    )
    return (total.item(), float(count)), (expected, len(scales))


@few_and_many_seeds
@every_class_option
@for_each("masked", [False, True])
@for_each("kind", ["ordinary", "dead channels", "tiny scale", "large mean"])
def test_classes_equal_the_literal_form(seeds, options, masked, kind):
    for seed in seeds:
        floor = (0.0, 0.1, 0.5, 1.0)[seed % 4]
        student, teacher = maps(seed, kind)
        found, expected = both_classes(student, teacher, masked, seed, scale_floor=floor, **options)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12, err_msg=f"seed {seed}")


@few_and_many_seeds
@every_class_option
@for_each("masked", [False, True])
@for_each("kind, tolerance", [("ordinary", 1e-5), ("dead channels", 1e-5), ("large mean", 5e-3)])
def test_classes_in_float32_are_as_good_as_their_input(seeds, options, masked, kind, tolerance):
    if options["statistics"] == "image":  # the mean of the classes' means is rounded once more
        tolerance = max(tolerance, 1e-4)
    for seed in seeds:
        student, teacher = maps(seed, kind)
        found, expected = both_classes(
            student, teacher, masked, seed, dtype=torch.float32, **options
        )
        np.testing.assert_allclose(
            found, expected, rtol=tolerance, atol=1e-5, err_msg=f"seed {seed}"
        )


def test_classes_by_hand():
    # Class 0 has (3, 1) against (-1, 1): standardized cosine -1, α = 0.1. Class 1 has a single
    # cell, which standardizes to 0. Class 2 has (5, 7) against (0, 1): cosine 1. One cell is
    # ignored.
    student = torch.tensor([[[[3.0, 1.0, 9.0], [5.0, 7.0, 2.0]]]])
    teacher = torch.tensor([[[[-1.0, 1.0, 4.0], [0.0, 1.0, 8.0]]]])
    labels = torch.tensor([[[0, 0, 1], [2, 2, 255]]])
    total, count = ima_classes(student, teacher, labels, 3)
    torch.testing.assert_close(total, torch.tensor(1.1**2), rtol=1e-4, atol=0)
    assert count == 3
    # Plain losses are means over their own cells: ((3 + 1)² + 0) / 2, (9 - 4)², (5² + 6²) / 2.
    total, count = ima_classes(student, teacher, labels, 3, **PLAIN)
    torch.testing.assert_close(total, torch.tensor(8.0 + 25 + 30.5))
    assert count == 3


def test_statistics_of_the_image_keep_the_means_of_classes_apart():
    """The student has all classes at one mean; otherwise it is the teacher."""
    teacher = torch.tensor([[[[-5.0, -3.0, 3.0, 5.0]]]])
    student = torch.tensor([[[[-1.0, 1.0, -1.0, 1.0]]]])
    labels = torch.tensor([[[0, 0, 1, 1]]])
    options = {"deflate": False}
    apart, _ = ima_classes(student, teacher, labels, 2, **options)
    assert apart < 1e-6
    found, count = ima_classes(student, teacher, labels, 2, **options, statistics="image")
    # The image's deviations are 1 and √17: gaps of −1 + 5/√17, 1 + 3/√17, and their opposites.
    gaps = [-1 + 5 / 17**0.5, 1 + 3 / 17**0.5]
    expected = sum(x**2 for x in gaps)  # two classes of the mean of two cells
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=0)
    assert count == 2


def test_statistics_of_something_else_are_refused():
    with pytest.raises(ValueError, match="statistics must be 'instance' or 'image', got 'batch'"):
        x = torch.zeros(1, 1, 2, 2)
        ima_classes(x, x, torch.zeros(1, 2, 2).long(), 1, statistics="batch")


@every_option
def test_one_class_in_every_cell_is_the_scope_image(options):
    student, teacher = map(torch.from_numpy, maps(4))
    batch, _, height, width = student.shape
    labels = torch.arange(batch)[:, None, None].expand(batch, height, width)
    for mask in (None, draw_mask(student)):
        total, count = ima_classes(student, teacher, labels, batch, mask, **options)
        torch.testing.assert_close(total / count, ima(student, teacher, mask, **options))
        assert count == batch


@every_option
def test_a_class_is_a_map_weighted_by_its_cells(options):
    student, teacher = map(torch.from_numpy, maps(8))  # 6x3
    labels = torch.from_numpy(draw_labels(8, student))
    total, count = ima_classes(student, teacher, labels, NUM_CLASSES, **options)
    present = [
        (n, k) for n, k in product(range(len(labels)), range(NUM_CLASSES)) if (labels[n] == k).any()
    ]
    single = [
        ima(student[[n]], teacher[[n]], weight=(labels[[n], None] == k).double(), **options)
        for n, k in present
    ]
    torch.testing.assert_close(total, sum(single))
    assert count == len(present)


@pytest.mark.parametrize("ignored", [255, -1, NUM_CLASSES, 2**40])
def test_without_a_class_it_is_a_connected_zero(ignored):
    student, teacher = torch.randn(2, 2, 3, 4, 5, generator=generator())
    labels = torch.full((2, 4, 5), ignored)
    for mask in (None, draw_mask(student)):
        x = student.clone().requires_grad_()
        total, count = ima_classes(x, teacher, labels, NUM_CLASSES, mask)
        assert (total, count) == (0, 0)
        assert (gradient(total, x) == 0).all()


def test_labels_of_another_size_are_refused():
    student = torch.zeros(2, 3, 4, 5)
    message = r"labels \(2, 5, 4\) do not fit maps \(2, 3, 4, 5\): they must be \(N, H, W\)"
    with pytest.raises(ValueError, match=message):
        ima_classes(student, student, torch.zeros(2, 5, 4, dtype=torch.long), NUM_CLASSES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_classes_in_half_precision_enter_as_float32(dtype):
    student, teacher = torch.randn(2, 2, 3, 5, 6, generator=generator()).to(dtype)
    labels, mask = torch.from_numpy(draw_labels(0, student)), draw_mask(student)
    expected = ima_classes(student.float(), teacher.float(), labels, NUM_CLASSES, mask)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = ima_classes(student, teacher, labels, NUM_CLASSES, mask)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_ignored_cells_do_not_count():
    student, teacher = torch.randn(2, 2, 3, 4, 5, generator=generator())
    labels = torch.from_numpy(draw_labels(0, student))
    used = (labels >= 0) & (labels < NUM_CLASSES)
    other = torch.where(used[:, None], student, 50.0).requires_grad_()
    total, _ = ima_classes(other, teacher, labels, NUM_CLASSES)
    expected, _ = ima_classes(student, teacher, labels, NUM_CLASSES)
    torch.testing.assert_close(total, expected)
    found = gradient(total, other)
    assert (found * ~used[:, None] == 0).all() and found.any()


def test_the_names_of_classes_do_not_matter():
    student, teacher = map(torch.from_numpy, maps(7))
    labels = torch.from_numpy(draw_labels(7, student))
    expected = ima_classes(student, teacher, labels, NUM_CLASSES)
    renamed = torch.where((labels >= 0) & (labels < NUM_CLASSES), 18 - 5 * labels, 19)
    torch.testing.assert_close(ima_classes(student, teacher, renamed, 19), expected)


@for_each("masked", [False, True])
@pytest.mark.parametrize("options", [{"deflate": False}, {"scale_floor": 1.0}, PLAIN])
@for_each("standardize_teacher", [True, False])
def test_gradient_of_classes(masked, options, standardize_teacher):
    student, teacher = torch.randn(2, 2, 2, 3, 4, generator=generator(), dtype=torch.float64)
    mask = draw_mask(student) if masked else None
    labels = torch.from_numpy(draw_labels(0, student))
    assert torch.autograd.gradcheck(
        lambda s: ima_classes(
            *(s, teacher, labels, NUM_CLASSES, mask),
            standardize_teacher=standardize_teacher,
            **options,
        )[0],
        student.requires_grad_(),
    )


@pytest.mark.parametrize("scale_on", ["standardized", "raw"])
@for_each("masked", [False, True])
def test_no_gradient_flows_through_the_scale_of_a_class(scale_on, masked):
    student, teacher = maps(4)  # 2 instances of 2 channels, 4x4
    labels = draw_labels(4, student)
    mask = draw_mask(student) if masked else None
    x = torch.from_numpy(student).requires_grad_()
    total, _ = ima_classes(
        x, torch.from_numpy(teacher), torch.from_numpy(labels), 3, mask, scale_on=scale_on
    )
    found = gradient(total, x)

    arguments = teacher, labels, 3, None if mask is None else mask.numpy()
    _, scales = literal.ima_classes(student, *arguments, scale_on=scale_on)
    assert any(0.1 < a < 1 for a in scales)  # otherwise the clamp, not the detach, is tested
    expected, step = np.zeros_like(student), 1e-6
    for index in np.ndindex(student.shape):
        sides = []
        for sign in (1, -1):
            moved = student.copy()
            moved[index] += sign * step
            sides.append(literal.ima_classes(moved, *arguments, scales=scales)[0])
        expected[index] = (sides[0] - sides[1]) / (2 * step)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("scale_on", ["standardized", "raw"])
def test_gradient_of_a_class_at_negative_cosine(scale_on):
    student = torch.randn(2, 3, 6, 6, generator=generator())
    teacher = -student + 0.5 * torch.randn(2, 3, 6, 6, generator=generator(1))
    labels = torch.arange(36).view(1, 6, 6).expand(2, 6, 6) % 3

    def largest(**options):
        x = student.clone().requires_grad_()
        total, _ = ima_classes(x, teacher, labels, 3, scale_on=scale_on, **options)
        return gradient(total, x).abs().max()

    assert largest() > 1e-3
    assert largest(scale_floor=0.0) == 0


def test_gradient_of_classes_is_finite_on_dead_channels():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 4, generator=generator())
    labels = torch.from_numpy(draw_labels(0, teacher))
    total, _ = ima_classes(student, teacher, labels, NUM_CLASSES)
    found = gradient(total, student)
    assert found.isfinite().all() and found.abs().max() > 0

"""Test the losses of the comparison methods against independent references."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from distill import losses
from tests.reference import literal_methods as literal
from tests.support.cases import for_each

Array = Any
SIZES = [(1, 1), (1, 2), (3, 1), (4, 4), (5, 7), (8, 5), (2, 9)]
CASES = range(24)
STRIDE = 8


class Case:
    """Random maps, boxes and rows of one seed; some are empty, of odd size or tiny."""

    def __init__(self, seed: int):
        self.rng = rng = np.random.default_rng(seed)
        self.batch, self.channels = 1 + seed % 3, 1 + seed % 4
        self.height, self.width = SIZES[seed % len(SIZES)]
        shape = (self.batch, self.channels, self.height, self.width)
        self.student, self.teacher = rng.normal(0.5, 2, (2, *shape))
        self.cells = rng.random((self.batch, self.height, self.width))
        self.padded_size = (self.height * STRIDE, self.width * STRIDE)
        numbers = [(0, 1, 3, 7)[(seed + k) % 4] for k in range(self.batch)]
        self.boxes = [self.some_boxes(n) for n in numbers]
        self.rows = seed % 5
        self.classes = 1 + seed % 6

    def some_boxes(self, number: int) -> Array:
        """Draw boxes: a third of them reaches outside the image, one is exactly a cell."""
        first = self.rng.uniform(-20, 60, (number, 2))
        boxes = np.concatenate([first, first + self.rng.uniform(0.5, 70, (number, 2))], 1)
        boxes[:1] = [8, 8, 16, 16]
        return boxes

    def logits(self, *shape: int) -> tuple[Array, Array]:
        both = self.rng.normal(0, 3, (2, *shape))
        return both[0], both[1]


def tensors(x: Any) -> Any:
    """Convert arrays to float64 tensors, also inside lists and tuples."""
    if isinstance(x, list):
        return [tensors(y) for y in x]
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def agree(name: str, *args: Any, ours: str = "") -> None:
    """Check that a function of the package equals its reference."""
    expected = getattr(literal, name)(*args)
    found = getattr(losses, ours or name)(*map(tensors, args))
    for a, b in zip(found, expected) if isinstance(expected, tuple) else [(found, expected)]:
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-6, atol=1e-9)


@for_each("seed", CASES)
@pytest.mark.parametrize("name", ["fitnet", "pkd"])
def test_maps(name: str, seed: int) -> None:
    case = Case(seed)
    agree(name, case.student, case.teacher)


@for_each("seed", CASES)
def test_cwd(seed: int) -> None:
    case = Case(seed)
    agree("cwd", case.student, case.teacher, 0.5 + seed % 4)


@for_each("seed", CASES)
def test_fgd(seed: int) -> None:
    case = Case(seed)
    agree("fgd", case.student, case.teacher, case.boxes, case.padded_size, (0.5, 0.8)[seed % 2])


@for_each("seed", CASES)
def test_mgd(seed: int) -> None:
    case = Case(seed)
    keep = (case.cells > 0.5)[:, None].astype(float)
    agree("mgd", case.student, case.teacher, lambda x: 2 * x - 1, keep)


@for_each("seed", CASES)
@pytest.mark.parametrize("name", ["fgfi", "defeat", "frs"])
def test_weighted_maps(name: str, seed: int) -> None:
    case = Case(seed)
    mask = case.cells if name == "frs" else (case.cells > (0.6, 1)[seed % 6 == 0]).astype(float)
    agree(name, case.student, case.teacher, mask)


@for_each("seed", CASES)
def test_frs_classes(seed: int) -> None:
    case = Case(seed)
    agree("frs_classes", *case.logits(case.batch, 4, case.height, case.width), case.cells)


@for_each("seed", CASES)
def test_fgfi_mask(seed: int) -> None:
    case = Case(seed)
    anchors = case.some_boxes(case.height * case.width * 3).reshape(case.height, case.width, 3, 4)
    boxes = case.some_boxes((0, 1, 9)[seed % 3])
    boxes[-1:] += 500 * (seed % 2)  # no anchor overlaps it
    agree("fgfi_mask", anchors, boxes, 0.5)


@for_each("seed", CASES)
def test_defeat_masks(seed: int) -> None:
    case = Case(seed)
    boxes = [x * 4 for x in case.boxes]  # up to 360 pixels: they belong to three levels
    sizes = [(13, 21), (7, 11), (4, 6)]
    found = losses.defeat_masks(tensors(boxes), sizes, (4, 8, 16))
    for level, (masks, size) in enumerate(zip(found, sizes)):
        for mask, own in zip(masks, boxes):
            expected = literal.defeat_mask(own, *size, 4 * 2**level, level, 3)
            np.testing.assert_array_equal(mask.numpy(), expected)


@for_each("seed", CASES)
def test_rows(seed: int) -> None:
    case = Case(seed)
    rows = max(case.rows, 1)
    student, teacher = case.logits(rows, case.classes)
    agree("kd", student, teacher, 1.0 + seed % 3)
    target = case.rng.integers(0, case.classes, rows)
    agree("dkd", student, teacher, target, 1.0, 0.25, 1.0 + seed % 3)
    agree("gid_relation", *case.logits(case.rows, 7))


@for_each("seed", CASES)
def test_distributions(seed: int) -> None:
    case = Case(seed)
    weight = case.rng.random(case.rows)
    agree("ld", *case.logits(case.rows, 17), weight, 10.0)
    agree("crosskd_bins", *case.logits(case.rows, 4, 17), weight)
    agree("crosskd_classes", *case.logits(case.rows, case.classes), 3.5)


@for_each("seed", CASES)
def test_levels(seed: int) -> None:
    case = Case(seed)
    other = case.rng.normal(0, 2, (2, case.batch, 3, 5, 6))
    agree("hcl", [case.student, other[0]], [case.teacher, other[1]])
    agree("gid_feature", *case.logits(case.rows, 3, 10, 10))


@for_each("seed", CASES)
def test_fkd(seed: int) -> None:
    case = Case(seed)
    maps = tensors(case.student), tensors(case.teacher)
    found = losses.fkd(*maps, losses.fkd_mask(*maps, 0.5))
    expected = literal.fkd_attention(case.student, case.teacher, 0.5)
    np.testing.assert_allclose(found.item(), expected, rtol=1e-9)


# ---- Gradients


GRADIENTS: dict[str, Callable[[Case, torch.Tensor], torch.Tensor]] = {
    "pkd": lambda c, x: losses.pkd(x, tensors(c.teacher)),
    "fgd": lambda c, x: sum(losses.fgd(x, tensors(c.teacher), tensors(c.boxes), c.padded_size)),
    "mgd": lambda c, x: losses.mgd(
        x, tensors(c.teacher), torch.tanh, tensors(c.cells)[:, None] > 0.5
    ),
    "fgfi": lambda c, x: losses.fgfi(x, tensors(c.teacher), tensors(c.cells) > 0.5),
    "defeat": lambda c, x: sum(losses.defeat(x, tensors(c.teacher), tensors(c.cells) > 0.5)),
    "frs": lambda c, x: losses.frs(x, tensors(c.teacher), tensors(c.cells)),
    "frs_classes": lambda c, x: losses.frs_classes(x, tensors(c.teacher), tensors(c.cells)),
    "fkd": lambda c, x: losses.fkd(x, tensors(c.teacher), tensors(c.cells)),
    "hcl": lambda c, x: losses.hcl([x, 2 * x], [tensors(c.teacher)] * 2),
    "gid_feature": lambda c, x: losses.gid_feature(x, tensors(c.teacher)),
    "gid_relation": lambda c, x: losses.gid_relation(x.flatten(1), tensors(c.teacher).flatten(1)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient(name: str) -> None:
    case = Case(5)  # three images of 8 x 5 cells, two channels
    student = tensors(case.student).requires_grad_()
    assert student.shape == (3, 2, 8, 5)
    assert torch.autograd.gradcheck(lambda x: GRADIENTS[name](case, x), student)


ROWS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "kd": lambda s, t: losses.kd(s, t, 2.0),
    "dkd": lambda s, t: losses.dkd(s, t, torch.tensor([0, 4, 2, 2]), 1.0, 0.25, 2.0),
    "ld": lambda s, t: losses.ld(s, t, torch.tensor([1.0, 0, 2, 3]), 10.0),
    "crosskd_classes": lambda s, t: losses.crosskd_classes(s, t, 2.0),
    "crosskd_bins": lambda s, t: losses.crosskd_bins(
        s.view(1, 4, 5), t.view(1, 4, 5), torch.tensor([2.0])
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_gradient_of_rows(name: str) -> None:
    student, teacher = torch.randn(
        2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    assert torch.autograd.gradcheck(lambda x: ROWS[name](x, teacher), student.requires_grad_())


@pytest.mark.parametrize("name", [x for x in (*GRADIENTS, *ROWS) if x != "kd"])
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    case = Case(5)
    if name in ROWS:
        student, teacher = torch.randn(2, 4, 5).requires_grad_().unbind()
        loss = ROWS[name](student, teacher)
    else:
        student = tensors(case.student).requires_grad_()
        teacher = case.teacher = tensors(case.teacher).requires_grad_()
        loss = GRADIENTS[name](case, student)
    of_student, of_teacher = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
    assert of_student.abs().max() > 0 and of_teacher is None


@pytest.mark.parametrize("name", [n for n in GRADIENTS if n not in ("mgd", "frs_classes")])
def test_equal_maps_give_zero_and_no_gradient(name: str) -> None:
    case = Case(5)
    student = tensors(case.teacher).clone().requires_grad_()
    loss = GRADIENTS[name](case, student)
    loss.backward()
    assert (loss == 0 and student.grad.abs().max() == 0) or name in ("hcl", "gid_relation")


# ---- Further statements of the specification


def test_pkd_is_one_minus_the_correlation() -> None:
    case = Case(5)
    flat = [
        x.transpose(1, 0, 2, 3).reshape(case.channels, -1) for x in (case.student, case.teacher)
    ]
    cells = flat[0].shape[1]
    correlation = [np.corrcoef(s, t)[0, 1] for s, t in zip(*flat)]
    expected = (cells - 1) / cells * (1 - np.mean(correlation))
    found = losses.pkd(tensors(case.student), tensors(case.teacher))
    assert found.item() == pytest.approx(expected, rel=1e-5)  # PKD adds 1e-6


@for_each("seed", CASES)
def test_fgd_attention_sums_to_the_cells_and_channels(seed: int) -> None:
    case = Case(seed)
    cells, channels = losses.fgd_attention(tensors(case.student), 0.5)
    torch.testing.assert_close(cells.sum((1, 2)), torch.full_like(cells[:, 0, 0], cells[0].numel()))
    torch.testing.assert_close(channels.sum(1), torch.full_like(channels[:, 0], case.channels))


def test_dkd_and_kd() -> None:
    """KD = TCKD + (1 − p) NCKD, where p is the teacher's probability of the target (DKD, Eq. 6)."""
    case = Case(11)
    for _ in range(20):
        student, teacher = (tensors(x) for x in case.logits(1, 6))
        target = torch.tensor([int(case.rng.integers(6))])
        p = (teacher / 2).softmax(1)[0, target].item()
        found = losses.dkd(student, teacher, target, 1.0, 1 - p, 2.0)
        torch.testing.assert_close(found, losses.kd(student, teacher, 2.0))


def test_dkd_of_extreme_logits() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 3.0]], requires_grad=True)
    teacher = -student.detach()
    loss = losses.dkd(student, teacher, torch.tensor([0, 0]), 1.0, 1.0, 1.0)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()  # type: ignore[union-attr]


def test_ld_at_an_infinite_temperature() -> None:
    """T² KL tends to half the variance, over the bins, of the difference of the logits.

    LD is 1/bins of it.
    """
    case = Case(3)
    student, teacher = (tensors(x) for x in case.logits(1, 9))
    found = losses.ld(student, teacher, torch.ones(1), 1e4)
    expected = (student - teacher).var(correction=0) / 2 / 9
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_maps_that_are_constant() -> None:
    """A channel without deviation becomes 0, with a finite gradient."""
    student = torch.ones(2, 3, 4, 4, requires_grad=True)
    loss = losses.pkd(student, torch.randn(2, 3, 4, 4))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()  # type: ignore[union-attr]


BAD_SHAPES: list[tuple[Callable[[], Any], str]] = [
    (lambda: losses.pkd(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4, 3)), "differ in shape"),
    (lambda: losses.fgfi(*torch.zeros(2, 1, 2, 3, 4), torch.zeros(3, 4)), r"must be \(N, H, W\)"),
    (lambda: losses.mgd(*torch.zeros(2, 1, 2, 3, 4), torch.abs, torch.zeros(1, 3, 4)), "keep"),
    (lambda: losses.fgd(*torch.zeros(2, 1, 2, 3, 4), [], (24, 32)), "boxes are given for 0 images"),
    (lambda: losses.fgd_attention(torch.zeros(1, 2, 3, 4), 0.0), "temperature must be above 0"),
    (lambda: losses.ld(*torch.zeros(2, 3, 4), torch.zeros(4), 1.0), r"must be \(P,\)"),
    (lambda: losses.dkd(*torch.zeros(2, 3, 4), torch.zeros(4).long(), 1, 1, 1), r"must be \(N,\)"),
]


@pytest.mark.parametrize("call, message", BAD_SHAPES)
def test_shapes_that_do_not_fit(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_empty_batch_trains() -> None:
    empty = torch.zeros(0, 2, 3, 4, requires_grad=True)
    teacher = torch.zeros(0, 2, 3, 4)
    cells = torch.zeros(0, 3, 4)
    terms = [
        losses.pkd(empty, teacher),
        *losses.fgd(empty, teacher, [], (24, 32)),
        losses.mgd(empty, teacher, torch.abs, cells[:, None]),
        losses.fgfi(empty, teacher, cells),
        *losses.defeat(empty, teacher, cells),
        losses.frs(empty, teacher, cells),
        losses.fkd(empty, teacher, cells),
        losses.hcl([empty], [teacher]),
        losses.gid_feature(empty, teacher),
        losses.gid_relation(empty.flatten(1), teacher.flatten(1)),
        losses.dkd(empty[:, :, 0, 0], teacher[:, :, 0, 0], torch.zeros(0).long(), 1.0, 1.0, 1.0),
        losses.ld(empty[:, :, 0, 0], teacher[:, :, 0, 0], torch.zeros(0), 1.0),
    ]
    total = torch.stack(terms).sum()
    total.backward()
    assert total == 0


def test_fgfi_masks_of_several_levels_and_images() -> None:
    """Several levels give the same masks as one level with all cells side by side."""
    case = Case(5)
    fine, coarse = case.some_boxes(24).reshape(2, 4, 3, 4), case.some_boxes(6).reshape(2, 1, 3, 4)
    boxes = [case.some_boxes(3), case.some_boxes(0), case.some_boxes(1)]
    both = np.concatenate([fine, coarse], 1)
    masks = losses.fgfi_masks(tensors([fine, coarse]), tensors(boxes), 0.5)
    for k, own in enumerate(boxes):
        found = torch.cat([x[k] for x in masks], 1)
        np.testing.assert_array_equal(found.numpy(), literal.fgfi_mask(both, own, 0.5))

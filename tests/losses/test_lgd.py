"""Test LGD's distillation term against its reference, and its boxes on cells by hand."""

import math

import numpy as np
import pytest
import torch

from distill import losses
from distill.heads.lgd import ImplicitTeacher
from tests.reference import literal_methods as literal
from tests.support.cases import for_each
from tests.support.operations import Recorder

SIZES = [(1, 1), (1, 2), (3, 1), (4, 4), (5, 7), (8, 5), (2, 9)]
NAN = math.nan


@for_each("seed", range(24))
def test_the_loss_is_the_restatements(seed):
    rng = np.random.default_rng(seed)
    sizes = [SIZES[(seed + k) % len(SIZES)] for k in range(1 + seed % 3)]
    shapes = [(1 + seed % 3, 1 + seed % 4, *size) for size in sizes]
    student, teacher = ([rng.normal(0.5, 2, shape) for shape in shapes] for _ in range(2))
    found = losses.lgd(*([torch.from_numpy(x) for x in maps] for maps in (student, teacher)))
    np.testing.assert_allclose(found.numpy(), literal.lgd(student, teacher), rtol=1e-6, atol=1e-9)


def test_the_loss_by_hand():
    """(1, 3) becomes (−1, 1), and (6, 2) the opposite: 4 at both cells; a single cell becomes 0."""
    student, teacher = (torch.tensor([[[x]]]) for x in ([1.0, 3.0], [6.0, 2.0]))
    assert losses.lgd([student], [teacher]).item() == pytest.approx(4, rel=1e-4)
    assert losses.lgd([student], [3 * student - 7]).item() == pytest.approx(0, abs=1e-9)
    one = torch.full((1, 1, 1, 1), 5.0)
    assert losses.lgd([one], [-one]) == 0
    # The mean is over the cells, not over the levels.
    assert losses.lgd([student, one], [teacher, -one]).item() == pytest.approx(8 / 3, rel=1e-4)


def test_the_losss_gradient_reaches_the_student_alone():
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 2, h, 3, generator=g, dtype=torch.float64) for h in (2, 3, 2, 3)]
    student, teacher = maps[:2], maps[2:]
    assert torch.autograd.gradcheck(
        lambda *s: losses.lgd(s, teacher), [x.requires_grad_() for x in student]
    )
    losses.lgd(student, [x.requires_grad_() for x in teacher]).backward()
    assert all(x.grad is None for x in teacher)


def test_half_precision_an_empty_batch_and_wrong_shapes():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).half()
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.lgd([x], [x.flip(3)])
    assert found.dtype == torch.float32
    assert torch.equal(found, losses.lgd([x.float()], [x.float().flip(3)]))
    empty = torch.zeros(0, 3, 4, 5, requires_grad=True)
    zero = losses.lgd([empty], [empty])
    zero.backward()
    assert zero == 0 and empty.grad.shape == empty.shape
    with pytest.raises(ValueError, match=r"student \(2, .* and teacher \(1, .* differ in shape"):
        losses.lgd([x], [x[:1]])
    with pytest.raises(ValueError, match="student has 2 levels and teacher 1"):
        losses.lgd([x, x], [x])


CANVAS = (16, 12)  # pixels; the cell centres of a 4 x 3 map are at 2, 6, 10, 14
CELLS = {  # rows and columns of this map
    (2, 2, 6, 6): ([0, 1], [0, 1]),  # edges on centres
    (2.1, 1.9, 6, 13.9): ([0, 1, 2], [1]),
    (-50, -50, 90, 90): ([0, 1, 2, 3], [0, 1, 2]),
    (3, 3, 5, 5): ([], []),  # between the centres
    (20, 2, 30, 6): ([], []),  # outside the padded image
    (NAN, NAN, NAN, NAN): ([], []),
}


@pytest.mark.parametrize("box", CELLS)
def test_a_box_has_the_cells_whose_centres_lie_in_it(box):
    expected = torch.zeros(4, 3)
    rows, columns = CELLS[box]
    for i in rows:
        expected[i, columns] = 1
    found = losses.lgd_masks(torch.tensor([[box]]), CANVAS, 4, 3)
    assert found.dtype == torch.float32 and torch.equal(found[0, 0], expected)


def test_cells_of_a_map_that_does_not_divide_the_canvas():
    """The centre of a single cell is the centre of the padded image, whatever the stride."""
    boxes = torch.tensor([[[0.0, 0.0, 50.0, 40.0], [49.0, 0.0, 96.0, 64.0]]])
    assert losses.lgd_masks(boxes, (64, 96), 1, 1).flatten().tolist() == [1, 0]
    assert losses.lgd_masks(boxes, (64, 96), 1, 2).tolist() == [[[[1, 0]], [[0, 1]]]]
    assert losses.lgd_masks(boxes[:, :0], (64, 96), 5, 7).shape == (1, 0, 5, 7)


def test_labels_are_corners_over_the_canvas_and_one_hot_in_minus_1_to_1():
    boxes = torch.tensor([[[3.0, 4.0, 9.0, 12.0], [-5.0, 0.0, 99.0, 16.0]], [[NAN] * 4] * 2])
    classes = torch.tensor([[1, 0], [-1, -1]])
    found = losses.lgd_labels(boxes, classes, (16, 12), 2)
    context = [-1, -1, 1, 1, -1, -1]
    assert found[0].tolist() == [
        context,
        [-0.5, -0.5, 0.5, 0.5, -1, 1],
        [-1, -1, 1, 1, 1, -1],
    ]
    assert found[1, 0].tolist() == context and found.isfinite().all()


def test_pooling_and_rendering_by_hand():
    maps = torch.arange(12.0).view(1, 1, 3, 4) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    masks = torch.zeros(1, 3, 3, 4)
    masks[0, 0, 1:, :2] = 1  # cells of value 4, 5, 8, 9
    masks[0, 1, 2, 1] = 1  # the cell of value 9
    assert losses.lgd_pooled(maps, masks).tolist() == [[[6.5, -6.5], [9, -9], [0, 0]]]
    assert losses.lgd_pooled(torch.full((1, 2, 3, 4), 7.0), masks)[0, :2].unique().tolist() == [7]

    objects = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]])
    drawn = losses.lgd_rendered(objects, masks)
    expected = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0], [1, 3, 0, 0.0]])
    assert torch.equal(drawn, torch.stack([expected, 10 * expected])[None])


def test_sums_of_many_cells_keep_their_precision_under_autocast():
    maps = torch.full((1, 1, 64, 64), 30000.0, dtype=torch.float16)
    masks = torch.ones(1, 1, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = losses.lgd_pooled(maps, masks)
        drawn = losses.lgd_rendered(pooled, masks)
    assert pooled.item() == 30000 and drawn.unique().tolist() == [30000]


def test_nothing_waits_for_the_device():
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 8, k, k, generator=g).requires_grad_() for k in (4, 2)]
    boxes = [torch.tensor([[0.0, 0.0, 20.0, 20.0], [8.0, 8.0, 30.0, 30.0]]), torch.zeros(0, 4)]
    classes = [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.long)]
    teacher = ImplicitTeacher(num_classes=3, channels=8)
    with Recorder() as recorder:
        made = teacher(maps, boxes, classes, (32, 32))
        (losses.lgd(maps, made) + sum(x.sum() for x in made)).backward()
    assert recorder.names and not recorder.waits

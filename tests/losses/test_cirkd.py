"""Test CIRKD: similarities within a batch and with a memory, and the keys of the memory."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from distill.losses import (
    ClassQueues,
    cirkd,
    class_pixels,
    class_regions,
    cross_image_relation,
    memory_contrast,
)
from tests.support.operations import Recorder

SHAPES = [(1, 1, 1, 1), (1, 3, 4, 4), (2, 3, 5, 7), (3, 2, 3, 3)]
CLASSES = 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def maps(shape, channels=None, seed=0, dtype=torch.float32):
    draw = generator(seed)
    student = torch.randn(shape, generator=draw, dtype=dtype)
    shape = (shape[0], channels or shape[1], *shape[2:])
    return student, torch.randn(shape, generator=draw, dtype=dtype)


def draw_labels(shape, seed=0):
    values = torch.tensor([0, 1, 3, 255, -1, CLASSES])
    return values[torch.randint(len(values), (shape[0], *shape[2:]), generator=generator(seed))]


def unit(x, axis):
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


def pooled(x, k):
    height, width = x.shape[2:]
    rows = [
        [x[:, :, y : y + k, z : z + k].mean((2, 3)) for z in range(0, width, k)]
        for y in range(0, height, k)
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def literal_relation(student, teacher, tau, pool):
    s, t = (
        unit(pooled(x.detach().double().numpy(), pool), 1).reshape(*x.shape[:2], -1)
        for x in (student, teacher)
    )
    total, batch = 0.0, len(s)
    for i, j in np.ndindex(batch, batch):
        rows = range(s.shape[2])
        for m in rows:
            p, q = (softmax(x[i][:, m] @ x[j] / tau) for x in (t, s))
            total += rel_entr(p, q).sum() / len(rows)
    return total / batch**2


def literal_contrast(student, teacher, keys, tau, kd_tau, filled, labelled):
    s, t = (unit(x.detach().double().numpy(), 1) for x in (student, teacher))
    k = keys.double().numpy()[filled.numpy()]
    rows = np.flatnonzero(labelled.numpy())
    return kd_tau**2 * np.mean(
        [
            rel_entr(softmax(k @ t[p] / tau / kd_tau), softmax(k @ s[p] / tau / kd_tau)).sum()
            for p in rows
        ]
    )


def test_relation_by_hand():
    # Orthogonal cells against parallel ones give (3, 1)/4 against (1, 1)/2 at τ = 1/ln 3.
    student = torch.tensor([[[[2.0, 5.0]]]])
    teacher = torch.tensor([[[[7.0, 0.0]], [[0.0, 1.0]]]])
    expected = torch.tensor(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    found = cross_image_relation(student, teacher, 1 / math.log(3))
    torch.testing.assert_close(found, expected)
    # A batch of two equal images: every pair is the same, and so is the mean.
    twice = [torch.cat([x, x]) for x in (student, teacher)]
    torch.testing.assert_close(cross_image_relation(*twice, 1 / math.log(3)), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau, pool", [(0.1, 1), (0.5, 2), (1.0, 3)])
def test_relation_equals_the_literal_form(shape, tau, pool, monkeypatch):
    student, teacher = maps(shape, channels=5)
    expected = literal_relation(student, teacher, tau, pool)
    for chunk in (cirkd.CHUNK, 4):  # all rows at once, and several chunks with a smaller last one
        monkeypatch.setattr(cirkd, "CHUNK", chunk)
        found = cross_image_relation(student, teacher, tau, pool)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pool", [1, 2])
def test_gradient_of_the_relation(pool, monkeypatch):
    monkeypatch.setattr(cirkd, "CHUNK", 4)
    student, teacher = maps((2, 2, 3, 3), channels=3, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: cross_image_relation(s, teacher, 0.3, pool), student.requires_grad_()
    )


def test_relation_never_holds_all_similarities():
    student, teacher = maps((2, 16, 24, 32))
    cells = 2 * 24 * 32
    with Recorder() as recorder:
        cross_image_relation(student.requires_grad_(), teacher).backward()
    assert recorder.largest <= 4 * cells * cirkd.CHUNK < 4 * cells**2 / 10
    assert not recorder.waits


def test_equal_directions_give_exactly_zero():
    student, _ = maps((2, 3, 4, 4))
    student.requires_grad_()
    value = cross_image_relation(student, student.detach().clone())
    (grad,) = torch.autograd.grad(value, student)
    assert value == 0 and (grad == 0).all()


@pytest.mark.parametrize("tau, kd_tau", [(1 / math.log(3), 1.0), (0.5 / math.log(3), 2.0)])
def test_contrast_by_hand(tau, kd_tau):
    # The teacher equals the first key, the student lies between two keys. One slot is empty.
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    student, teacher = torch.tensor([[4.0, 4.0]]), torch.tensor([[3.0, 0.0]])
    filled = torch.tensor([True, True, False])
    found = memory_contrast(student, teacher, keys, tau, kd_tau, filled)
    expected = kd_tau**2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    torch.testing.assert_close(found, torch.tensor(expected))


def pixels(count=7, channels=3, keys=9, seed=0, dtype=torch.float32):
    """Return (student, teacher, keys, filled, labelled)."""
    draw = generator(seed)
    student, teacher = torch.randn((2, count, channels), generator=draw, dtype=dtype)
    k = torch.nn.functional.normalize(torch.randn(keys, channels, generator=draw, dtype=dtype))
    filled, labelled = (torch.arange(n) % 3 > 0 for n in (keys, count))
    return student, teacher, k, filled, labelled


@pytest.mark.parametrize("tau, kd_tau", [(0.1, 1.0), (0.2, 3.0)])
def test_contrast_equals_the_literal_form(tau, kd_tau, monkeypatch):
    monkeypatch.setattr(cirkd, "CHUNK", 3)
    student, teacher, keys, filled, labelled = pixels()
    found = memory_contrast(student, teacher, keys, tau, kd_tau, filled, labelled)
    expected = literal_contrast(student, teacher, keys, tau, kd_tau, filled, labelled)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    everything = filled | True, labelled[:1].expand(7) | True
    found = memory_contrast(student, teacher, keys, tau, kd_tau)
    expected = literal_contrast(student, teacher, keys, tau, kd_tau, *everything)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_gradient_of_the_contrast(monkeypatch):
    monkeypatch.setattr(cirkd, "CHUNK", 3)
    student, teacher, keys, filled, labelled = pixels(dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: memory_contrast(s, teacher, keys, 0.3, 2.0, filled, labelled),
        student.requires_grad_(),
    )


@pytest.mark.parametrize("missing", ["pixels", "labelled", "filled", "keys"])
def test_without_pixels_or_keys_the_contrast_is_exactly_zero(missing):
    student, teacher, keys, filled, labelled = pixels()
    if missing == "pixels":
        student, teacher, labelled = student[:0], teacher[:0], labelled[:0]
    elif missing == "labelled":
        labelled = labelled & False
    elif missing == "filled":
        filled = filled & False
    else:
        keys, filled = keys[:0], filled[:0]
    student.requires_grad_()
    value = memory_contrast(student, teacher, keys, filled=filled, labelled=labelled)
    value.backward()
    assert value == 0 and student.grad.shape == student.shape and (student.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_maps_of_zeros(dtype):
    student, teacher = (x.to(dtype) for x in maps((2, 4, 5, 5)))
    keys = torch.randn(6, 5).to(dtype)
    rows = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (student, teacher)]
    zeros = torch.zeros_like(student)
    for loss, args, empty in (
        (cross_image_relation, (student, teacher), (zeros, teacher)),
        (memory_contrast, (*rows, keys), (torch.zeros_like(rows[0]), rows[1], keys)),
    ):
        found = loss(*args)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(*(x.float() for x in args)))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(loss(*args), found, rtol=0, atol=0)
        found = loss(empty[0].requires_grad_(), *empty[1:])
        (grad,) = torch.autograd.grad(found, empty[0])
        assert found.isfinite() and (grad == 0).all()


@pytest.mark.parametrize("loss", ["relation", "contrast"])
def test_only_the_student_gets_a_gradient(loss):
    if loss == "relation":
        parts = [x.requires_grad_() for x in maps((1, 2, 4, 4))]
        found = cross_image_relation(*parts)
    else:
        parts = [x.clone().requires_grad_() for x in pixels()[:3]]
        found = memory_contrast(*parts)
    first, *others = torch.autograd.grad(found, parts, allow_unused=True)
    assert first.abs().max() > 0 and not any(x is not None for x in others)


def test_an_empty_batch():
    student = torch.zeros(0, 3, 4, 4, requires_grad=True)
    value = cross_image_relation(student, torch.zeros(0, 5, 4, 4), pool=2)
    value.backward()
    assert value == 0 and student.grad.shape == student.shape


def test_wrong_shapes_are_refused():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match="differ in batch or size"):
        cross_image_relation(x, x[:, :, 1:])
    with pytest.raises(ValueError, match="pool must be at least 1, got 0"):
        cross_image_relation(x, x, pool=0)
    student, teacher, keys, filled, labelled = pixels()
    with pytest.raises(ValueError, match=r"keys \(9, 2\) do not fit pixels \(7, 3\)"):
        memory_contrast(student, teacher, keys[:, 1:])
    with pytest.raises(ValueError, match=r"filled \(8,\) must be of shape \(9,\)"):
        memory_contrast(student, teacher, keys, filled=filled[1:])
    with pytest.raises(ValueError, match=r"labelled \(6,\) must be of shape \(7,\)"):
        memory_contrast(student, teacher, keys, labelled=labelled[1:])
    with pytest.raises(ValueError, match=r"labels \(2, 4, 4\) do not fit maps \(2, 3, 4, 5\)"):
        class_regions(x, torch.zeros(2, 4, 4), CLASSES)


@pytest.mark.parametrize("shape", SHAPES)
def test_regions_equal_the_literal_form(shape):
    features, labels = maps(shape)[0], draw_labels(shape)
    found, present = class_regions(features, labels, CLASSES)
    assert found.shape == (shape[0], CLASSES, shape[1]) and present.dtype == torch.bool
    cells = unit(features.double().numpy(), 1)
    for n, k in np.ndindex(shape[0], CLASSES):
        member = labels[n].numpy() == k
        assert present[n, k] == member.any()
        mean = cells[n][:, member].mean(1) if member.any() else np.zeros(shape[1])
        expected = mean / np.linalg.norm(mean) if member.any() else mean
        np.testing.assert_allclose(found[n, k], expected, rtol=1e-4, atol=1e-6)


def test_drawn_pixels_are_of_their_class_and_distinct():
    features, labels = torch.randn(2, 6, 5, 7), draw_labels((2, 6, 5, 7), 1)
    keys, valid = class_pixels(features, labels, CLASSES, 4, generator())
    assert keys.shape == (2, CLASSES, 4, 6) and valid.shape == (2, CLASSES, 4)
    cells = torch.nn.functional.normalize(features, dim=1)
    for n, k in np.ndindex(2, CLASSES):
        members = cells[n][:, labels[n] == k].T
        assert valid[n, k].sum() == min(len(members), 4)
        drawn = keys[n, k][valid[n, k]]
        matches = (drawn[:, None] - members).abs().amax(2) < 1e-6
        assert (matches.sum(1) == 1).all() and (matches.sum(0) <= 1).all()


def test_each_pixel_of_a_class_is_drawn_equally_often():
    labels = torch.tensor([[[0, 255, 0, 1, 0]]])
    features = torch.eye(5).T.view(1, 5, 1, 5)
    draw, count = generator(), torch.zeros(5)
    for _ in range(600):
        keys, valid = class_pixels(features, labels, 1, 2, draw)
        assert valid.all()
        count += keys[0, 0].sum(0)
    assert count[[1, 3]].sum() == 0
    assert (count[[0, 2, 4]] / 600 - 2 / 3).abs().max() < 0.06


def test_more_pixels_than_a_map_has():
    keys, valid = class_pixels(
        torch.randn(1, 3, 1, 2), torch.tensor([[[1, 255]]]), 2, 16, generator()
    )
    assert keys.shape == (1, 2, 16, 3)  # independent of the map size: all processes store alike
    assert valid.tolist() == [[[False] * 16, [True] + [False] * 15]]


def test_keys_carry_no_gradient_and_wait_for_nothing():
    features, labels = torch.randn(2, 3, 4, 4, requires_grad=True), draw_labels((2, 3, 4, 4))
    memory = ClassQueues(CLASSES, 8, 3)
    student, teacher = torch.randn(2, 5, 3)
    with Recorder() as recorder:
        regions, present = class_regions(features, labels, CLASSES)
        drawn, valid = class_pixels(features, labels, CLASSES, 2, generator())
        memory.push(regions.transpose(0, 1), present.T)
        memory.push(drawn.transpose(0, 1).flatten(1, 2), valid.transpose(0, 1).flatten(1))
        keys, filled = memory.sample(3, generator())
        memory_contrast(student.requires_grad_(), teacher, keys, filled=filled).backward()
    assert not recorder.waits
    assert not any(x.requires_grad for x in (regions, drawn, keys))


def literal_push(queues, size, keys, valid):
    """Keep lists of (slot, key). A class's next slot is the number of keys that it has received."""
    for queue, row, use in zip(queues, keys.tolist(), valid.tolist()):
        for key, keep in zip(row, use):
            if keep:
                queue["slots"][queue["got"] % size] = key
                queue["got"] += 1


def test_queues_are_ring_buffers():
    size, draw = 5, generator()
    memory = ClassQueues(CLASSES, size, 2)
    expected = [{"slots": {}, "got": 0} for _ in range(CLASSES)]
    for step in range(12):
        pushed = step % (size + 1)
        keys = torch.randn(CLASSES, pushed, 2, generator=draw)
        valid = torch.rand(CLASSES, pushed, generator=draw) < torch.arange(4)[:, None] / 3
        memory.push(keys, valid)
        literal_push(expected, size, keys, valid)
        for k, queue in enumerate(expected):
            assert memory.count[k] == len(queue["slots"])
            assert memory.pointer[k] == queue["got"] % size
            for slot in range(size):
                assert memory.queue[k, slot].tolist() == queue["slots"].get(slot, [0.0, 0.0])
    assert memory.count.tolist()[0] == 0 and memory.count[3] == size


def test_samples_are_filled_keys_of_each_class_and_distinct():
    memory = ClassQueues(3, 6, 1)
    memory.push(
        torch.arange(1.0, 19).view(3, 6, 1), torch.arange(6) < torch.tensor([[0], [2], [6]])
    )
    keys, filled = memory.sample(4, generator())
    assert keys.shape == (12, 1) and filled.view(3, 4).sum(1).tolist() == [0, 2, 4]
    drawn = [set(keys.view(3, 4)[k][filled.view(3, 4)[k]].tolist()) for k in range(3)]
    assert drawn[1] == {7.0, 8.0}
    assert len(drawn[2]) == 4 and drawn[2] <= set(range(13, 19))
    keys, filled = memory.sample(10, generator())  # more than there are slots
    assert keys.shape == (18, 1) and filled.sum() == 8


def test_full_queues_are_read_at_the_same_slots():
    memory = ClassQueues(2, 7, 1)
    slots = torch.arange(7.0)[:, None].expand(2, 7, 1)
    memory.push(slots, torch.ones(2, 7, dtype=torch.bool))
    keys, _ = memory.sample(3, generator())
    assert (keys[:3] == keys[3:]).all()


def test_a_memory_goes_on_after_a_checkpoint():
    memory, other = ClassQueues(CLASSES, 5, 2), ClassQueues(CLASSES, 5, 2)
    keys, valid = torch.randn(CLASSES, 3, 2), torch.rand(CLASSES, 3) < 0.7
    memory.push(keys, valid)
    other.load_state_dict(memory.state_dict())
    for x in (memory, other):
        x.push(-keys, valid)
    for name, value in memory.state_dict().items():
        assert (other.state_dict()[name] == value).all(), name
    assert set(memory.state_dict()) == {"queue", "pointer", "count"}
    assert not list(memory.parameters())


def test_keys_that_do_not_fit_a_memory():
    memory = ClassQueues(2, 3, 4)
    for keys in (torch.zeros(2, 4, 4), torch.zeros(1, 3, 4), torch.zeros(2, 3, 5)):
        with pytest.raises(ValueError, match=r"do not fit a memory of \(2, 3, 4\)"):
            memory.push(keys, torch.ones(keys.shape[:2], dtype=torch.bool))
    with pytest.raises(ValueError, match=r"valid \(2, 1\) does not fit keys \(2, 3, 4\)"):
        memory.push(torch.zeros(2, 3, 4), torch.ones(2, 1, dtype=torch.bool))


def test_a_push_is_taken_back() -> None:
    memory, g = ClassQueues(2, 5, 3), torch.Generator().manual_seed(0)
    keys = torch.randn((3, 2, 4, 3), generator=g)
    valid = torch.tensor([[True, True, False, True], [False] * 4])
    for k in range(2):  # wraps around
        memory.push(keys[k], valid)
    before = copy.deepcopy(memory.state_dict())
    memory.mark()
    memory.undo()
    memory.push(keys[2], ~valid)
    assert not torch.equal(memory.queue, before["queue"])
    memory.undo()
    memory.undo()  # a second call does nothing
    assert all(torch.equal(x, before[k]) for k, x in memory.state_dict().items())

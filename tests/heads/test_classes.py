"""Classes of two networks, matched by name."""

import logging

import pytest
import torch
from detectron2.layers import ShapeSpec

from distill.config import get_distill_cfg
from distill.heads import MaskLogitKD
from distill.heads.classes import ClassMap, no_shared_class
from distill.structures import NetworkInfo

STUDENT = ("car", "cat", "dog")
CASES = {
    "identical": ("car", "cat", "dog"),
    "permuted": ("dog", "car", "cat"),
    "teacher knows more": ("bus", "dog", "cat", "car", "tree"),
    "teacher knows less": ("dog", "car"),
    "partly shared": ("tree", "cat", "bus"),
}
every_case = pytest.mark.parametrize("teacher", CASES.values(), ids=CASES)


def spec(name, classes):
    return NetworkInfo(name, ("Net",), {"p2": ShapeSpec()}, frozenset(), classes)


def named_columns(classes, rows=2):
    """(rows, K): each column holds a number that stands for its class name."""
    numbers = [float(sum(map(ord, name))) for name in classes]
    return torch.tensor(numbers).repeat(rows, 1)


@every_case
def test_select_pairs_columns_of_the_same_name(teacher):
    s, t = ClassMap(STUDENT, teacher).select(named_columns(STUDENT), named_columns(teacher))
    shared = [name for name in STUDENT if name in teacher]  # in the student's order
    assert torch.equal(s, named_columns(shared))
    assert torch.equal(t, named_columns(shared))


@every_case
def test_select_takes_the_last_dimension_of_any_shape(teacher):
    s = named_columns(STUDENT, 10).view(2, 5, -1)
    t = named_columns(teacher, 10).view(2, 5, -1)
    s, t = ClassMap(STUDENT, teacher).select(s, t)
    assert s.shape == (2, 5, len(set(STUDENT) & set(teacher)))
    assert torch.equal(s, t)


@every_case
def test_select_with_background_keeps_the_last_column(teacher):
    background = torch.tensor([[1.0], [2.0]])
    s, t = ClassMap(STUDENT, teacher).select_with_background(
        torch.cat([named_columns(STUDENT), background], 1),
        torch.cat([named_columns(teacher), -background], 1),
    )
    assert torch.equal(s[:, :-1], t[:, :-1])
    assert s.shape[1] == len(set(STUDENT) & set(teacher)) + 1
    assert torch.equal(s[:, -1:], background)
    assert torch.equal(t[:, -1:], -background)


@every_case
def test_known_labels(teacher):
    labels = torch.tensor([0, 1, 2, 3, 1, 3])
    expected = [name in teacher for name in STUDENT] + [True]  # background is known
    found = ClassMap(STUDENT, teacher).known(labels)
    assert found.tolist() == [expected[i] for i in labels.tolist()]


@every_case
@pytest.mark.parametrize("trailing", [(), (4,), (2, 2)])
def test_at_label_reads_the_boxs_class_in_both(teacher, trailing):
    classes = ClassMap(STUDENT, teacher)
    labels = torch.tensor([2, 0, 1, 0])
    known = classes.known(labels)
    s, t = (
        named_columns(names, len(labels)).view(len(labels), -1, *[1] * len(trailing))
        * torch.ones(trailing)
        for names in (STUDENT, teacher)
    )
    at_s, at_t = classes.at_label(s, t, labels)
    expected = named_columns([STUDENT[i] for i in labels], 1)[0]
    expected = expected.view(-1, *[1] * len(trailing)) * torch.ones(trailing)
    assert torch.equal(at_s, expected)
    assert torch.equal(at_t[known], expected[known])


def test_at_label_of_class_agnostic_outputs():
    classes = ClassMap(STUDENT, ("dog", "car", "cat"))
    labels = torch.tensor([0, 2, 3])
    specific, agnostic = torch.arange(9.0).view(3, 3), torch.tensor([[7.0], [8.0], [9.0]])
    s, t = classes.at_label(agnostic, specific, labels)
    assert s.tolist() == [7, 8, 9]
    assert t[:2].tolist() == [1, 3]  # car of row 0, dog of row 1
    s, t = classes.at_label(specific, agnostic, labels)
    assert s[:2].tolist() == [0, 5]
    assert t.tolist() == [7, 8, 9]


def test_background_labels_index_no_column_out_of_range():
    classes = ClassMap(STUDENT, ("dog",))
    labels = torch.full((2,), len(STUDENT))
    s, t = classes.at_label(torch.zeros(2, 3, 4), torch.zeros(2, 1, 4), labels)
    assert s.shape == t.shape == (2, 4)


def test_at_label_passes_gradients_to_the_chosen_entries_alone():
    outputs = torch.zeros(2, 3, requires_grad=True)
    chosen, _ = ClassMap(STUDENT, STUDENT).at_label(outputs, outputs, torch.tensor([1, 2]))
    (gradient,) = torch.autograd.grad(chosen.sum(), outputs)
    assert gradient.tolist() == [[0, 1, 0], [0, 0, 1]]


def test_identical_classes_copy_nothing():
    s, t = named_columns(STUDENT), named_columns(STUDENT)
    classes = ClassMap(STUDENT, STUDENT)
    assert classes.select(s, t)[0] is s and classes.select(s, t)[1] is t
    assert classes.select_with_background(s, t)[0] is s


def test_no_rows():
    classes = ClassMap(STUDENT, ("dog", "car"))
    s, t = classes.select_with_background(torch.zeros(0, 4), torch.zeros(0, 3))
    assert s.shape == t.shape == (0, 3)
    labels = torch.zeros(0, dtype=torch.long)
    s, t = classes.at_label(torch.zeros(0, 3, 4), torch.zeros(0, 2, 4), labels)
    assert s.shape == t.shape == (0, 4)


def test_index_tensors_move_with_the_module_and_stay_out_of_checkpoints():
    classes = ClassMap(STUDENT, ("dog",))
    assert not classes.state_dict()
    moved = classes.to("meta")
    assert {x.device.type for x in moved.buffers()} == {"meta"}
    assert len(list(moved.buffers())) == 4


def test_a_head_logs_what_it_drops(caplog):
    cfg = get_distill_cfg()
    with caplog.at_level(logging.WARNING, logger="distill.heads.classes"):
        head = MaskLogitKD(cfg, spec("student", STUDENT), spec("teacher", ("dog",)))
    assert head.classes.dropped == ["car", "cat"]
    assert caplog.messages == ["MaskLogitKD skips classes unknown to the teacher: car, cat"]
    caplog.clear()
    MaskLogitKD(cfg, spec("student", STUDENT), spec("teacher", CASES["permuted"]))
    assert not caplog.messages


def test_no_shared_class_is_one_sentence_with_names():
    assert no_shared_class(STUDENT, ("dog", "bus")) is None
    assert no_shared_class(STUDENT, ("a", "b", "c", "d", "e")) == (
        "student classes (car, cat, dog) and teacher classes (a, b, c, d, ...) have no name in "
        "common; set MODEL.DISTILL.TEACHER.CLASSES"
    )

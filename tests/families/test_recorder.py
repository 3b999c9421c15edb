"""Recorders on arithmetic toys record calls and leave no trace."""

import copy
import re

import pytest
import torch
from torch import nn

from distill.errors import DistillError, RecorderError
from distill.families.recorder import record


class AddOne(nn.Module):
    def forward(self, x):
        return x + 1


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x, offset):
        return {"product": x * self.factor, "shifted": x * self.factor + offset}


class Toy(nn.Module):
    """((x + 1) + 1) * 3, then one of two branches."""

    def __init__(self):
        super().__init__()
        self.add = AddOne()
        self.inner = nn.ModuleDict({"times": Times(3)})
        self.idle = AddOne()
        self.number = 5

    def forward(self, x):
        x = self.add(self.add(x))
        return self.inner["times"](x, 10)["shifted"]


class Labels(nn.Module):
    """Assigns each number its sign, shifted."""

    def __init__(self):
        super().__init__()
        self.add = AddOne()
        self.number = 5

    def assign(self, x, *, shift=0):
        if not isinstance(x, torch.Tensor):
            raise TypeError("no tensor")
        return x.sign() + shift

    def forward(self, x):
        return self.assign(x) + self.assign(-x, shift=3)


@pytest.fixture
def toy():
    return Toy()


@pytest.fixture
def labels():
    return Labels()


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def test_records_arguments_and_outputs(toy):
    with record(toy, ["inner.times"]) as calls:
        result = toy(torch.tensor(1.0))
    args, output = calls["inner.times"]
    assert (args[0], args[1]) == (3, 10)
    assert output["product"] == 9
    assert output["shifted"] is result  # the very tensor, with its graph
    output["product"].backward()
    assert toy.inner["times"].factor.grad == 3


def test_several_calls_come_in_order(toy):
    with record(toy, ["add", "inner.times"]) as calls:
        toy(torch.tensor(1.0))
        toy(torch.tensor(5.0))
    assert [float(c.args[0]) for c in calls.all("add")] == [1, 2, 5, 6]
    assert [float(c.output) for c in calls.all("add")] == [2, 3, 6, 7]
    assert calls["add"] is calls.all("add")[-1]
    assert len(calls.all("inner.times")) == 2


def test_the_model_computes_the_same_with_taps(toy):
    x = torch.tensor(2.0)
    with record(toy, ["add", "inner.times"]):
        tapped = toy(x)
    assert tapped == toy(x) == 22


def test_hooks_are_gone_afterwards(toy):
    with record(toy, ["add", "inner.times"]) as calls:
        assert hooks(toy) == 2
        toy(torch.tensor(1.0))
    assert hooks(toy) == 0
    toy(torch.tensor(1.0))
    assert len(calls.all("add")) == 2


def test_hooks_are_gone_after_an_exception(toy):
    with pytest.raises(TypeError), record(toy, ["add", "inner.times"]) as calls:
        toy("no number")
    assert hooks(toy) == 0
    with pytest.raises(RecorderError):
        calls.all("add")  # its forward failed: nothing was recorded


def test_hooks_of_other_owners_stay(toy):
    seen = []
    toy.add.register_forward_hook(lambda module, args, output: seen.append(float(output)))
    with record(toy, ["add"]):
        toy(torch.tensor(0.0))
    toy(torch.tensor(0.0))
    assert seen == [1, 2, 1, 2]


def test_nested_taps_record_apart(toy):
    with record(toy, ["add"]) as outer:
        toy(torch.tensor(0.0))
        with record(toy, ["add"]) as inner:
            toy(torch.tensor(10.0))
        assert hooks(toy) == 1
    assert [float(c.args[0]) for c in outer.all("add")] == [0, 1, 10, 11]
    assert [float(c.args[0]) for c in inner.all("add")] == [10, 11]


@pytest.mark.parametrize("name", ["nothing", "inner.nothing", "number"])
def test_unknown_module(toy, name):
    with (
        pytest.raises(RecorderError, match=rf"^Toy has no module '{name}' to record: .*\.$"),
        record(toy, ["add", name]),
    ):
        pytest.fail("the taps opened")
    assert hooks(toy) == 0  # the tap before the unknown one is gone too


def test_a_module_that_did_not_run(toy):
    with record(toy, ["add", "idle"]) as calls:
        toy(torch.tensor(1.0))
    for ask in (calls.all, calls.__getitem__):
        with pytest.raises(
            RecorderError, match="recorded module 'idle' did not run in this forward"
        ):
            ask("idle")
    assert len(calls.all("add")) == 2


def test_a_module_that_is_not_recorded(toy):
    with record(toy, ["add", "idle"]) as calls:
        toy(torch.tensor(1.0))
    with pytest.raises(
        RecorderError, match=r"'inner.times' is not recorded; recorded: add, idle\."
    ):
        calls["inner.times"]


def test_tap_errors_are_for_users():
    assert issubclass(RecorderError, DistillError)


# ---- Methods


def test_a_method_records_positional_arguments_and_outputs_in_order(labels):
    with record(labels, ["assign()"]) as calls:
        result = labels(torch.tensor(2.0))
    assert result == 1 + (-1 + 3)
    assert [float(c.args[0]) for c in calls.all("assign()")] == [2, -2]
    assert [float(c.output) for c in calls.all("assign()")] == [1, 2]
    assert calls["assign()"] is calls.all("assign()")[-1]


def test_what_a_method_returns_is_recorded_itself(labels):
    weight = torch.tensor(2.0, requires_grad=True)
    with record(labels, ["assign()"]) as calls:
        returned = labels.assign(weight, shift=weight)
    assert calls["assign()"].output is returned
    returned.backward()
    assert weight.grad == 1


def test_methods_and_modules_are_recorded_together(labels):
    with record(labels, ["add", "assign()"]) as calls:
        labels(labels.add(torch.tensor(1.0)))
    assert (calls["add"].output, calls["assign()"].args[0]) == (2, -2)


def test_a_method_is_the_classs_own_afterwards(labels):
    before = vars(labels).copy()
    with record(labels, ["assign()"]) as calls:
        assert "assign" in vars(labels)
    assert vars(labels) == before
    labels(torch.tensor(1.0))
    with pytest.raises(RecorderError, match=r"'assign\(\)' did not run"):
        calls.all("assign()")


def test_a_method_is_the_classs_own_after_an_exception(labels):
    with pytest.raises(TypeError, match="no tensor"), record(labels, ["assign()"]) as calls:
        labels.assign("no tensor")
    assert "assign" not in vars(labels)
    with pytest.raises(RecorderError):
        calls.all("assign()")


def test_a_method_of_the_instance_is_given_back(labels):
    """One that a user set, say."""
    labels.assign = own = lambda x, shift=0: x * 0
    with record(labels, ["assign()"]) as calls:
        labels(torch.tensor(1.0))
    assert labels.assign is own
    assert [float(c.output) for c in calls.all("assign()")] == [0, 0]


def test_nested_taps_of_a_method_record_apart(labels):
    with record(labels, ["assign()"]) as outer:
        with record(labels, ["assign()"]) as inner:
            labels.assign(torch.tensor(-1.0))
        labels.assign(torch.tensor(1.0))
    assert [float(c.output) for c in outer.all("assign()")] == [-1, 1]
    assert [float(c.output) for c in inner.all("assign()")] == [-1]
    assert "assign" not in vars(labels)


def test_a_method_of_another_instance_is_left_alone(labels):
    other = Labels()
    with record(labels, ["assign()"]) as calls:
        other(torch.tensor(1.0))
        twin = copy.deepcopy(other)
    assert vars(twin).keys() == vars(other).keys()
    with pytest.raises(RecorderError):
        calls.all("assign()")


@pytest.mark.parametrize("name", ["nothing()", "number()", "add()"])
def test_unknown_method(labels, name):
    with (
        pytest.raises(
            RecorderError, match=rf"^Labels has no method '{re.escape(name)}' to record\.$"
        ),
        record(labels, ["add", "assign()", name]),
    ):
        pytest.fail("the taps opened")
    assert hooks(labels) == 0 and "assign" not in vars(labels)

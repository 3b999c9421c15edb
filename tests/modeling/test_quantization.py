"""Fake quantization of a network: grids, ranges, hooks and the state that a checkpoint keeps."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from distill.errors import ConfigError, WeightsError
from distill.modeling import quantization as quantizing
from distill.modeling.quantization import (
    Grid,
    Quantization,
    freeze_statistics,
    measured,
    rounded_weight,
)
from tests.support.cases import for_each
from tests.support.exports import confident
from tests.support.networks import image_dict, outspoken_model, tiny_model
from tests.support.trainings import differences


def images(*seeds: int) -> list[dict[str, Any]]:
    """Images of two sizes; the second has no object, and the first has one."""
    shapes = (64, 80), (96, 64)
    return [
        image_dict(seed, *shapes[seed % 2], objects=1 - seed % 2, semantic=True) for seed in seeds
    ]


# ---- Numbers.


def test_a_grid_by_hand() -> None:
    grid = Grid.of_range(-1.0, 1.55)
    assert grid is not None and grid.scale == pytest.approx(0.01) and grid.zero_point == 100
    x = torch.tensor([-3.0, -1.0, -0.004, 0.0, 0.006, 1.549, 9.0], requires_grad=True)
    found = grid.rounded(x)
    torch.testing.assert_close(found, torch.tensor([-1.0, -1.0, 0.0, 0.0, 0.01, 1.55, 1.55]))
    found.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


@for_each(
    "low, high, expected",
    [
        (0.5, 2.55, (0.01, 0)),  # 0 is always on the grid
        (-2.55, -0.5, (0.01, 255)),
        (0.0, 0.0, None),
        (0.0, 1e-37, None),  # whose scale is no normal number
        (float("nan"), float("nan"), None),
    ],
)
def test_a_grid_has_zero(low: float, high: float, expected: Any) -> None:
    assert Grid.of_range(low, high) == (expected and pytest.approx(expected))


def test_half_precision_and_empty_tensors_are_rounded() -> None:
    grid = Grid(0.25, 0)
    x = torch.tensor([0.3, 0.4], dtype=torch.bfloat16)
    assert torch.equal(grid.rounded(x), torch.tensor([0.25, 0.5], dtype=torch.bfloat16))
    assert grid.rounded(torch.zeros(0, 3)).shape == (0, 3)


def test_a_weight_has_a_scale_per_channel() -> None:
    """Against NumPy, with a channel of zeros."""
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    weight *= torch.tensor([1.0, 0.01, 0.0, 30.0])[:, None, None, None]
    weight.requires_grad_()
    found = rounded_weight(weight)
    array = weight.detach().numpy()
    scale = np.abs(array).max((1, 2, 3), keepdims=True) / 127
    expected = np.rint(array / np.where(scale, scale, 1)) * scale
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-6, atol=1e-7)
    found.sum().backward()
    assert weight.grad is not None and (weight.grad == 1).all()


def test_a_norm_does_not_change_the_integers() -> None:
    """Rounding before and after a norm is folded is the same, also for negative factors."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 8, 3, 3, generator=generator)
    factor = torch.randn(16, 1, 1, 1, generator=generator)
    torch.testing.assert_close(rounded_weight(weight * factor), rounded_weight(weight) * factor)


def test_measured_values() -> None:
    x = torch.randn(50000, generator=torch.Generator().manual_seed(0)).view(2, 5, 50, 100)
    assert measured(x, "mean").tolist() == [x.min(), x.max()]
    low, high = measured(x, "percentile").tolist()
    a, b = np.quantile(x.numpy(), [1e-4, 1 - 1e-4])
    assert low == pytest.approx(a, abs=0.2) and high == pytest.approx(b, abs=0.2)
    assert x.min() < low and high < x.max()
    assert measured(torch.tensor([2.0]), "percentile").tolist() == [2, 2]


# ---- Ranges.


class Wrapped(nn.Module):
    """Two layers with the call of a detectron2 network."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.size_divisibility = 1  # type: ignore[assignment]
        self.first, self.last = nn.Linear(128, 1, bias=False), nn.Linear(1, 1)
        nn.init.constant_(self.first.weight, 1 / 128)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        return self.last(self.first(batched_inputs[0]["image"]))


def entry(*values: float) -> list[dict[str, Any]]:
    return [{"image": torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, 128)}]


@for_each(
    "method, expected",
    [("mean", [-2.5, 4.0]), ("percentile", [-2.5, 4.0]), ("minmax", [-4.0, 6.0])],
)
def test_ranges_of_steps(method: str, expected: list[float]) -> None:
    model = Wrapped().eval()
    quantization = Quantization(model, method=method)
    with quantization.calibration():
        for step in ([entry(-1, 1), entry(0, 2)], [entry(-4, 6)]):  # two forwards are one step
            for x in step:
                model(x)
            quantization.update()
    assert quantization.state_dict() == {
        "steps": 2,
        "ranges": {"first.input": expected, "first.output": pytest.approx(expected)},
    }
    model(entry(-100, 100))  # only a calibration measures in evaluation mode
    quantization.update()
    assert quantization.state_dict()["ranges"]["first.input"] == expected


def test_values_that_are_not_finite_do_not_count() -> None:
    model = Wrapped().train()
    quantization = Quantization(model)
    for x in (entry(-1, 1), entry(float("nan"), 5), entry(-float("inf"), 3)):
        model(x)
        quantization.update()
    assert quantization.state_dict()["ranges"]["first.input"] == pytest.approx([-1, 5 / 3])


def test_processes_have_the_ranges_of_the_joint_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Wrapped().train()
    quantization = Quantization(model)
    model(entry(-1, 2))

    def all_reduce(x: Tensor, operation: Any) -> None:
        assert operation is dist.ReduceOp.MAX
        others = {"first.input": [4.0, 1.0], "first.output": [-math.inf, 3.0]}
        rows = [others[site.name] for site in quantization.sites]
        x.copy_(x.maximum(torch.tensor(rows)))

    monkeypatch.setattr(quantizing.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(quantizing.dist, "all_reduce", all_reduce)
    quantization.update()
    ranges = quantization.state_dict()["ranges"]
    assert ranges["first.input"] == [-4, 2] and ranges["first.output"] == pytest.approx([-1, 3])


def test_a_long_average_forgets() -> None:
    model = Wrapped().train()
    quantization = Quantization(model)
    for value in [1.0] * 150 + [2.0]:
        model(entry(value))
        quantization.update()
    assert quantization.state_dict()["ranges"]["first.input"][1] == pytest.approx(1.01)


# ---- Networks.


@pytest.mark.parametrize("family", ["mask", "retinanet", "rtmdet", "semantic"])
def test_a_quantized_training_step(family: str, storage: EventStorage) -> None:
    model = outspoken_model(family, norm="BN")
    freeze_statistics(model)
    names = model.state_dict().keys()
    exact = model(images(0, 1))
    quantization = Quantization(model, calibration_steps=1)
    torch.manual_seed(0)
    first = model(images(0, 1))
    assert not quantization.active
    quantization.update()
    assert quantization.active
    torch.manual_seed(0)
    losses, again = model(images(0, 1)), model(images(0, 1))
    assert losses.keys() == exact.keys()
    changed = [k for k in losses if not torch.equal(losses[k], first[k])]
    assert changed and all(x.isfinite() for x in losses.values())
    if family == "retinanet":  # it draws no random numbers
        assert all(torch.allclose(losses[k], again[k], rtol=0.1) for k in losses)
    sum(losses.values()).backward()
    inner = {name: model.get_submodule(name) for name in quantization.layers}
    untrained = {name for name, x in inner.items() if x.weight.grad is None}
    assert untrained <= {"backbone.fpn_lateral2"}  # RTMDet's head does not read this level
    assert model.state_dict().keys() == names
    assert not any("weight" in vars(x) for x in inner.values())


def test_until_it_is_active_a_network_computes_as_before() -> None:
    model = tiny_model("retinanet", norm="BN")
    plain = copy.deepcopy(model)
    quantization = Quantization(model, calibration_steps=2)
    with EventStorage():
        for k in range(3):
            found, expected = model(images(k)), plain(images(k))
            same = [torch.equal(found[name], expected[name]) for name in found]
            assert all(same) == (k < 2)
            quantization.update()


def test_a_layer_that_fails_keeps_its_weight() -> None:
    model = Wrapped().train()
    quantization = Quantization(model)
    model(entry(1, 2))
    quantization.update()
    with pytest.raises(RuntimeError):
        model([{"image": torch.zeros(2, 3)}])
    assert isinstance(model.first.weight, nn.Parameter)


def test_batch_norms_keep_their_statistics(storage: EventStorage) -> None:
    model = tiny_model("retinanet", norm="BN")
    freeze_statistics(model)
    norm = model.get_submodule("backbone.bottom_up.stem.conv1.norm")
    mean = norm.running_mean.clone()
    sum(model.train()(images(0)).values()).backward()
    assert torch.equal(norm.running_mean, mean) and norm.weight.grad is not None


def test_a_network_without_inner_layers_is_refused() -> None:
    model = Wrapped()
    model.first = nn.Identity()  # type: ignore[assignment]
    model.last = nn.Linear(128, 1)
    with pytest.raises(ConfigError, match=r"Wrapped has no convolution or linear layer before"):
        Quantization(model)


# ---- Checkpoints.


def calibrated(family: str = "retinanet") -> Quantization:
    model = confident(family)
    quantization = Quantization(model)
    with quantization.calibration(), torch.no_grad():
        model(images(0))
        quantization.update()
    return quantization


def test_a_state_gives_the_same_network(tmp_path: Path) -> None:
    old = calibrated()
    torch.save({"model": {}, "quantization": old.state_dict()}, tmp_path / "model.pth")
    new = Quantization(confident("retinanet"))
    assert new.load(str(tmp_path / "model.pth")) and new.active
    assert not differences(old.state_dict(), new.state_dict())
    with torch.no_grad():
        a, b = (x.model(images(1))[0]["instances"] for x in (old, new))
    assert len(a) > 0 and torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


@for_each(
    "state, message",
    [
        ({"steps": 1, "ranges": {"neck.input": [0.0, 1.0]}}, "'neck.input' has a range, but is"),
        ({"steps": 1, "ranges": {"first.input": [0.0]}}, "the range of first.input is [0.0]"),
        ({"steps": 1, "ranges": {"first.input": [0.0, float("inf")]}}, "is [0.0, inf]"),
        ({"steps": "1", "ranges": {}}, "there are no ranges"),
        ({}, "there are no ranges"),
        ([1], "there are no ranges"),
    ],
)
def test_a_state_of_another_network_is_refused(state: Any, message: str, tmp_path: Path) -> None:
    torch.save({"model": {}, "quantization": state}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match="is of another quantization") as error:
        Quantization(Wrapped()).load(str(tmp_path / "model.pth"))
    assert message in str(error.value)


def test_a_checkpoint_without_ranges(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "model.pth")
    quantization = Quantization(Wrapped())
    assert not quantization.load(str(tmp_path / "model.pth"))
    assert not quantization.load("model.safetensors") and not quantization.active

"""Fake quantization of a network to 8 bits, as its exported INT8 file computes it.

Activations are unsigned integers with a scale and a zero point per tensor. Weights are signed
integers with a scale per output channel. Ranges are moving averages, and gradients pass the
rounding:

- Jacob et al., Quantization and Training of Neural Networks for Efficient
  Integer-Arithmetic-Only Inference, Sec. 3
- Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, Sec. 2

A batch norm multiplies the channels of a layer, and a scale per channel moves with its factor. So
weights have the same integers before and after a norm is folded into them.

torch has such classes in ``torch.ao.quantization``, but it announces their removal.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoint.load import read_part
from ..errors import ConfigError, WeightsError
from ..utils.text import shortened
from .layer_graph import Site, layer_graph

PART = "quantization"  # key in a checkpoint

STEPS = 255  # largest integer of an activation
LARGEST = 127  # largest integer of a weight; -128 is not used, so that weights are symmetric
MOMENTUM = 0.01  # least share of a step in the average of the ranges
TAIL = 1e-4  # share of the values that percentiles leave out at each end
METHODS = ("mean", "minmax", "percentile")


class Grid(NamedTuple):
    """The 256 values that a quantized tensor can have, scale · (0 ... 255 − zero_point)."""

    scale: float
    zero_point: int

    @classmethod
    def of_range(cls, low: float, high: float) -> "Grid | None":
        """Return the grid from ``low`` to ``high``, which has 0; None if the range is empty."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / STEPS
        if not scale > torch.finfo(torch.float32).tiny:  # also for NaN
            return None
        return cls(scale, round(-low / scale))

    def rounded(self, x: Tensor) -> Tensor:
        """Return the nearest values. Their gradient is that of ``x``, and 0 outside the range."""
        if torch.compiler.is_exporting():
            return round_to_grid(x, *self)
        return torch.fake_quantize_per_tensor_affine(x.float(), *self, 0, STEPS).to(x.dtype)


@torch.library.custom_op("distill::round_to_grid", mutates_args=())
def round_to_grid(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Round as :meth:`Grid.rounded`; an operator for exporters, for which torch's has no shape."""
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, STEPS)


@round_to_grid.register_fake
def _(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.empty_like(x)


ROUND_TO_GRID: Any = torch.ops.distill.round_to_grid.default
"""The operator in an exported program."""


def rounded_weight(weight: Tensor) -> Tensor:
    """Return a weight (C, ...) rounded to 255 values per output channel, with its gradient."""
    largest = weight.detach().flatten(1).abs().amax(1)
    scale = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -LARGEST, LARGEST)


def measured(x: Tensor, method: str) -> Tensor:
    """Return the (2,) lower and upper end of the values of a tensor.

    Args:
        x: any shape, not empty.
        method: "percentile" leaves out :data:`TAIL` of the values at each end.
    """
    x = x.detach().float().flatten()
    if method == "percentile":
        rank = 1 + int(TAIL * (x.numel() - 1))
        return torch.stack([x.kthvalue(rank)[0], x.kthvalue(x.numel() + 1 - rank)[0]])
    return torch.stack(x.aminmax())


class Quantization:
    """Fake quantization of a network by hooks, which its parameters and state dict do not show.

    Until :attr:`active`, the ranges of the tensors are measured and nothing is rounded. A forward
    in training measures, too, but only :meth:`update` changes the ranges. So a forward may be
    repeated.

    Args:
        model: a detectron2 network.
        method: one of :data:`METHODS`. "mean" and "percentile" average the ranges of the steps,
            "minmax" takes their ends.
        calibration_steps: number of updates before the network is quantized.

    Attributes:
        sites: the quantized tensors.
        layers: names of the layers whose weights are quantized.
        steps: number of updates.

    Raises:
        ConfigError: the network has no layer that integers can compute.
    """

    def __init__(self, model: nn.Module, *, method: str = "mean", calibration_steps: int = 0):
        graph = layer_graph(model)
        if not graph.layers:
            raise ConfigError(
                f"{type(model).__name__} has no convolution or linear layer before its last ones, "
                "so it cannot be quantized."
            )
        self.model = model
        self.method = method
        self.calibration_steps = calibration_steps
        self.sites, self.layers = graph.sites, graph.layers
        self.steps = 0
        self.calibrating = False
        self._ranges = torch.full((len(self.sites), 2), math.nan)
        self._grids: list[Grid | None] = [None] * len(self.sites)
        self._seen: dict[int, Tensor] = {}
        modules = dict(model.named_modules())
        for k, site in enumerate(self.sites):
            hook_tensor(modules[site.module], site, self._rounding(k))
        for name in self.layers:
            hook_weight(modules[name], lambda: self.active)

    @property
    def active(self) -> bool:
        """True if the network is quantized."""
        return not self.calibrating and self.steps >= max(self.calibration_steps, 1)

    def _rounding(self, k: int) -> Callable[[Tensor], Tensor]:
        """Return the function that measures and rounds the tensor of a site."""

        def rounding(x: Tensor) -> Tensor:
            if (self.model.training or self.calibrating) and x.numel():
                self._measure(k, x)
            grid = self._grids[k] if self.active else None
            return x if grid is None else grid.rounded(x)

        return rounding

    def _measure(self, k: int, x: Tensor) -> None:
        """Widen the range of this step, whose ends are kept as (−low, high) for one maximum."""
        low, high = measured(x, self.method)
        ends = torch.stack([-low, high])
        self._seen[k] = torch.maximum(self._seen[k], ends) if k in self._seen else ends

    @contextmanager
    def calibration(self) -> Iterator[None]:
        """Measure in evaluation mode, too; :meth:`update` ends a step."""
        self.calibrating = True
        try:
            yield
        finally:
            self.calibrating = False

    def update(self) -> None:
        """Move the ranges towards those of the forward passes since the last update.

        Several processes have the ranges of their joint batch.
        """
        self.steps += 1
        device = next(self.model.parameters()).device
        nothing = torch.full((2,), -math.inf, device=device)
        ends = torch.stack([self._seen.get(k, nothing) for k in range(len(self.sites))])
        if comm.get_world_size() > 1:
            dist.all_reduce(ends, dist.ReduceOp.MAX)
        self._seen = {}
        ends = ends.cpu() * torch.tensor([-1.0, 1.0])
        self._ranges = torch.where(ends.isfinite(), self._merged(ends), self._ranges)
        self._set_grids()

    def _merged(self, ends: Tensor) -> Tensor:
        """Return the ranges after a step with these (n, 2) ends."""
        old = torch.where(self._ranges.isnan(), ends, self._ranges)
        if self.method == "minmax":
            return torch.stack([old.minimum(ends)[:, 0], old.maximum(ends)[:, 1]], 1)
        return old.lerp(ends, max(1 / self.steps, MOMENTUM))

    def _set_grids(self) -> None:
        self._grids = [
            Grid.of_range(0.0 if site.rectified else low, high)
            for site, (low, high) in zip(self.sites, self._ranges.tolist())
        ]

    # ---- Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates, and the range of each tensor that was measured."""
        ranges = {site.name: ends for site, ends in zip(self.sites, self._ranges.tolist())}
        return {
            "steps": self.steps,
            "ranges": {name: ends for name, ends in ranges.items() if is_range(ends)},
        }

    def misfits(self, state: Mapping[str, Any]) -> Iterator[str]:
        """Yield how a state differs from one of this network."""
        names = {site.name for site in self.sites}
        ranges = state.get("ranges") if isinstance(state, dict) else None
        if not isinstance(ranges, dict) or not isinstance(state.get("steps"), int):
            yield "there are no ranges of quantized tensors"
            return
        for name, ends in ranges.items():
            if name not in names:
                yield f"{name!r:.80} has a range, but is not quantized"
            elif not is_range(ends):
                yield f"the range of {name} is {ends!r:.80}"

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        unknown = [math.nan, math.nan]
        self._ranges = torch.tensor([state["ranges"].get(x.name, unknown) for x in self.sites])
        self._set_grids()

    def load(self, path: str) -> bool:
        """Load the ranges of a checkpoint, and return whether it has any.

        Raises:
            WeightsError: they do not fit this network.
        """
        state = read_part(path, PART)
        if state is None:
            return False
        if faults := list(self.misfits(state)):
            raise WeightsError(
                f"'{path}' is of another quantization: {shortened(faults, 3, '; ')}."
            )
        self.load_state_dict(state)
        return True


def is_range(ends: Any) -> bool:
    """Return whether a value of a checkpoint is a finite lower and upper end."""
    pair = isinstance(ends, list | tuple) and len(ends) == 2
    return pair and all(isinstance(x, float) and math.isfinite(x) for x in ends)


def build_quantization(cfg: CfgNode, model: nn.Module) -> Quantization | None:
    """Quantize a student as ``SOLVER.QAT`` says; None if that is off.

    Batch norms use and keep their statistics in training, because a file has them folded.
    """
    node = cfg.SOLVER.QAT
    if not node.ENABLED:
        return None
    freeze_statistics(model)
    return Quantization(model, calibration_steps=node.CALIBRATION_ITERS)


# ---- Hooks.


def hook_tensor(module: nn.Module, site: Site, function: Callable[[Tensor], Tensor]) -> None:
    """Replace the first input, or the output, of a module by a function of it."""
    if site.is_input:
        module.register_forward_pre_hook(lambda _, args: (function(args[0]), *args[1:]))
    else:
        module.register_forward_hook(lambda _, args, output: function(output))


def hook_weight(layer: nn.Module, active: Callable[[], bool]) -> None:
    """Let a layer compute with its rounded weight while ``active()``.

    The rounded weight is an attribute of the instance during the forward. It hides the parameter,
    which stays where state dict and optimizer know it.
    """

    def hide(*_: Any) -> None:
        if active() and not torch.compiler.is_exporting():  # a file rounds what is folded
            vars(layer)["weight"] = rounded_weight(layer.get_parameter("weight"))

    def reveal(*_: Any) -> None:
        vars(layer).pop("weight", None)

    layer.register_forward_pre_hook(hide)
    layer.register_forward_hook(reveal, always_call=True)


def freeze_statistics(model: nn.Module) -> None:
    """Let batch norms use and keep their statistics in training."""
    norms = [x for x in model.modules() if isinstance(x, _BatchNorm)]

    def freeze(*_: Any) -> None:
        for norm in norms:
            norm.eval()

    model.register_forward_pre_hook(freeze)

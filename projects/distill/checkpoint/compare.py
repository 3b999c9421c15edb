"""Comparison of a checkpoint with the training that would continue from it.

torch assigns what it reads without a look at shapes in places: a fused optimizer on a CPU then
writes outside its memory. So everything is compared before anything is assigned.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from ..utils.text import shortened

# Tensors that these optimizers keep of a parameter. Other optimizers may keep any.
_KEPT: tuple[tuple[type[torch.optim.Optimizer], frozenset[str]], ...] = (
    (torch.optim.Adam, frozenset({"step", "exp_avg", "exp_avg_sq"})),
    (torch.optim.AdamW, frozenset({"step", "exp_avg", "exp_avg_sq"})),
    (torch.optim.SGD, frozenset({"momentum_buffer"})),
)


def tensor_misfits(
    saved: Mapping[str, Any], own: Mapping[str, Tensor], optional: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yield how saved tensors differ from those into which they go, by name, shape and dtype.

    Args:
        saved: values of a checkpoint by name, which may be anything.
        own: tensors of this training by name.
        optional: names that may be missing or unexpected.
    """
    for name, x in own.items():
        if name not in saved:
            if name not in optional:
                yield f"{name} is missing"
        elif problem := _misfit(saved[name], tuple(x.shape), x.dtype):
            yield f"{name} {problem}"
    known = {*own, *optional}
    yield from (f"{name} is unexpected" for name in saved if name not in known)


def optimizer_misfits(
    saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> Iterator[str]:
    """Yield how the saved state of an optimizer differs from what its parameters need.

    Args:
        saved: state dict of a checkpoint, which may be anything.
        optimizer: optimizer of this training.
        names: names of the parameters.
    """
    own = optimizer.state_dict()["param_groups"]
    sizes = [[len(group["params"]) for group in x] for x in (saved["param_groups"], own)]
    if sizes[0] != sizes[1]:
        yield "the optimizer has groups of {} parameters where {} are needed".format(*sizes)
        return
    parameters = [x for group in optimizer.param_groups for x in group["params"]]
    kept = next((keys for kind, keys in _KEPT if isinstance(optimizer, kind)), None)
    for index, state in saved["state"].items():
        if not (isinstance(index, int) and 0 <= index < len(parameters)):
            yield f"the optimizer has no parameter {index!r:.40}"
        elif kept is not None:
            name = names.get(parameters[index], index)
            yield from (f"{x} of {name}" for x in _state_misfits(state, parameters[index], kept))


def _state_misfits(
    state: Mapping[str, Any], parameter: Tensor, kept: frozenset[str]
) -> Iterator[str]:
    yield from (f"{key} is missing" for key in sorted(kept - {*state}) if len(kept) > 1)
    for key, value in state.items():
        if value is None and key == "momentum_buffer":  # before the first step with momentum
            continue
        if key not in kept:
            yield f"{key!r:.40} is unexpected"
        elif key == "step":
            problem = "" if type(value) in (int, float) else _misfit(value, (), torch.float32)
            if problem:
                yield f"step {problem}"
        elif problem := _misfit(value, tuple(parameter.shape), parameter.dtype):
            yield f"{key} {problem}"
        elif value.stride() != parameter.stride() and not value.is_contiguous():
            yield f"{key} is not an ordinary tensor"  # a fused step would write beyond its storage


def _misfit(value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Return why a value cannot be assigned to a tensor, or ""."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return "is not an ordinary tensor"
    if tuple(value.shape) != shape:
        return f"has shape {tuple(value.shape)} where {shape} is needed"
    if value.dtype != dtype:
        return f"is of {value.dtype} where {dtype} is needed"
    return ""


def refuse_misfits(path: str, misfits: Iterator[str], hint: str = "") -> None:
    """Raise a WeightsError that names the first differences, if there are any.

    Args:
        path: file of the checkpoint.
        misfits: the differences.
        hint: text to add to them.
    """
    if found := list(misfits):
        raise WeightsError(
            f"'{path}' is of another training: {shortened(found, 3, '; ')}{hint}; use its config, "
            "or start anew in another OUTPUT_DIR, where MODEL.WEIGHTS may be this file."
        )

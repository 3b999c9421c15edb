"""Weights in files of other tools: below a name, or with a prefix before their names."""

import pickle
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import WeightsError
from ..utils.text import shortened

# Names below which training tools keep a state dict. detectron2's own "model" comes before them.
WRAPPERS = ("state_dict", "model_state", "model_state_dict", "ema_state", "model_ema", "ema")


def unwrapped(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a file with its state dict below "model", as detectron2 keeps it.

    Raises:
        UnpicklingError: it holds no tensors.
        WeightsError: it holds several state dicts.
    """
    if isinstance(content.get("model"), Mapping) or any(map(_is_tensor, content.values())):
        return dict(content)
    found = [name for name in WRAPPERS if _holds_tensors(content.get(name))]
    if len(found) > 1:
        raise WeightsError(
            f"it holds several sets of weights ({', '.join(found)}); save the one that you mean as "
            "a file of its own."
        )
    if not found and content:
        keys = shortened([f"{key!r:.40}" for key in content], 8)
        raise pickle.UnpicklingError(f"it holds no weights; its keys are {keys}")
    return {"model": dict(content[found[0]])} if found else dict(content)


def without_prefix(state: Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the tensors of a file by the names of a network.

    If no name fits, but names with one prefix do, they are returned without it.

    Args:
        state: tensors or arrays of the file by name.
        own: tensors of the network by name.

    Raises:
        WeightsError: names with several prefixes fit.
    """
    if state.keys() & own.keys():
        return dict(state)
    fitting: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for depth in range(1, min(len(parts), 4)):
            if ".".join(parts[depth:]) in own:
                fitting[".".join(parts[:depth]) + "."] += 1
    if len(fitting) > 1:
        counts = ", ".join(f"'{prefix}' ({number})" for prefix, number in fitting.most_common())
        raise WeightsError(
            f"its names fit without a prefix, but there are several prefixes: {counts}; save the "
            "weights that you mean as a file of its own."
        )
    if not fitting:
        return dict(state)
    prefix = next(iter(fitting))
    return {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}


def prefixes(names: Mapping[str, Any]) -> str:
    """Return the first parts of names for a message, with the number of each."""
    counts = Counter(name.partition(".")[0] for name in names)
    return shortened([f"{name} ({number})" for name, number in counts.most_common()], 5)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _holds_tensors(x: Any) -> bool:
    return isinstance(x, Mapping) and any(map(_is_tensor, x.values()))

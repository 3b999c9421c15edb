"""Weights in files of other tools: below a name, with a prefix, or with names of a library."""

import logging
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import WeightsError
from ..utils.text import shortened

logger = logging.getLogger(__name__)

# Names below which training tools keep a state dict. detectron2's own "model" comes before them.
WRAPPERS = ("state_dict", "model_state", "model_state_dict", "ema_state", "model_ema", "ema")


class Library(NamedTuple):
    """A library whose networks detectron2 does not have.

    Attributes:
        networks: its networks, for messages.
        marks: parts of names that only weights of these networks have.
        remedy: how to use such weights.
    """

    networks: str
    marks: tuple[str, ...]
    remedy: str


_BUILD = (
    "as a teacher, let MODEL.DISTILL.TEACHER.CONFIG_FILE name a 'file.py:function' that builds its "
    "network and loads these weights (see the page 'Choose a teacher')"
)
LIBRARIES = (
    Library("detectors of torchvision", ("backbone.body.", "head.classification_head."), _BUILD),
    Library(
        "ResNets of torchvision and timm",
        ("layer1.0.conv1.", "layer4.0.conv1."),
        "convert them with detectron2's tools/convert-torchvision-to-d2.py",
    ),
    Library(
        "Hugging Face's transformers",
        (
            *("model.encoder.layers.", "model.decoder.layers.", "class_labels_classifier."),
            *(".embedder.embedder.", "embeddings.patch_embeddings."),
        ),
        _BUILD,
    ),
)
"""Libraries whose files users try; the first of which a mark fits is named."""


def conversion(names: Iterable[str]) -> str:
    """Return whose names these are and how to use such weights, as a clause; "" if unknown."""
    found = list(names)
    for library in LIBRARIES:
        if any(mark in name for mark in library.marks for name in found):
            return f"its names are those of {library.networks}; {library.remedy}"
    return ""


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

    If no name fits, but names with one prefix do, they are returned without it. The log has the
    others.

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
    others = [name for name in state if not name.startswith(prefix)]
    if others:
        logger.warning(
            "Only the tensors with the prefix '%s' are read, not %s", prefix, shortened(others, 5)
        )
    return {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}


def prefixes(names: Mapping[str, Any]) -> str:
    """Return the first parts of names for a message, with the number of each."""
    counts = Counter(name.partition(".")[0] for name in names)
    return shortened([f"{name} ({number})" for name, number in counts.most_common()], 5)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _holds_tensors(x: Any) -> bool:
    return isinstance(x, Mapping) and any(map(_is_tensor, x.values()))

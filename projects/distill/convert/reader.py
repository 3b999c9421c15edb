"""Read the authors' files without executing anything of them."""

import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoint.load import read_torch
from ..checkpoint.unpickler import require_dict
from ..errors import WeightsError
from .sources import Source

# Objects in checkpoints of mmengine and YOLOX, beside the weights: logs and the best result.
_IGNORED = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",  # with which Python pickles methods
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",  # its name in NumPy 2
    "numpy._core.multiarray._reconstruct",
)


class _Ignored:
    """Replacement of an object that is not needed; it does nothing, whatever the file asks."""

    def __new__(cls, *_: Any) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _replacement(path: str) -> type[_Ignored]:
    """Return a class that torch takes for the one of this name."""
    module, _, name = path.rpartition(".")
    return type(name, (_Ignored,), {"__module__": module})


_REPLACEMENTS: list[Any] = [_replacement(path) for path in _IGNORED]


def read_content(path: str, source: Source) -> Mapping[str, Any]:
    """Return the content of a file, in which replacements stand for some objects.

    Raises:
        WeightsError: the file has objects that only the authors' code can read.
        UnpicklingError: it is not a dictionary.
    """
    try:
        with torch.serialization.safe_globals(_REPLACEMENTS):
            content = read_torch(path)
    except pickle.UnpicklingError as e:
        if "it calls" not in str(e):  # then it is no checkpoint at all
            raise
        raise WeightsError(
            f"'{path}' cannot be read without executing it: {e}. If you trust it, save its tensors "
            f"in the folder of {source.code}, and convert that file: {save_command(path, source)}"
        ) from e
    return require_dict(content)


def save_command(path: str, source: Source) -> str:
    """Return the shell command that saves the state dict of a file in the authors' code."""
    path = os.path.abspath(path)
    out = f"{os.path.splitext(path)[0]}_tensors.pth"
    return (
        f'python -c "import torch; c = torch.load({path!r}, weights_only=False, '
        f"map_location='cpu'); torch.save({source.tensors}, {out!r})\""
    )

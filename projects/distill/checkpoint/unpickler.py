"""Unpickler that reads arrays and plain containers, and executes nothing of the file.

This protects against a prepared file; a hash does not. Such a file may still end the process, for
example by nesting too deep for Python's stack, but it cannot run code.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class _DType:
    """Replacement of ``numpy.dtype``, which accepts numbers and booleans only."""

    def __init__(self, code: str, *_: Any):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise pickle.UnpicklingError(f"it has an array of dtype {code!r:.20}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])

    def read(self, data: str | bytes) -> np.ndarray:
        """Return the numbers in ``data`` as an (N,) copy in this machine's byte order."""
        raw = data.encode("latin1") if isinstance(data, str) else data  # str: written by Python 2
        return np.frombuffer(raw, self.dtype).astype(self.dtype.newbyteorder("="))


class _Array:
    """Replacement of ``numpy.ndarray``, which a pickle creates empty before it sets the state."""

    array: np.ndarray

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Sequence[Any]) -> None:
        _, shape, dtype, fortran, data = state
        self.array = dtype.read(data).reshape(shape, order="F" if fortran else "C")


def _array_from_buffer(data: bytes, dtype: _DType, shape: Sequence[int], order: str) -> _Array:
    array = _Array()
    array.array = dtype.read(data).reshape(shape, order="F" if order == "F" else "C")
    return array


def _number(dtype: _DType, data: str | bytes) -> Any:
    return dtype.read(data)[0].item()


def _latin1(text: str = "", *_: Any) -> bytes:
    return text.encode("latin1")


_KNOWN: dict[str, Callable[..., Any]] = {
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": _number,
    "numpy.core.numeric._frombuffer": _array_from_buffer,
    "numpy.ndarray": _Array,
    "numpy.dtype": _DType,
    "_codecs.encode": _latin1,  # bytes, as Python 3 writes them for Python 2
    "__builtin__.bytes": _latin1,  # an empty bytes object
    "collections.OrderedDict": OrderedDict,
}


class ArrayUnpickler(pickle.Unpickler):
    """Unpickler of NumPy's numbers and plain containers, which refuses everything else.

    A pickle calls functions by their names. The functions that arrays need are replaced by those
    of this module, because NumPy's own trust their arguments. For example, NumPy makes an object
    array from bytes, whose elements are pointers to anywhere.
    """

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # its name in NumPy 2
        if path not in _KNOWN:
            raise pickle.UnpicklingError(f"it calls {path}, which arrays do not need")
        return _KNOWN[path]


def read_pickle(path: str) -> dict[str, Any]:
    """Read a checkpoint of detectron2 (``model``, ``__author__``) or of Caffe2 (blobs)."""
    with open(path, "rb") as f:
        data = require_dict(ArrayUnpickler(f, encoding="latin1").load())
    if not {"model", "__author__"} <= set(data):
        blobs = require_dict(data.get("blobs", data))  # only detectors have the key
        weights = {k: v for k, v in blobs.items() if not str(k).endswith("_momentum")}
        data = {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
    weights = require_dict(data["model"])
    arrays = {k: v.array if isinstance(v, _Array) else v for k, v in weights.items()}
    return {**data, "model": arrays}


def require_dict(content: Any) -> dict[Any, Any]:
    """Return ``content`` if it is a dictionary.

    Raises:
        UnpicklingError: it is not.
    """
    if not isinstance(content, dict):
        raise pickle.UnpicklingError(f"it holds a {type(content).__name__}, not a dictionary")
    return content

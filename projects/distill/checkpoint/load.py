"""Reading weights: any format that detectron2 reads, strictly, and executing nothing of a file.

Torch's formats are read with ``weights_only``. A ``*.pkl`` goes through :class:`ArrayUnpickler`,
which knows NumPy's numbers and plain containers; and it must be of detectron2's catalogue, or
allowed by MODEL.ALLOW_PICKLE.

Files of the catalogue are checked by a hash before they are read:

- ``model_final_<6 hex>.pkl`` carry the beginning of their md5 (MODEL_ZOO.md of detectron2). So few
  digits of such a hash show damage; they do not stop somebody who prepares a file to fit.
- The others (``R-50.pkl``) have no published hash. The sha256 of the first file that could be read
  is kept beside it in detectron2's cache, ``<file>.pkl.sha256``, and holds from then on.

What protects against a prepared file is the unpickler, not the hash. Such a file may still end the
process, with a nest too deep for Python's stack for example; it cannot have it run anything.
"""

import hashlib
import logging
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from ..errors import DistillError, WeightsError

logger = logging.getLogger(__name__)

CATALOGUE = (
    "detectron2://",
    "catalog://",
    "https://dl.fbaipublicfiles.com/detectron2/",
    "https://dl.fbaipublicfiles.com/detectron/",
)
ONCE_SAVED = ("pixel_mean", "pixel_std")  # by earlier detectron2; from the config now
_MD5_IN_NAME = re.compile(r"model_final_([0-9a-f]{6})\.pkl$")


# ---- Pickles.


class _DType:
    """Stands for ``numpy.dtype`` in a pickle; numbers and truth values only."""

    def __init__(self, code: str, *_: Any):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise pickle.UnpicklingError(f"it has an array of dtype {code!r:.20}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])

    def read(self, data: str | bytes) -> np.ndarray:
        """The numbers in ``data``, ``(N,)``, in memory of their own and this machine's order."""
        raw = data.encode("latin1") if isinstance(data, str) else data  # str: written by Python 2
        return np.frombuffer(raw, self.dtype).astype(self.dtype.newbyteorder("="))


class _Array:
    """Stands for ``numpy.ndarray`` in a pickle, which makes it empty and then sets its state."""

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
    "__builtin__.bytes": _latin1,  # no bytes at all
    "collections.OrderedDict": OrderedDict,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy's numbers and plain containers from a pickle, and refuses all the rest.

    A pickle calls functions by their names. Those that arrays need are here functions of this
    module: NumPy's own trust their arguments, and an object array made from bytes is a list of
    pointers to anywhere.
    """

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # its name in NumPy 2
        if path not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {path}, which arrays do not need")
        return _KNOWN[path]


def _read_pickle(path: str) -> dict[str, Any]:
    """A detectron2 checkpoint (``model``, ``__author__``), or one made of Caffe2's blobs."""
    with open(path, "rb") as f:
        data = _dictionary(ArrayUnpickler(f, encoding="latin1").load())
    if not {"model", "__author__"} <= set(data):
        blobs = _dictionary(data.get("blobs", data))  # detectors have it, classifiers do not
        weights = {k: v for k, v in blobs.items() if not str(k).endswith("_momentum")}
        data = {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
    weights = _dictionary(data["model"])
    arrays = {k: v.array if isinstance(v, _Array) else v for k, v in weights.items()}
    return {**data, "model": arrays}


def _dictionary(content: Any) -> dict[Any, Any]:
    if not isinstance(content, dict):
        raise pickle.UnpicklingError(f"it holds a {type(content).__name__} for a dictionary")
    return content


# ---- Hashes.


def file_hash(path: str, algorithm: str = "sha256") -> str:
    """The hash of a file in hexadecimal digits."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _pin(path: str) -> str:
    return f"{path}.sha256"


def _check_hash(path: str) -> None:
    """Refuse a file of the catalogue, in detectron2's cache, that does not have its hash."""
    if named := _MD5_IN_NAME.search(path):
        algorithm, expected = "md5", named[1]
    elif os.path.isfile(_pin(path)):
        with open(_pin(path)) as f:
            algorithm, expected = "sha256", f.read(64)
    else:
        return
    if not file_hash(path, algorithm).startswith(expected):
        source = "its name tells" if named else f"'{_pin(path)}' keeps from its first use"
        raise WeightsError(
            f"'{path}' does not have the {algorithm} {expected} that {source}; delete "
            f"{'it' if named else 'both files'}, and it is fetched again."
        )


def _keep_hash(path: str) -> None:
    """Pin a file of the catalogue whose hash nothing else tells."""
    if _MD5_IN_NAME.search(path) or os.path.isfile(_pin(path)):
        return
    try:
        with open(_pin(path), "w") as f:  # as sha256sum writes it
            f.write(f"{file_hash(path)}  {os.path.basename(path)}\n")
    except OSError as e:
        logger.warning("The hash of %s cannot be kept beside it: %s", path, e)


# ---- Checkpoints.


class SafeCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, executing nothing that a file says.

    Args:
        model: receives and gives the weights.
        save_dir: of the checkpoints; "" to load only.
        allow_pickle: read a ``*.pkl`` from outside detectron2's catalogue too.
        save_to_disk: by default in the main process only.
        checkpointables: what else is saved and loaded, by key.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        allow_pickle: bool = False,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.allow_pickle = allow_pickle
        self.source = ""

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load from a file or URL, as detectron2 does.

        Raises:
            WeightsError: the path is not allowed, or the file does not have its hash. What a bad
                file raises may be anything; see :func:`readable`.
        """
        self._check_source(path)
        self.source = path
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # detectron2 forgets to after an error

    def _check_source(self, path: str) -> None:
        """Refuse a path before anything is fetched."""
        if path.startswith(("http://", "ftp://")):
            raise WeightsError(
                f"'{path}' can be changed by anybody on its way; use https:// or a local file."
            )
        if "://" in path and ".." in path.split("/"):  # the cache repeats the path of the URL
            raise WeightsError(f"'{path}' has a '..'; write the URL without it.")
        pickled = path.partition("?")[0].endswith(".pkl")
        if pickled and not self.allow_pickle and not path.startswith(CATALOGUE):
            raise WeightsError(
                f"'{path}' is a pickle from outside detectron2's catalogue; set MODEL.ALLOW_PICKLE "
                "True to read its arrays, or convert it to .pth."
            )

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            known = self.source.startswith(CATALOGUE)
            if known:
                _check_hash(filename)
            checkpoint = _read_pickle(filename)
            if known:
                _keep_hash(filename)
        elif filename.endswith(".pyth"):  # pycls
            state = _dictionary(self._torch_load(filename).get("model_state"))
            state = {k: v for k, v in state.items() if not str(k).endswith("num_batches_tracked")}
            checkpoint = {"model": state, "__author__": "pycls", "matching_heuristics": True}
        else:
            checkpoint = super()._load_file(filename)
        _check_state(checkpoint["model"])
        return checkpoint

    def _torch_load(self, filename: str) -> dict[Any, Any]:
        return _dictionary(read_torch(filename))


def read_torch(path: str) -> Any:
    """``torch.load`` of tensors and plain types, on the CPU; older than torch's zip files too."""
    if broken := broken_part(path):
        raise OSError(f"its part {broken} is damaged")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on foreign formats, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:  # its text says how to execute the file
        asked = re.search(r"GLOBAL (\S+)", str(e))
        reason = f"it asks for {asked[1]}" if asked else "it is no checkpoint"
        raise pickle.UnpicklingError(f"{reason}, and only tensors and plain types are read") from e


def broken_part(path: str) -> str | None:
    """The first part of a zip file that lacks its checksum, which torch itself does not look at."""
    with open(path, "rb") as f:
        if f.read(4) != b"PK\3\4":  # by which torch knows its zip files
            return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _check_state(state: Any) -> None:
    """Refuse what is no dictionary from names to ordinary tensors or arrays."""
    for name, value in _dictionary(state).items():
        if isinstance(value, Tensor):
            plain = value.layout is torch.strided and value.device.type == "cpu"
            plain &= not (value.is_quantized or value.is_complex() or value.is_nested)
        else:
            plain = isinstance(value, np.ndarray)
        if not (plain and isinstance(name, str)):
            raise pickle.UnpicklingError(f"its model has no ordinary tensor at {name!r:.80}")


class _StrictCheckpointer(SafeCheckpointer):
    """Keeps what did not fit instead of logging it."""

    incompatible: Any = None

    def _load_model(self, checkpoint: Any) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible


@contextmanager
def readable(path: str, key: str) -> Iterator[None]:
    """Say in one sentence why a checkpoint cannot be loaded.

    Args:
        path: file or URL.
        key: config key that gave ``path``, for the message.

    Raises:
        WeightsError: the file is missing, or what is loaded inside failed.
    """
    if "://" not in path and not os.path.isfile(path):
        raise WeightsError(f"{key}: there is no file '{path}'.")
    try:
        yield
    except WeightsError as e:
        raise WeightsError(f"{key}: {e}") from e
    except DistillError:
        raise
    except Exception as e:  # a damaged file raises anything at all
        reason = " ".join(str(e).split()).split(". ")[0][:200] or type(e).__name__
        raise WeightsError(
            f"{key}: '{path}' cannot be read as a checkpoint (missing, truncated or of another "
            f"format): {reason}"
        ) from e


def load_strictly(model: nn.Module, path: str, key: str, *, allow_pickle: bool = False) -> None:
    """Load a checkpoint of which every key must fit, in any format that detectron2 reads.

    Args:
        model: receives the weights.
        path: file or URL.
        key: config key that gave ``path``, for the messages.
        allow_pickle: MODEL.ALLOW_PICKLE.

    Raises:
        WeightsError: the file is missing, unreadable or not allowed, or a key is missing, left
            over or of another shape. A partly loaded teacher is the most common silent failure
            there is.
    """
    if not path:
        raise WeightsError(f"{key} is empty; name a checkpoint file or URL.")
    checkpointer = _StrictCheckpointer(model, allow_pickle=allow_pickle)
    with readable(path, key):
        checkpointer.load(path)
    found = checkpointer.incompatible
    misfits = {k: (a, b) for k, a, b in found.incorrect_shapes}
    problems = [f"{k} has shape {a} where {b} is needed" for k, (a, b) in misfits.items()]
    problems += [f"{k} is missing" for k in found.missing_keys if k not in misfits]
    problems += [f"{k} is left over" for k in found.unexpected_keys if k not in ONCE_SAVED]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" * (len(problems) > 5))
        raise WeightsError(
            f"{key}: '{path}' does not fit {type(model).__name__} of the given config: {shown}."
        )

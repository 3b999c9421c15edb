"""Load weights strictly, in every format that detectron2 reads, without executing the file.

Torch's formats are read with ``weights_only``. A ``*.pkl`` is read by the :mod:`.unpickler`, and
only if it is in detectron2's catalogue or the command line has MODEL.ALLOW_PICKLE True.

The hash of a file of the catalogue is checked before the file is read:

- The name of ``model_final_<6 hex>.pkl`` has the beginning of its md5 (MODEL_ZOO.md of detectron2).
  So few digits show damage, but they do not stop somebody who prepares a file to fit.
- The others (``R-50.pkl``) have no published hash. The sha256 of the first file that could be read
  is kept next to it in detectron2's cache, as ``<file>.pkl.sha256``. Later files must have it.
"""

import logging
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from ..errors import DistillError, WeightsError
from ..utils.io import file_hash
from ..utils.text import first_sentence, shortened
from .formats import conversion, prefixes, unwrapped, without_prefix
from .unpickler import read_pickle, require_dict

logger = logging.getLogger(__name__)

CATALOGUE = (
    "detectron2://",
    "catalog://",
    "https://dl.fbaipublicfiles.com/detectron2/",
    "https://dl.fbaipublicfiles.com/detectron/",
)
BOTTOM_UP = ("backbone.bottom_up.", "backbone.fpn.bottom_up.")  # FPN, PAFPN
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
ONCE_SAVED = ("pixel_mean", "pixel_std")  # by earlier detectron2; from the config now
_MD5_IN_NAME = re.compile(r"model_final_([0-9a-f]{6})\.pkl$")


# ---- Hashes.


def _pin(path: str) -> str:
    return f"{path}.sha256"


def _check_hash(path: str) -> None:
    """Raise a WeightsError if a cached file of the catalogue does not have its hash."""
    if named := _MD5_IN_NAME.search(path):
        algorithm, expected = "md5", named[1]
    elif os.path.isfile(_pin(path)):
        with open(_pin(path)) as f:
            algorithm, expected = "sha256", f.read(64)
    else:
        return
    if not file_hash(path, algorithm).startswith(expected):
        source = "of its name" if named else f"in '{_pin(path)}' from its first use"
        raise WeightsError(
            f"'{path}' does not have the {algorithm} {expected} {source}; delete "
            f"{'it' if named else 'both files'} to download it again."
        )


def _keep_hash(path: str) -> None:
    """Keep the hash of a file of the catalogue unless its name has it."""
    if _MD5_IN_NAME.search(path) or os.path.isfile(_pin(path)):
        return
    try:
        with open(_pin(path), "w") as f:  # as sha256sum writes it
            f.write(f"{file_hash(path)}  {os.path.basename(path)}\n")
    except OSError as e:
        logger.warning("The hash of %s cannot be written next to it: %s", path, e)


# ---- Checkpoints.


class SafeCheckpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` that executes nothing of a file.

    Args:
        model: network whose weights are loaded and saved.
        save_dir: folder of the checkpoints, or "" to load only.
        allow_pickle: also read a ``*.pkl`` from outside detectron2's catalogue.
        save_to_disk: write checkpoints; by default only the main process does.
        checkpointables: other objects to save and load, by key.

    Attributes:
        in_file: tensors of the last file by their names in the network.
        incompatible: keys of the last file that did not fit, as fvcore returns them.
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
        self.in_file: dict[str, Any] = {}
        self.incompatible: Any = None

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load from a file or URL, as detectron2 does.

        Raises:
            WeightsError: the path is not allowed, or the file does not have its hash. A damaged
                file may raise anything; see :func:`readable`.
        """
        self._check_source(path)
        self.source = path
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # which detectron2 keeps after an error

    def _check_source(self, path: str) -> None:
        """Raise a WeightsError before anything is downloaded from a path that is not allowed."""
        if path.startswith(("http://", "ftp://")):
            raise WeightsError(
                f"'{path}' is not encrypted, so anybody can change the file on its way; use "
                "https:// or a local file."
            )
        if "://" in path and ".." in path.split("/"):  # the cache repeats the path of the URL
            raise WeightsError(f"'{path}' has a '..'; write the URL without it.")
        pickled = path.partition("?")[0].endswith(".pkl")
        if pickled and not self.allow_pickle and not path.startswith(CATALOGUE):
            raise WeightsError(
                f"'{path}' is a pickle that is not in detectron2's catalogue; add "
                "'MODEL.ALLOW_PICKLE True' to the command to read its arrays, or convert it to "
                ".pth."
            )

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            known = self.source.startswith(CATALOGUE)
            if known:
                _check_hash(filename)
            checkpoint = read_pickle(filename)
            if known:
                _keep_hash(filename)
        elif filename.endswith(".pyth"):  # pycls
            state = require_dict(require_dict(read_torch(filename)).get("model_state"))
            state = {k: v for k, v in state.items() if not str(k).endswith("num_batches_tracked")}
            checkpoint = {"model": state, "__author__": "pycls", "matching_heuristics": True}
        else:
            checkpoint = super()._load_file(filename)
        _check_state(checkpoint["model"])
        if not checkpoint.get("matching_heuristics"):
            checkpoint["model"] = without_prefix(checkpoint["model"], self.model.state_dict())
        self.in_file = dict(checkpoint["model"])
        return checkpoint

    def _torch_load(self, filename: str) -> dict[Any, Any]:
        if filename.endswith(".safetensors"):
            return load_safetensors(filename)
        return unwrapped(require_dict(read_torch(filename)))

    def _load_model(self, checkpoint: Any) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible

    def check_filled(self) -> None:
        """Check that the last file has filled the network, at least the greater part of its own.

        Raises:
            WeightsError: nothing fitted, or less than half of the file and of the network.
        """
        found = self.incompatible
        misfits = {*found.missing_keys, *(name for name, *_ in found.incorrect_shapes)}
        # A FrozenBatchNorm has statistics, missing or not.
        own = [x for x in self.model.state_dict() if not x.endswith(STATISTICS)]
        unfilled = [x for x in own if x in misfits]
        filled = len(own) - len(unfilled)
        if not filled or 2 * filled < min(len(own), len(self.in_file)):
            reason = conversion(self.in_file) or (
                f"names in the file begin with {prefixes(self.in_file)}. Name weights of this "
                "backbone or of the whole network"
            )
            raise WeightsError(
                f"'{self.source}' fills {filled} of the network's {len(own)} tensors, not "
                f"{shortened(unfilled, 2)}; {reason}."
            )
        inside = [x for x in own if x.startswith(BOTTOM_UP)]
        without = [x for x in unfilled if x.startswith(BOTTOM_UP)]
        if 0 < len(without) < len(inside):
            logger.warning(
                "'%s' fills %d of the %d tensors of the network's backbone; others, such as %s, "
                "start from random values: is it of another backbone?",
                *(self.source, len(inside) - len(without), len(inside), without[0]),
            )


def read_torch(path: str) -> Any:
    """Load tensors and plain types to the CPU, also from files older than torch's zip format."""
    if broken := broken_part(path):
        raise OSError(f"its part {broken} is damaged")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other formats, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:  # its text says how to execute the file
        asked = re.search(r"GLOBAL (\S+)", str(e))
        reason = f"it calls {asked[1]}" if asked else "it is not a checkpoint"
        raise pickle.UnpicklingError(f"{reason}; only tensors and plain types are read") from e


def read_part(path: str, name: str) -> Any:
    """Return what a checkpoint of this package has below a name, or None without it.

    Args:
        path: file or URL, also of another format.
    """
    if not path.endswith(".pth"):
        return None
    content = read_torch(PathManager.get_local_path(path))
    return content.get(name) if isinstance(content, dict) else None


def broken_part(path: str) -> str | None:
    """Return the first part of a zip file with a wrong checksum, which torch does not check."""
    with open(path, "rb") as f:
        if f.read(4) != b"PK\3\4":  # by which torch knows its zip files
            return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _check_state(state: Any) -> None:
    """Raise an error unless ``state`` maps names to ordinary tensors or arrays."""
    for name, value in require_dict(state).items():
        if isinstance(value, Tensor):
            plain = value.layout is torch.strided and value.device.type == "cpu"
            plain &= not (value.is_quantized or value.is_complex() or value.is_nested)
        else:
            plain = isinstance(value, np.ndarray)
        if not (plain and isinstance(name, str)):
            raise pickle.UnpicklingError(f"{name!r:.80} of its model is not an ordinary tensor")


@contextmanager
def readable(path: str, key: str) -> Iterator[None]:
    """Turn every error while a checkpoint is loaded into one sentence.

    Args:
        path: file or URL.
        key: config key that gave ``path``, for the message.

    Raises:
        WeightsError: the file is missing, or the loading failed.
    """
    if "://" not in path and not os.path.isfile(path):
        raise WeightsError(f"{key}: there is no file '{path}'.")
    try:
        yield
    except WeightsError as e:
        raise WeightsError(f"{key}: {e}") from e
    except DistillError:
        raise
    except Exception as e:  # a damaged file may raise anything
        raise WeightsError(
            f"{key}: '{path}' cannot be read as a checkpoint (missing, truncated or of another "
            f"format): {first_sentence(e)}"
        ) from e


def load_strictly(model: nn.Module, path: str, key: str, *, allow_pickle: bool = False) -> None:
    """Load a checkpoint in any format that detectron2 reads; every key must fit.

    Floats of 16 or 64 bits become those of the network. A partly loaded teacher is the most common
    silent failure of distillation.

    Args:
        model: network that receives the weights.
        path: file or URL.
        key: config key that gave ``path``, for the messages.
        allow_pickle: value of MODEL.ALLOW_PICKLE.

    Raises:
        WeightsError: the file is missing, unreadable or not allowed; or a key of it is missing,
            unexpected, of another shape, or of 8 bits.
    """
    if not path:
        raise WeightsError(f"{key} is empty; name a checkpoint file or URL.")
    checkpointer = SafeCheckpointer(model, allow_pickle=allow_pickle)
    with readable(path, key):
        checkpointer.load(path)
    found = checkpointer.incompatible
    misfits = {k: (a, b) for k, a, b in found.incorrect_shapes}
    problems = [f"{k} has shape {a} where {b} is needed" for k, (a, b) in misfits.items()]
    problems += [f"{k} is missing" for k in found.missing_keys if k not in misfits]
    problems += [f"{k} is unexpected" for k in found.unexpected_keys if k not in ONCE_SAVED]
    problems += _quantized(checkpointer.in_file, model.state_dict())
    if problems and (how := conversion(checkpointer.in_file)):
        raise WeightsError(f"{key}: '{path}' has no weights of a {type(model).__name__}: {how}.")
    if problems:
        raise WeightsError(
            f"{key}: '{path}' does not fit the {type(model).__name__} of its config: "
            f"{shortened(problems, 5, '; ')}."
        )


def _quantized(state: Mapping[str, Any], own: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the floats of a network that have 8 bits in a file.

    torch would convert them without their scale.
    """
    for name, x in own.items():
        value = torch.as_tensor(state[name]) if name in state else x
        if x.is_floating_point() and value.itemsize == 1 and value.dtype != torch.bool:
            yield f"{name} is of {value.dtype} where {x.dtype} is needed"

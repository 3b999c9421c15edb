"""Pickles and checkpoints that execute code where they are loaded."""

import io
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn


def toy(fill: float = 0.0) -> nn.Module:
    """A layer whose ``weight (2, 3)`` and ``bias (2,)`` are ``fill``."""
    layer = nn.Linear(3, 2)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, fill)
    return layer


class Call:
    """Pickled as a call of ``function``."""

    def __init__(self, function: Any, *args: Any):
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def touch(marker: Path) -> str:
    return f"touch {marker}"


def python(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w')"


def evil_file(marker: Path) -> str:
    path = marker.with_suffix(".npy")
    path.write_bytes(pickle.dumps(Call(os.system, touch(marker))))
    return str(path)


def evil_storage(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Call(os.system, touch(marker)), buffer)
    return buffer.getvalue()


def by_name(module: str, name: str, argument: str) -> bytes:
    """A call by ``STACK_GLOBAL``, which also finds attributes of attributes."""
    names = b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, name))
    text = b"X" + len(argument).to_bytes(4, "little") + argument.encode()
    return b"\x80\x04" + names + b"\x93" + text + b"\x85R."


# Each creates the marker where it is executed.
CALLS: dict[str, Callable[[Path], Call]] = {
    "os.system": lambda m: Call(os.system, touch(m)),
    "eval": lambda m: Call(eval, python(m)),
    "exec": lambda m: Call(exec, python(m)),
    "subprocess": lambda m: Call(subprocess.check_call, ["touch", str(m)]),
    "open": lambda m: Call(io.open, str(m), "w"),
    "partial": lambda m: Call(partial(os.system, touch(m))),
    "numpy.load": lambda m: Call(np.load, evil_file(m), None, True),
    "pickle.loads": lambda m: Call(pickle.loads, pickle.dumps(Call(os.system, touch(m)))),
    "torch.load": lambda m: Call(partial(torch.load, weights_only=False), evil_file(m)),
    "torch's storage": lambda m: Call(torch.storage._load_from_bytes, evil_storage(m)),
    "yaml": lambda m: Call(yaml.unsafe_load, f"!!python/object/apply:os.system ['{touch(m)}']"),
}
PICKLES: dict[str, Callable[[Path], bytes]] = {
    **{name: lambda m, call=call: pickle.dumps(call(m), 2) for name, call in CALLS.items()},
    "protocol 0": lambda m: f"cposix\nsystem\n(S'{touch(m)}'\ntR.".encode(),
    "INST": lambda m: f"(S'{touch(m)}'\niposix\nsystem\n.".encode(),
    "OBJ": lambda m: f"(cposix\nsystem\nS'{touch(m)}'\no.".encode(),
    "our own module": lambda m: by_name("distill.checkpoint.load", "os.system", touch(m)),
    "a module that is known": lambda m: by_name("numpy", "f2py.os.system", touch(m)),
}


def zipped(data: bytes, path: Path) -> None:
    """A checkpoint in torch's zip format whose pickle is ``data``."""
    torch.save({"model": toy(7).state_dict()}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)

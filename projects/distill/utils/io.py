"""Files that are written completely or not at all, and their hashes."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a temporary file that replaces ``path`` once all of it is on the disk.

    After a crash at any moment, ``path`` is the old file or the new one.
    """
    temporary = f"{os.fspath(path)}.tmp"
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.lexists(temporary):
            os.remove(temporary)
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in a folder that is created if it does not exist."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with replacing(path) as f:
        f.write(text.encode("utf-8", "backslashreplace"))  # file names may hold half a character


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write indented JSON; every number must be finite."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def file_hash(path: str, algorithm: str = "sha256") -> str:
    """Return the hash of a file in hexadecimal digits."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()

"""Shared parts of the layouts: settings of a split, its temporary folder, and its files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from ...utils.io import write_text
from .scenes import SCENES_VERSION, Scene, SceneConfig, iter_scenes

Progress = Callable[[], None]

_JPEG_QUALITY = 95


class SplitWriter(Protocol):
    """Signature of the ``write_*`` functions; ``progress`` is called after each scene."""

    def __call__(
        self,
        root: str | os.PathLike[str],
        split: str,
        num_scenes: int,
        seed: int = 0,
        config: SceneConfig | None = None,
        *,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None: ...


@dataclasses.dataclass(frozen=True)
class Job:
    """Settings of one split in one layout."""

    layout: str
    split: str
    num_scenes: int
    seed: int
    config: SceneConfig

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9]+", self.split):
            raise ValueError(f"the name of a split has letters and digits only, got {self.split!r}")
        if self.num_scenes < 1:
            raise ValueError(f"a split has at least one scene, got {self.num_scenes}")
        if self.seed < 0:
            raise ValueError(f"the seed must not be negative, got {self.seed}")

    def settings(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "scenes_version": SCENES_VERSION}

    def scenes(self, progress: Progress | None) -> Iterator[Scene]:
        for scene in iter_scenes(self.split, self.num_scenes, self.seed, self.config):
            yield scene
            if progress is not None:
                progress()


@contextmanager
def staging(root: Path, job: Job, owned: Sequence[str], overwrite: bool) -> Iterator[Path | None]:
    """Yield a folder for the files of ``job``, and then move the files below ``root``.

    A marker file records the settings and the number of files. While files are moved, it is not
    "complete", so that the next call can clean up after a killed one.

    Args:
        root: folder of the data set.
        job: settings of the split.
        owned: patterns of the paths below ``root`` that belong to the split.
        overwrite: replace files of the split that were written with other settings.

    Yields:
        The folder, or None if the split already exists.

    Raises:
        FileExistsError: there are other files in place of the split's files. ``overwrite`` replaces
            only files that this module has written, as the marker shows.
    """
    marker = root / ".shapes" / f"{job.layout}-{job.split}.json"
    existing = [path for pattern in owned for path in root.glob(pattern) if path.is_file()]
    record: dict[str, Any] = json.loads(marker.read_text()) if marker.is_file() else {}
    state = {"settings": job.settings(), "files": len(existing), "complete": True}
    if record == state and not overwrite:
        yield None
        return
    if existing and not record:
        raise FileExistsError(
            f"{root} has files of a {job.layout} split {job.split!r} from another source, "
            f"such as {existing[0].name}: choose another folder"
        )
    if existing and record["complete"] and not overwrite:
        raise FileExistsError(
            f"{root} has a {job.layout} split {job.split!r} that was made with other settings "
            "or lost files: choose another folder, or pass --overwrite"
        )

    marker.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{job.split}-", dir=marker.parent) as name:
        folder = Path(name)
        yield folder
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        state["files"] = len(files)
        write_text(marker, json.dumps({**state, "complete": False}))
        for path in existing:
            path.unlink()
        for path in files:
            target = root / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        write_text(marker, json.dumps(state))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file below the folder of :func:`staging`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write compact JSON below the folder of :func:`staging`."""
    write_lines(path, [json.dumps(content, separators=(",", ":"))])


def write_image(path: Path, image: NDArray[np.integer[Any]]) -> None:
    """Write (H, W) or RGB (H, W, 3) as JPEG or PNG, depending on the suffix of the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if image.ndim == 3:
        image = image[..., ::-1]
    options = {
        ".jpg": [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY],
        ".png": [cv2.IMWRITE_PNG_COMPRESSION, 3],
    }
    if not cv2.imwrite(str(path), image, options[path.suffix]):
        raise OSError(f"cannot write {path}")

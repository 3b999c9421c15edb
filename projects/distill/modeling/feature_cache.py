"""The teacher's maps on disk: students that see the same images share them."""

import hashlib
import logging
import math
import os
import statistics
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils import comm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..config import unlabeled_per_batch
from ..errors import ConfigError
from ..structures import Batch

logger = logging.getLogger(__name__)

KEY = "MODEL.DISTILL.TEACHER.CACHE"
SUFFIX = ".safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GB = 10**9


class FeatureCache:
    """Maps of the teacher's backbone, one file for each image and map.

    The name of a file is a hash of everything on which the map depends. These are the teacher, the
    pixels of the augmented image, and the padded size. So another augmentation or another teacher
    finds nothing, and never a wrong map. A file also has a checksum, and a damaged one is written
    again.

    If a single map of a batch is missing, the backbone computes the whole batch. So a network whose
    rounding depends on the size of the batch gives the same bits with and without the cache.

    Several processes may share a folder. A file appears once it is complete.

    Args:
        folder: where the files are; it is created.
        teacher: hash of the teacher.
        dtype: how maps are stored. float32 stores what the teacher computes, to the bit. float16
            and bfloat16 round the maps of the first student, too.
        max_bytes: this process adds no file that makes the folder larger.
    """

    def __init__(
        self, folder: str | os.PathLike[str], teacher: str, dtype: torch.dtype, max_bytes: float
    ):
        self.folder = Path(folder)
        self.teacher = teacher
        self.dtype = dtype
        self.max_bytes = max_bytes
        self.full = False
        self.folder.mkdir(parents=True, exist_ok=True)
        self.bytes = sum(x.stat().st_size for x in self.folder.rglob(f"*{SUFFIX}"))

    def outputs(
        self,
        batch: Batch,
        names: Sequence[str],
        device: torch.device,
        compute: Callable[[], Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Return maps of a batch by name, from the disk if all of them are there.

        Args:
            batch: the student's batch, whose images are those of the mapper.
            names: the maps that are needed.
            device: device of the maps.
            compute: returns all maps of the batch.

        Raises:
            ConfigError: a value is too large for ``dtype``.
        """
        images = [self._hash(x["image"], batch.padded_size, device) for x in batch.inputs]
        paths = {name: [self._path(x, name) for x in images] for name in names}
        files = {path for own in paths.values() for path in own}
        found = {path: x for path in files if (x := _read(path)) is not None}
        if len(found) == len(files):
            return {
                name: torch.stack([found[path] for path in own]).to(device)
                for name, own in paths.items()
            }
        maps = {name: self._rounded(name, x) for name, x in compute().items() if name in paths}
        for name, own in paths.items():
            for path, x in zip(own, maps[name]):
                if path not in found:
                    self._write(path, x)
        return maps

    def _hash(self, image: Tensor, padded_size: tuple[int, int], device: torch.device) -> str:
        kind = device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        described = image.dtype, tuple(image.shape), padded_size, kind, half
        digest = hashlib.blake2b(repr((self.teacher, described)).encode(), digest_size=20)
        digest.update(_bytes(image.cpu().contiguous()))
        return digest.hexdigest()

    def _path(self, image: str, name: str) -> Path:
        return self.folder / image[:2] / f"{image}.{name}.{_name_of(self.dtype)}{SUFFIX}"

    def _rounded(self, name: str, maps: Tensor) -> Tensor:
        """Return maps as they will be read.

        Raises:
            ConfigError: a value is too large.
        """
        if self.dtype == torch.float32:
            return maps
        rounded = maps.to(self.dtype)
        if not torch.equal(rounded.isfinite(), maps.isfinite()):
            raise ConfigError(
                f"{KEY}.DTYPE {_name_of(self.dtype)} cannot hold values of the teacher's {name} up "
                f"to {maps.abs().max().item():.3g}; take bfloat16 or float32."
            )
        return rounded.to(maps.dtype)

    def _write(self, path: Path, x: Tensor) -> None:
        """Write one map, unless the folder is full."""
        if self.full:
            return
        stored = x.cpu().contiguous()
        stored = stored if self.dtype == torch.float32 else stored.to(self.dtype)
        facts = {"checksum": _checksum(stored), "dtype": _name_of(x.dtype)}
        content = save({"map": stored}, facts)
        temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
        try:
            if self.bytes + len(content) > self.max_bytes:
                raise OSError(f"MAX_GB is {self.max_bytes / GB:g}")
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, path)
            self.bytes += len(content)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            self.full = True
            logger.warning(
                "%s: no more maps are stored in '%s' (%s). The training goes on.",
                *(KEY, self.folder, e),
            )


def build_cache(cfg: CfgNode, teacher: str) -> FeatureCache:
    """Build the cache that ``MODEL.DISTILL.TEACHER.CACHE`` describes.

    Args:
        teacher: everything on which the teacher's maps depend besides the images it gets.
    """
    node = cfg.MODEL.DISTILL.TEACHER
    seen = teacher, node.SCALE, cfg.INPUT.FORMAT, node.CHANNELS_LAST, node.COMPILE
    return FeatureCache(
        node.CACHE.DIR,
        hashlib.sha256(repr(seen).encode()).hexdigest(),
        DTYPES[node.CACHE.DTYPE],
        node.CACHE.MAX_GB * GB / comm.get_world_size(),
    )


def check_cache(
    cfg: CfgNode, shapes: Iterable[ShapeSpec], dicts: Sequence[Mapping[str, Any]]
) -> None:
    """Log how large the cache of a training becomes, and refuse one that is too large.

    Args:
        shapes: the maps that are stored, with strides in pixels of the student's images.
        dicts: detectron2's dataset dicts.

    Raises:
        ConfigError: it would exceed ``MAX_GB``.
    """
    node = cfg.MODEL.DISTILL.TEACHER.CACHE
    values = sum(x.channels / x.stride**2 for x in shapes) * _pixels(cfg, dicts)
    samples = _samples(cfg, dicts)
    size = values * DTYPES[node.DTYPE].itemsize * samples / GB
    logger.info("%s: '%s' will have up to %.1f GB of maps.", KEY, node.DIR, size)
    if size > node.MAX_GB:
        raise ConfigError(
            f"{KEY} would need about {size:,.0f} GB for the maps of {samples:,} augmented images, "
            f"and MAX_GB is {node.MAX_GB:g}; raise it, take fewer augmentations, or empty DIR."
        )


def _pixels(cfg: CfgNode, dicts: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean number of pixels of a training image after its resizing."""
    if cfg.INPUT.AUGMENT.STEPS:
        return math.prod(cfg.INPUT.AUGMENT.SIZE)
    short, most = max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
    areas = []
    for entry in dicts:
        sides = sorted((entry.get("height", short), entry.get("width", most)))
        scale = min(short / sides[0], most / sides[1]) if short else 1
        areas.append(math.prod(sides) * scale**2)
    return statistics.fmean(areas)


def _samples(cfg: CfgNode, dicts: Sequence[Mapping[str, Any]]) -> int:
    """Return the largest number of different augmented images of a training."""
    node = cfg.INPUT
    seen = cfg.SOLVER.MAX_ITER * (cfg.SOLVER.IMS_PER_BATCH + unlabeled_per_batch(cfg))
    sizes = {(x.get("height"), x.get("width")) for x in dicts}  # others change the padding
    random = node.AUGMENT.STEPS or node.CROP.ENABLED or node.get("COLOR_AUG_SSD") or len(sizes) > 1
    if random or node.MIN_SIZE_TRAIN_SAMPLING != "choice":
        return seen
    flips = 1 if node.RANDOM_FLIP == "none" else 2
    return min(seen, len(dicts) * flips * len(node.MIN_SIZE_TRAIN))


def _read(path: Path) -> Tensor | None:
    """Return a map, or None if there is no undamaged file."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            facts, stored = file.metadata(), file.get_tensor("map")
        if facts["checksum"] == _checksum(stored):
            return stored.to(DTYPES[facts["dtype"]])
    except (SafetensorError, OSError, KeyError, TypeError):
        pass
    logger.warning("%s: '%s' is damaged; its map is computed again.", KEY, path)
    return None


def _checksum(x: Tensor) -> str:
    return f"{zlib.crc32(_bytes(x)):08x}"


def _bytes(x: Tensor) -> memoryview:
    return x.flatten().view(torch.uint8).numpy().data


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Layout of PASCAL VOC 2007: boxes in XML files, segmentation in images with a palette."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from ...utils.io import write_text
from .common import Job, Progress, staging, write_image, write_lines
from .scenes import CLASSES, Image, Scene, SceneConfig

VOC_NAMES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat")
"""VOC's class for each of ``CLASSES``: the first eight in alphabetical order."""

_TRUNCATED = 0.05  # an object counts as truncated if a larger fraction is invisible


def write_voc(
    root: str | os.PathLike[str],
    split: str,
    num_scenes: int,
    seed: int = 0,
    config: SceneConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a split as PASCAL VOC 2007; shape ``i`` is :data:`VOC_NAMES` ``[i]``.

    Files below ``root``, which is VOC's folder VOC2007:

    - ``JPEGImages/<split>_<index>.jpg``
    - ``Annotations/*.xml`` with inclusive pixel coordinates from 1
    - ``SegmentationClass/*.png`` and ``SegmentationObject/*.png`` with VOC's palette (0 is the
      background; no void borders)
    - ``ImageSets/{Main,Segmentation}/<split>.txt``, and ``trainval.txt`` with the existing parts of
      train and val
    """
    root = Path(root)
    job = Job("voc", split, num_scenes, seed, config or SceneConfig())
    kinds = ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationObject")
    owned = [f"{kind}/{split}_??????.*" for kind in kinds] + [f"ImageSets/*/{split}.txt"]
    with staging(root, job, owned, overwrite) as folder:
        if folder is not None:
            names = [f"{split}_{index:06d}" for index in range(num_scenes)]
            for name, scene in zip(names, job.scenes(progress), strict=True):
                _write_scene(folder, name, scene)
            for kind in ("Main", "Segmentation"):
                write_lines(folder / f"ImageSets/{kind}/{split}.txt", names)
    for kind in ("Main", "Segmentation"):
        lists = [root / f"ImageSets/{kind}/{part}.txt" for part in ("train", "val")]
        names = [line for path in lists if path.is_file() for line in path.read_text().split()]
        text = "".join(f"{name}\n" for name in names)
        write_text(root / f"ImageSets/{kind}/trainval.txt", text)


def _write_scene(folder: Path, name: str, scene: Scene) -> None:
    write_image(folder / f"JPEGImages/{name}.jpg", scene.image)
    write_lines(folder / f"Annotations/{name}.xml", _annotation(name, scene))
    semantic = scene.semantic
    classes = np.where(semantic < len(CLASSES), semantic + 1, 0).astype(np.uint8)
    objects = np.zeros_like(classes)
    for index, mask in enumerate(scene.masks):
        objects[mask] = index + 1
    _write_palette_image(folder / f"SegmentationClass/{name}.png", classes)
    _write_palette_image(folder / f"SegmentationObject/{name}.png", objects)


def _annotation(name: str, scene: Scene) -> Iterator[str]:
    """Yield the lines of an annotation file."""
    height, width = scene.stuff.shape
    yield "<annotation>"
    yield f"<folder>VOC2007</folder><filename>{name}.jpg</filename>"
    yield "<source><database>Shapes</database></source>"
    yield f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    yield "<segmented>1</segmented>"
    rows = zip(scene.classes, scene.boxes, scene.visible_fractions, scene.truncations, strict=True)
    for class_id, (x0, y0, x1, y1), visible, outside in rows:
        truncated = int(1 - visible * (1 - outside) > _TRUNCATED)
        yield f"<object><name>{VOC_NAMES[class_id]}</name><pose>Unspecified</pose>"
        yield f"<truncated>{truncated}</truncated><difficult>0</difficult>"
        # The first pixel has number 1, and the last pixel is inside the box.
        yield f"<bndbox><xmin>{x0 + 1:.0f}</xmin><ymin>{y0 + 1:.0f}</ymin>"
        yield f"<xmax>{x1:.0f}</xmax><ymax>{y1:.0f}</ymax></bndbox></object>"
    yield "</annotation>"


def _palette() -> NDArray[np.uint8]:
    """Return VOC's colours (256, 3): bits 0, 3, 6, … of the index are red's bits 7, 6, 5, …."""
    index = np.arange(256)[:, None]
    channel = np.arange(3)[None]
    colors = np.zeros((256, 3), dtype=np.int64)
    for level in range(3):
        colors |= (index >> (3 * level + channel) & 1) << (7 - level)
    return colors.astype(np.uint8)


def _write_palette_image(path: Path, indices: Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = PILImage.fromarray(indices)
    image.putpalette(_palette().reshape(-1).tolist())
    image.save(path)

"""Layout of Cityscapes: leftImg8bit and gtFine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .common import Job, Progress, staging, write_image, write_json
from .polygons import mask_to_pixel_outlines
from .scenes import STUFF_CLASSES, Scene, SceneConfig


class CityscapesLabel(NamedTuple):
    """Row of cityscapesscripts' table of labels."""

    name: str
    id: int
    train_id: int


# One for each of CLASSES, in detectron2's order, so that contiguous category ids are the same.
CITYSCAPES_THINGS = (
    CityscapesLabel("person", 24, 11),
    CityscapesLabel("rider", 25, 12),
    CityscapesLabel("car", 26, 13),
    CityscapesLabel("truck", 27, 14),
    CityscapesLabel("bus", 28, 15),
    CityscapesLabel("train", 31, 16),
    CityscapesLabel("motorcycle", 32, 17),
    CityscapesLabel("bicycle", 33, 18),
)
# One for each of STUFF_CLASSES.
CITYSCAPES_STUFF = (
    CityscapesLabel("sky", 23, 10),
    CityscapesLabel("vegetation", 21, 8),
    CityscapesLabel("building", 11, 2),
    CityscapesLabel("road", 7, 0),
)
_LABELS = CITYSCAPES_THINGS + CITYSCAPES_STUFF


def write_cityscapes(
    root: str | os.PathLike[str],
    split: str,
    num_scenes: int,
    seed: int = 0,
    config: SceneConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a split as Cityscapes; shape ``i`` is :data:`CITYSCAPES_THINGS` ``[i]``.

    A split has one city with the name of the split. Its files below ``root`` are
    ``leftImg8bit/<split>/<city>/<city>_<index>_000000_leftImg8bit.png`` and, below
    ``gtFine/<split>/<city>``, ``…_gtFine_{labelIds,labelTrainIds,instanceIds}.png`` and
    ``…_gtFine_polygons.json``. The json file has the regions, and then the objects from the
    farthest to the nearest. cityscapesscripts draws its polygons in this order, which gives the
    label images.
    """
    job = Job("cityscapes", split, num_scenes, seed, config or SceneConfig())
    owned = [f"{kind}/{split}/{split}/*" for kind in ("leftImg8bit", "gtFine")]
    with staging(Path(root), job, owned, overwrite) as folder:
        if folder is None:
            return
        for index, scene in enumerate(job.scenes(progress)):
            name = f"{split}/{split}/{split}_{index:06d}_000000"
            write_image(folder / f"leftImg8bit/{name}_leftImg8bit.png", scene.image)
            _write_labels(folder / "gtFine", name, scene)


def _write_labels(folder: Path, name: str, scene: Scene) -> None:
    ids = np.array([label.id for label in _LABELS], dtype=np.uint8)
    train_ids = np.array([label.train_id for label in _LABELS], dtype=np.uint8)
    instance_ids = ids[scene.semantic].astype(np.uint16)
    counts: dict[int, int] = {}
    for class_id, mask in zip(scene.classes, scene.masks, strict=True):
        number = counts.get(class_id, 0)
        counts[class_id] = number + 1
        instance_ids[mask] = CITYSCAPES_THINGS[class_id].id * 1000 + number
    write_image(folder / f"{name}_gtFine_labelIds.png", ids[scene.semantic])
    write_image(folder / f"{name}_gtFine_labelTrainIds.png", train_ids[scene.semantic])
    write_image(folder / f"{name}_gtFine_instanceIds.png", instance_ids)
    height, width = scene.stuff.shape
    content = {"imgHeight": height, "imgWidth": width, "objects": _polygons(scene)}
    write_json(folder / f"{name}_gtFine_polygons.json", content)


def _polygons(scene: Scene) -> list[dict[str, Any]]:
    objects: list[dict[str, Any]] = []
    # The first region fills the image, and the others are drawn over it in an order in which no
    # region has a hole. Then each whole object is drawn over the objects behind it.
    for index in range(len(STUFF_CLASSES)):
        region = scene.stuff == index if index else np.ones_like(scene.stuff, dtype=np.bool_)
        for outline in mask_to_pixel_outlines(region):
            objects.append({"label": CITYSCAPES_STUFF[index].name, "polygon": outline})
    for class_id, mask in zip(scene.classes, scene.full_masks, strict=True):
        (outline,) = mask_to_pixel_outlines(mask)
        objects.append({"label": CITYSCAPES_THINGS[class_id].name, "polygon": outline})
    return objects

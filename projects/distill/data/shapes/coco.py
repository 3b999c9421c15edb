"""Layout of COCO: instances, semantic labels and panoptic segments."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .common import Job, Progress, staging, write_image, write_json
from .polygons import mask_to_polygons
from .scenes import (
    CLASSES,
    SCENES_VERSION,
    STUFF_CLASSES,
    Image,
    Mask,
    Scene,
    SceneConfig,
    mask_to_box,
)


def write_coco(
    root: str | os.PathLike[str],
    split: str,
    num_scenes: int,
    seed: int = 0,
    config: SceneConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a split as COCO instances, semantic and panoptic labels.

    Files below ``root``:

    - ``images/<split>/*.jpg``
    - ``annotations/instances_<split>.json`` with polygons that pycocotools rasterises to exactly
      the visible masks (category ids 1…8)
    - ``semantic_<split>/*.png`` with indices into ``CLASSES + STUFF_CLASSES``
    - files for detectron2's ``register_coco_panoptic_separated``: ``stuff_<split>/*.png`` (0 for
      things, 1…4 for :data:`STUFF_CLASSES`), ``panoptic_<split>/*.png`` and
      ``annotations/panoptic_<split>.json`` (stuff category ids 9…12)
    """
    job = Job("coco", split, num_scenes, seed, config or SceneConfig())
    owned = [f"{kind}/*" for kind in _coco_folders(split)]
    owned += [f"annotations/{kind}_{split}.json" for kind in ("instances", "panoptic")]
    with staging(Path(root), job, owned, overwrite) as folder:
        if folder is None:
            return
        images: list[dict[str, Any]] = []
        instances: list[dict[str, Any]] = []
        panoptic: list[dict[str, Any]] = []
        for index, scene in enumerate(job.scenes(progress)):
            height, width = scene.stuff.shape
            name = f"{index:012d}"
            images.append(
                {"id": index + 1, "file_name": f"{name}.jpg", "height": height, "width": width}
            )
            _write_coco_images(folder, split, name, scene)
            for annotation in _coco_instances(scene):
                ids = {"id": len(instances) + 1, "image_id": index + 1}
                instances.append({**ids, **annotation})
            segments = _coco_segments(scene)
            panoptic.append(
                {"image_id": index + 1, "file_name": f"{name}.png", "segments_info": segments}
            )
        _write_coco_json(folder, split, images, instances, panoptic)


def _coco_folders(split: str) -> list[str]:
    return [f"images/{split}", f"semantic_{split}", f"stuff_{split}", f"panoptic_{split}"]


def _write_coco_images(folder: Path, split: str, name: str, scene: Scene) -> None:
    images, semantic, stuff, panoptic = (folder / kind for kind in _coco_folders(split))
    write_image(images / f"{name}.jpg", scene.image)
    write_image(semantic / f"{name}.png", scene.semantic)
    stuff_only = scene.stuff + np.uint8(1)
    stuff_only[scene.semantic < len(CLASSES)] = 0
    write_image(stuff / f"{name}.png", stuff_only)
    # COCO's panoptic images have id = R + 256 G + 65536 B; all ids here are below 256.
    rgb = np.zeros_like(scene.image)
    rgb[..., 0] = _panoptic_ids(scene)
    write_image(panoptic / f"{name}.png", rgb)


def _coco_instances(scene: Scene) -> Iterator[dict[str, Any]]:
    for class_id, mask in zip(scene.classes, scene.masks, strict=True):
        yield {
            "category_id": class_id + 1,
            "bbox": _box_xywh(mask),
            "area": float(mask.sum()),
            "iscrowd": 0,
            "segmentation": mask_to_polygons(mask),
        }


def _panoptic_ids(scene: Scene) -> Image:
    """Return (H, W) uint8: 1…N for the objects, N+1…N+4 for the stuff regions."""
    ids = scene.stuff + np.uint8(len(scene.masks) + 1)
    for index, mask in enumerate(scene.masks):
        ids[mask] = index + 1
    return ids


def _coco_segments(scene: Scene) -> list[dict[str, Any]]:
    ids = _panoptic_ids(scene)
    categories = [c + 1 for c in scene.classes]
    categories += [len(CLASSES) + 1 + c for c in range(len(STUFF_CLASSES))]
    segments = []
    for segment_id in np.unique(ids).tolist():
        mask = ids == segment_id
        segments.append(
            {
                "id": segment_id,
                "category_id": categories[segment_id - 1],
                "bbox": [int(v) for v in _box_xywh(mask)],
                "area": int(mask.sum()),
                "iscrowd": 0,
            }
        )
    return segments


def _write_coco_json(
    folder: Path,
    split: str,
    images: list[dict[str, Any]],
    instances: list[dict[str, Any]],
    panoptic: list[dict[str, Any]],
) -> None:
    things = [{"id": i + 1, "name": name, "isthing": 1} for i, name in enumerate(CLASSES)]
    stuff = [
        {"id": len(CLASSES) + i + 1, "name": name, "isthing": 0}
        for i, name in enumerate(STUFF_CLASSES)
    ]
    info = {"description": "Shapes: synthetic scenes", "version": str(SCENES_VERSION)}
    common = {"info": info, "licenses": [], "images": images}
    write_json(
        folder / f"annotations/instances_{split}.json",
        {**common, "categories": things, "annotations": instances},
    )
    write_json(
        folder / f"annotations/panoptic_{split}.json",
        {**common, "categories": things + stuff, "annotations": panoptic},
    )


def _box_xywh(mask: Mask) -> list[float]:
    x0, y0, x1, y1 = mask_to_box(mask)
    return [x0, y0, x1 - x0, y1 - y0]

"""Layout of KITTI's object detection benchmark, left colour camera."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .common import Job, Progress, staging, write_image, write_lines
from .scenes import CLASSES, Scene, SceneConfig

KITTI_CLASSES = ("Car", "Pedestrian", "Cyclist")
KITTI_FOLD = {
    "circle": "Car",
    "ellipse": "Car",
    "crescent": "Car",
    "square": "Pedestrian",
    "triangle": "Pedestrian",
    "pentagon": "Pedestrian",
    "star": "Cyclist",
    "cross": "Cyclist",
}
"""KITTI's class for each of ``CLASSES``: round, with straight sides, with re-entrant corners."""

# KITTI numbers all labelled images in one folder; each split has its own range of numbers there.
_FIRST_INDEX = {"train": 0, "val": 100_000, "test": 200_000}
_MAX_SCENES = 100_000
_DONT_CARE_EVERY = 4

# Columns that cannot be known from an image, in KITTI's notation for "unknown".
_ALPHA = "-10"
_DIMENSIONS_LOCATION_ROTATION = "-1 -1 -1 -1000 -1000 -1000 -10"


def write_kitti(
    root: str | os.PathLike[str],
    split: str,
    num_scenes: int,
    seed: int = 0,
    config: SceneConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a split ("train", "val" or "test") as KITTI; :data:`KITTI_FOLD` maps the classes.

    The files below ``root`` are ``training/image_2/<id>.png``, ``training/label_2/<id>.txt`` with
    15 columns, and ``ImageSets/<split>.txt`` with the ids. Ids start at 000000 for train, 100000
    for val and 200000 for test. Boxes are left, top, right, bottom in pixels, with the origin at
    the corner of the image. In every fourth scene with several objects, the least visible one is a
    DontCare region.
    """
    if split not in _FIRST_INDEX:
        raise ValueError(f"a KITTI split is one of {', '.join(_FIRST_INDEX)}, got {split!r}")
    if num_scenes > _MAX_SCENES:
        raise ValueError(f"a KITTI split has at most {_MAX_SCENES} scenes, got {num_scenes}")
    job = Job("kitti", split, num_scenes, seed, config or SceneConfig())
    first = _FIRST_INDEX[split]
    owned = [f"training/*/{first // _MAX_SCENES}?????.*", f"ImageSets/{split}.txt"]
    with staging(Path(root), job, owned, overwrite) as folder:
        if folder is None:
            return
        names = [f"{first + index:06d}" for index in range(num_scenes)]
        for index, scene in enumerate(job.scenes(progress)):
            write_image(folder / f"training/image_2/{names[index]}.png", scene.image)
            lines = _label_lines(scene, hide_one=index % _DONT_CARE_EVERY == 0)
            write_lines(folder / f"training/label_2/{names[index]}.txt", lines)
        write_lines(folder / f"ImageSets/{split}.txt", names)


def _label_lines(scene: Scene, hide_one: bool) -> list[str]:
    """Return lines of type, truncated, occluded, alpha, box (4), dimensions (3), location (3), ry.

    ry is KITTI's rotation_y.
    """
    visible = scene.visible_fractions
    hidden = visible.index(min(visible)) if hide_one and len(visible) > 1 else None
    labels, dont_care = [], []
    for index, class_id in enumerate(scene.classes):
        box = _format_box(scene.boxes[index])
        if index == hidden:
            dont_care.append(f"DontCare -1 -1 {_ALPHA} {box} {_DIMENSIONS_LOCATION_ROTATION}")
            continue
        name = KITTI_FOLD[CLASSES[class_id]]
        state = f"{scene.truncations[index]:.2f} {_occlusion_level(visible[index])}"
        labels.append(f"{name} {state} {_ALPHA} {box} {_DIMENSIONS_LOCATION_ROTATION}")
    return labels + dont_care


def _format_box(box: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in box)


def _occlusion_level(visible: float) -> int:
    """Return 0 if fully visible, 1 if partly occluded, 2 if largely occluded."""
    return 0 if visible > 0.95 else 1 if visible > 0.6 else 2

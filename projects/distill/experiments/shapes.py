"""Render the shapes data set in the layout of COCO, Cityscapes, PASCAL VOC or KITTI.

distill shapes --layout coco --out datasets/shapes --train 1500 --val 200
"""

import argparse
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from ..data.cityscapes import register_cityscapes_semantic
from ..data.shapes import LAYOUTS, SCENES_VERSION, SceneConfig
from ..errors import ConfigError
from ..utils.arguments import at_least, size
from ..utils.progress import Progress

SCENES = {"train": 1500, "val": 300}
# Simple enough to be learned in minutes: large, upright, calmly textured objects.
SCENE = SceneConfig(
    max_objects=4,
    min_size=0.25,
    max_distractors=2,
    noise=3.0,
    max_rotation=15.0,
    texture_contrast=0.4,
)


class Shapes:
    """Rendered scenes on disk for experiments, in a folder whose name depends on their settings.

    Args:
        out: where the folder is.
        data_seed: seed of the scenes; tuning uses another one than reporting.
        layout: coco, for detection, or cityscapes, for semantic segmentation.
    """

    def __init__(self, out: Path, data_seed: int, layout: str = "coco"):
        self.data_seed = data_seed
        self.layout = layout
        scenes = hashlib.sha256(f"{SCENES}{SCENE}{SCENES_VERSION}".encode()).hexdigest()[:8]
        kind = "shapes" if layout == "coco" else layout
        self.folder = out / f"{kind}-{data_seed}-{scenes}"

    def render(self, progress: Progress) -> None:
        """Write the data set; a finished split is kept."""
        for split, count in SCENES.items():
            render(progress, self.layout, self.folder, split, count, self.data_seed, SCENE)

    def opts(self) -> list[Any]:
        """Return the KEY VALUE overrides that name the data."""
        train, test = (f"demo_{self.folder.name}_{split}" for split in SCENES)
        named = ["DATASETS.TRAIN", (train,), "DATASETS.TEST", (test,)]
        if self.layout == "cityscapes":
            for name, split in zip((train, test), SCENES):
                register_cityscapes_semantic(name, str(self.folder), split)
            return named
        sets = [
            (
                name,
                str(self.folder / "annotations" / f"instances_{split}.json"),
                str(self.folder / "images" / split),
            )
            for name, split in zip((train, test), SCENES)
        ]
        return [*named, "DATASETS.COCO_FORMAT", sets]


def render(
    progress: Progress,
    layout: str,
    root: Path,
    split: str,
    count: int,
    seed: int,
    scene: SceneConfig,
    overwrite: bool = False,
) -> None:
    """Write one split of a layout, see :mod:`distill.data.shapes`."""
    task = progress.add_task(f"render {layout} {split}", total=count)
    advance = partial(progress.advance, task)
    LAYOUTS[layout](root, split, count, seed, scene, overwrite=overwrite, progress=advance)
    progress.update(task, completed=count)  # a split that exists advances nothing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layout", choices=[*LAYOUTS, "all"], default="coco", help="default: %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="root of the data set; 'all' adds one folder each"
    )
    for split, count in {"train": 1500, "val": 200, "test": 0}.items():
        parser.add_argument(
            f"--{split}", type=at_least(0), default=count, help=f"{split} scenes; default: {count}"
        )
    parser.add_argument(
        "--size",
        type=size,
        default="128",
        help="pixels: one number, or WIDTHxHEIGHT; default: %(default)s",
    )
    parser.add_argument(
        "--max-objects",
        type=int,
        default=SceneConfig().max_objects,
        help="objects in a scene; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace splits that exist")


def run(args: argparse.Namespace) -> int:
    """Write the splits that ``args`` asks for; a split of size 0 is left out."""
    try:
        _run(args)
    except (ValueError, OSError) as e:
        raise ConfigError(str(e)) from e
    print(f"wrote {args.out}")
    return 0


def _run(args: argparse.Namespace) -> None:
    width, height = args.size
    scene = SceneConfig(height=height, width=width, max_objects=args.max_objects)
    splits = {x: vars(args)[x] for x in ("train", "val", "test") if vars(args)[x]}
    if not splits:
        raise ConfigError("There is nothing to write: --train, --val and --test are all 0.")
    with Progress() as progress:
        for layout in LAYOUTS if args.layout == "all" else [args.layout]:
            root = args.out / layout if args.layout == "all" else args.out
            for split, count in splits.items():
                render(progress, layout, root, split, count, args.seed, scene, args.overwrite)

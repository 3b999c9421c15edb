"""Render the shapes data set in the layout of COCO, Cityscapes, PASCAL VOC or KITTI.

Example:
    python tools/make_shapes.py --layout coco --out datasets/shapes --train 1500 --val 200
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distill.data.shapes import LAYOUTS, SceneConfig


def parse_size(text: str) -> tuple[int, int]:
    """``"128"`` or ``"256x128"`` (width x height, pixels) as (width, height)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 128 or 256x128")
    return int(match[1]), int(match[2] or match[1])


def build_parser() -> argparse.ArgumentParser:
    defaults = SceneConfig()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--layout", choices=[*LAYOUTS, "all"], default="coco")
    parser.add_argument(
        "--out", type=Path, required=True, help="root of the data set; 'all' adds one folder each"
    )
    parser.add_argument("--train", type=int, default=1500, help="number of training scenes")
    parser.add_argument("--val", type=int, default=200, help="number of validation scenes")
    parser.add_argument("--test", type=int, default=0, help="number of test scenes")
    parser.add_argument(
        "--size", type=parse_size, default="128", help="pixels: one number, or width x height"
    )
    parser.add_argument("--max-objects", type=int, default=defaults.max_objects)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace splits that exist")
    return parser


def make_shapes(args: argparse.Namespace) -> None:
    """Write the splits that ``args`` asks for; a split of size 0 is left out."""
    width, height = args.size
    config = SceneConfig(height=height, width=width, max_objects=args.max_objects)
    layouts = list(LAYOUTS) if args.layout == "all" else [args.layout]
    sizes = {"train": args.train, "val": args.val, "test": args.test}
    splits = {name: count for name, count in sizes.items() if count}
    if not splits:
        raise ValueError("there is nothing to write: --train, --val and --test are all 0")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        for layout in layouts:
            root = args.out / layout if args.layout == "all" else args.out
            for split, count in splits.items():
                task = progress.add_task(f"{layout} {split}", total=count)
                LAYOUTS[layout](
                    root,
                    split,
                    count,
                    args.seed,
                    config,
                    overwrite=args.overwrite,
                    progress=functools.partial(progress.advance, task),
                )
                progress.update(task, completed=count)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        make_shapes(args)
    except (ValueError, OSError) as error:
        print(f"make_shapes: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

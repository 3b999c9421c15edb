"""Convert the data sets of a config to YOLO's or COCO's format.

    distill convert-data --config-file F --to {yolo,coco} --out DIR [--images {link,copy}]
        [KEY VALUE ...]

It converts DATASETS.TRAIN and DATASETS.TEST, whose sets may be in any format that has boxes. Wrong
data are refused. The last lines of the output name the new data sets in a config.

YOLO's format has one polygon per object. Several polygons become one, joined by lines without area.
Crowds, run-length masks and keypoints are left out, and their numbers are printed. If an object of
an image has no polygon, all objects of the image become boxes, because tools do not mix both.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.structures import BoxMode
from numpy.typing import NDArray

from ..data.checks.images import missing_files
from ..data.checks.yolo_folder import label_path, signed_area
from ..data.class_order import indices_by_name, relabelled
from ..data.datasets import find_issues
from ..engine import setup_config
from ..errors import ConfigError, DataError
from ..utils.arguments import add_config_arguments
from ..utils.io import write_text

SPLIT_OF = {"TRAIN": "train", "TEST": "val"}  # split in YOLO's format, by key of DATASETS

Points = NDArray[np.float64]
"""(P, 2) x and y."""


class Source(NamedTuple):
    """Data set to convert.

    Attributes:
        name: its name in the config.
        splits: train, val or both.
        classes: its class names.
        dicts: detectron2's dataset dicts.
    """

    name: str
    splits: list[str]
    classes: list[str]
    dicts: list[dict[str, Any]]


def read_sources(cfg: CfgNode) -> list[Source]:
    """Read the data sets of a config.

    Raises:
        DataError: one has no boxes, a fatal issue, or an image that does not exist.
    """
    # All masks are checked, and nothing else of the config matters.
    free = cfg.clone()
    free.defrost()
    free.merge_from_list(["MODEL.MASK_ON", True, "MODEL.KEYPOINT_ON", False])
    free.DATASETS.TRAIN = free.DATASETS.TEST = ()
    found = []
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        issues, dicts = find_issues(free, name)
        issues += [issue for entry in dicts for issue in missing_files(entry)]
        if first := next((x for x in issues if x.fatal), None):
            raise DataError(
                f"Data set '{name}', {first.where}: {first.detail}; `distill check-data` lists "
                "all issues."
            )
        classes = list(MetadataCatalog.get(name).get("thing_classes") or ())
        if not classes or not all("annotations" in x for x in dicts):
            raise DataError(f"Data set '{name}' has no boxes; name sets with objects.")
        splits = [split for key, split in SPLIT_OF.items() if name in cfg.DATASETS[key]]
        found.append(Source(name, splits, classes, dicts))
    return found


# ------------------------------------------------------------------------------------------ images


class Images:
    """Images of a data set below the new folder, with the folders that they had before.

    Args:
        source: the data set.
        out: the new folder.
        copy: copy the images; otherwise they are symbolic links.
    """

    def __init__(self, source: Source, out: Path, copy: bool):
        self.folder = out / "images" / source.name
        self.copy = copy
        paths = [os.path.abspath(x["file_name"]) for x in source.dicts]
        self.root = os.path.commonpath([os.path.dirname(x) for x in paths])

    def name_of(self, path: str) -> str:
        """Return the name of an image below :attr:`folder`."""
        return os.path.relpath(path, self.root)

    def place(self, path: str) -> Path:
        """Copy or link an image, and return its new path."""
        new = self.folder / self.name_of(path)
        if not os.path.lexists(new):  # a data set may list an image twice
            new.parent.mkdir(parents=True, exist_ok=True)
            if self.copy:
                shutil.copyfile(path, new)
            else:
                new.symlink_to(os.path.abspath(path))
        return new


# -------------------------------------------------------------------------------------------- YOLO


def join_polygons(polygons: Sequence[Sequence[float]]) -> Points:
    """Return one polygon for several, all of one orientation.

    The outline goes from the first point of a polygon around it, then to the next polygon, and back
    over the first points. So the lines between them have no area.
    """
    parts: list[Points] = [np.reshape(x, (-1, 2)).astype(float) for x in polygons]
    if len(parts) == 1:
        return parts[0]
    parts = [x if signed_area(x) >= 0 else x[::-1] for x in parts]
    closed = [np.concatenate([x, x[:1]]) for x in parts]
    return np.concatenate([*closed, *(x[:1] for x in parts[-2:0:-1])])


def label_lines(entry: dict[str, Any], left_out: Counter[str]) -> Iterator[str]:
    """Yield the labels of an image in YOLO's format.

    Args:
        entry: detectron2's dataset dict.
        left_out: counts what the format does not have.
    """
    objects = [x for x in entry["annotations"] if not x.get("iscrowd")]
    masks = [x.get("segmentation") for x in objects]
    outlined = all(isinstance(x, list) and x for x in masks)
    left_out["crowds"] += len(entry["annotations"]) - len(objects)
    left_out["masks"] += 0 if outlined else sum(map(bool, masks))
    left_out["keypoints of objects"] += sum(any(x.get("keypoints", ())) for x in objects)
    size = np.array([entry["width"], entry["height"]])
    for x, mask in zip(objects, masks):
        if outlined:
            points = np.clip(join_polygons(mask) / size, 0, 1)
        else:
            box = BoxMode.convert(list(x["bbox"]), x["bbox_mode"], BoxMode.XYXY_ABS)
            corners = np.clip(np.reshape(box, (2, 2)) / size, 0, 1)
            points = np.stack([corners.mean(0), corners[1] - corners[0]])
        yield " ".join([str(x["category_id"]), *(f"{k:.6f}" for k in points.ravel())])


def write_yolo(sources: Sequence[Source], out: Path, copy: bool) -> Counter[str]:
    """Write ``images/``, ``labels/`` and ``data.yaml``, with the classes of the first set.

    Returns:
        Numbers of what is left out.

    Raises:
        DataError: two images have the same labels.
    """
    for source in sources:
        _check_names(source)
    left_out: Counter[str] = Counter()
    for source in sources:
        images = Images(source, out, copy)
        for entry in _with_classes(source, sources[0], left_out):
            labels = label_path(str(images.place(entry["file_name"])))
            write_text(labels, "".join(f"{x}\n" for x in label_lines(entry, left_out)))
    folders = {
        split: names
        for split in SPLIT_OF.values()
        if (names := [f"images/{x.name}" for x in sources if split in x.splits])
    }
    # Without a `path`, every tool takes the folder of this file.
    content = {**folders, "names": dict(enumerate(sources[0].classes))}
    write_text(out / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return left_out


def _check_names(source: Source) -> None:
    images: dict[str, str] = {}
    for path in (x["file_name"] for x in source.dicts):
        other = images.setdefault(os.path.splitext(path)[0], path)
        if other != path:
            raise DataError(
                f"Data set '{source.name}': '{other}' and '{path}' would have the same file of "
                "labels; rename one."
            )


def _with_classes(source: Source, first: Source, left_out: Counter[str]) -> list[dict[str, Any]]:
    """Return the dataset dicts with the class indices of the first set."""
    if source.classes == first.classes:
        return source.dicts
    dicts = relabelled(source.dicts, indices_by_name(source.classes, first.classes))
    before, after = (sum(len(x["annotations"]) for x in part) for part in (source.dicts, dicts))
    left_out[f"objects of classes that '{first.name}' lacks"] += before - after
    return dicts


# -------------------------------------------------------------------------------------------- COCO


def write_coco(sources: Sequence[Source], out: Path, copy: bool) -> Counter[str]:
    """Write ``images/`` and ``annotations/<data set>.json``.

    Returns:
        An empty counter, because nothing is left out.
    """
    for source in sources:
        content = {"annotations": [], **convert_to_coco_dict(source.name), "info": {}}
        images = Images(source, out, copy)
        for image in content["images"]:
            path = image["file_name"]
            images.place(path)
            image["file_name"] = images.name_of(path)
        write_text(out / "annotations" / f"{source.name}.json", json.dumps(content))
    return Counter()


def new_config(sources: Sequence[Source], to: str, out: Path) -> str:
    """Return the lines of a config that name the new data sets."""
    if to == "yolo":
        splits = {x for source in sources for x in source.splits}
        names = {key: [f"{out.name}_{x}"] for key, x in SPLIT_OF.items() if x in splits}
        entries = [[names[key][0], str(out / "data.yaml"), SPLIT_OF[key]] for key in names]
    else:
        names = {
            key: [x.name for x in sources if split in x.splits] for key, split in SPLIT_OF.items()
        }
        files, images = out / "annotations", out / "images"
        entries = [[x.name, str(files / f"{x.name}.json"), str(images / x.name)] for x in sources]
    content = {"DATASETS": {f"{to.upper()}_FORMAT": entries, **names}}
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None)


WRITERS = {"yolo": write_yolo, "coco": write_coco}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", choices=WRITERS, required=True, help="the new format")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the data sets")
    parser.add_argument(
        "--images",
        choices=("link", "copy"),
        default="link",
        help="put symbolic links of the images, or copies, into the new folder; default: link",
    )
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    cfg = setup_config(args.config_file, args.opts)
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ConfigError(f"--out '{args.out}' exists and is not empty; name a new folder.")
    if wrong := next((x for x in names if Path(x).name != x or x == ".."), ""):
        raise ConfigError(f"The data set '{wrong}' would be no folder; rename it without slashes.")
    with contextlib.redirect_stdout(sys.stderr):  # libraries print what they load
        sources = read_sources(cfg)
        try:
            left_out = WRITERS[args.to](sources, args.out, args.images == "copy")
        except OSError as e:
            raise ConfigError(f"--out '{args.out}' cannot be written: {e.strerror}.") from e
    objects = sum(len(x["annotations"]) for source in sources for x in source.dicts)
    print(f"wrote {args.out}: {sum(len(x.dicts) for x in sources)} images, {objects} objects")
    for what, number in left_out.items():
        if number:
            print(f"left out {what}: {number}")
    print(new_config(sources, args.to, args.out), end="")
    return 0

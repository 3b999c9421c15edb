"""Loaders and mapper of Cityscapes, for the data sets that detectron2 registers.

The archives ``leftImg8bit_trainvaltest`` and ``gtFine_trainvaltest`` unpack to this layout:
``leftImg8bit/<split>/<city>/<name>_leftImg8bit.png`` and, for each image, the files
``gtFine/<split>/<city>/<name>_gtFine_{labelIds,instanceIds}.png`` and ``…_polygons.json``.

The dataset dicts are those of detectron2, but in the order of the file names on every machine. In
newer commits, detectron2's own functions import a private module
(https://github.com/facebookresearch/detectron2/issues/5436). These need public libraries only.
"""

import copy
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import (
    Augmentation,
    AugmentationList,
    NoOpTransform,
    RandomCrop_CategoryAreaConstraint,
)
from detectron2.structures import BoxMode
from detectron2.utils import comm
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError
from .checks.issues import Problem
from .contiguous import Contiguous

IGNORED = 255  # train id of pixels that are neither trained nor evaluated
IMAGES = "_leftImg8bit.png"
LABEL_IDS, TRAIN_IDS = "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"
INSTANCE_IDS, POLYGONS = "_gtFine_instanceIds.png", "_gtFine_polygons.json"

_POOLED = 100  # smallest number of images whose polygons are read by several processes
_MOST_WORKERS = 16


# cityscapesscripts and shapely are imported inside functions, because most trainings need neither.


@cache
def label_table() -> dict[str, Any]:
    """Return Cityscapes' own table of labels, by name."""
    from cityscapesscripts.helpers.labels import name2label

    return dict(name2label)


@cache
def _things() -> list[int]:
    """Return the label ids of the evaluated classes with instances."""
    labels = label_table().values()
    return [label.id for label in labels if label.hasInstances and not label.ignoreInEval]


@cache
def train_id_table() -> NDArray[np.uint8]:
    """Return the train id of each label id, (256,); :data:`IGNORED` for ids without one."""
    table = np.full(256, IGNORED, np.uint8)
    for label in label_table().values():
        if label.id >= 0 and 0 <= label.trainId < IGNORED:
            table[label.id] = label.trainId
    return table


@cache
def label_id_table() -> NDArray[np.uint8]:
    """Return the label id of each train id, (256,); 0 (unlabeled) for other numbers."""
    table = np.zeros(256, np.uint8)
    known = np.flatnonzero(train_id_table() != IGNORED)
    table[train_id_table()[known]] = known
    return table


# -------------------------------------------------------------------------------------- loaders


def ground_truth_files(image_dir: str, gt_dir: str, kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of an image and its ground-truth file for a split.

    Args:
        image_dir, gt_dir: folders of a split, with one folder per city.
        kinds: suffixes of ground-truth files, the preferred one first. The first file that exists
            is returned. If no file exists, the last one is returned, and an error follows when it
            is opened.

    Raises:
        DataError: a folder is missing, there are no images, or no image has ground truth.
    """
    for folder, what in ((image_dir, "images"), (gt_dir, "ground truth")):
        if not os.path.isdir(folder):
            raise DataError(
                f"There is no folder {folder} with Cityscapes' {what} (the environment variable "
                "DETECTRON2_DATASETS names the folder that holds 'cityscapes')."
            )
    images = sorted(Path(image_dir).glob(f"*/*{IMAGES}"))
    if not images:
        raise DataError(f"No city below {image_dir} has an image named *{IMAGES}.")
    pairs = []
    for path in images:
        stem = os.path.join(gt_dir, path.parent.name, path.name[: -len(IMAGES)])
        files = [stem + kind for kind in kinds]
        pairs.append((str(path), next(filter(os.path.isfile, files), files[-1])))
    if not os.path.isfile(pairs[0][1]) and not any(os.path.isfile(file) for _, file in pairs):
        raise DataError(
            f"No image below {image_dir} has its ground truth *{kinds[-1]} below {gt_dir}; "
            "unpack gtFine_trainvaltest.zip next to leftImg8bit."
        )
    return pairs


def load_cityscapes_semantic(image_dir: str, gt_dir: str) -> list[dict[str, Any]]:
    """Return the dataset dicts of a split with semantic labels.

    The labels are the files of ``createTrainIdLabelImgs`` if they exist. Otherwise they are the
    label ids of the download, which :class:`SemanticMapper` maps to train ids.

    Args:
        image_dir, gt_dir: folders of a split, with one folder per city.

    Raises:
        DataError: a file or folder is missing or unreadable.
    """
    return [
        {"file_name": path, "sem_seg_file_name": labels, **_size(path)}
        for path, labels in ground_truth_files(image_dir, gt_dir, (TRAIN_IDS, LABEL_IDS))
    ]


def _size(path: str) -> dict[str, int]:
    try:
        with Image.open(path) as image:  # reads only the header
            return {"height": image.height, "width": image.width}
    except OSError as e:
        raise DataError(f"Cityscapes' image {path} is unreadable.") from e


def load_cityscapes_instances(image_dir: str, gt_dir: str) -> list[dict[str, Any]]:
    """Return the dataset dicts of a split with instances as polygons.

    Groups (such as ``cargroup``) are crowds. ``category_id`` is the index among the eight classes
    with instances, in the order of their label ids.

    Args:
        image_dir, gt_dir: folders of a split, with one folder per city.

    Raises:
        DataError: a file or folder is missing or unreadable.
    """
    pairs = ground_truth_files(image_dir, gt_dir, (POLYGONS,))
    workers = min((os.cpu_count() or 1) // comm.get_world_size(), _MOST_WORKERS)
    if len(pairs) < _POOLED or workers < 2:
        return [_instances(pair) for pair in pairs]
    with ProcessPoolExecutor(workers) as pool:  # one process needs minutes
        return list(pool.map(_instances, pairs, chunksize=8))


def _instances(pair: tuple[str, str]) -> dict[str, Any]:
    import shapely

    image, path = pair
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        return {
            "file_name": image,
            "image_id": os.path.basename(image),
            "height": content["imgHeight"],
            "width": content["imgWidth"],
            "annotations": _visible(content["objects"]),
        }
    except DataError as e:
        raise DataError(f"Cityscapes' polygons {path}: {e}") from e
    except FileNotFoundError as e:
        raise DataError(f"There is no file {path} with the polygons of {image}.") from e
    except (OSError, ValueError, TypeError, LookupError, shapely.errors.ShapelyError) as e:
        reason = f"{type(e).__name__} {e}"
        raise DataError(f"Cityscapes' polygons {path} cannot be read: {reason}.") from e


def _visible(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return annotations of the visible parts of objects; later objects hide earlier ones."""
    import shapely

    hidden: Any = shapely.Polygon()
    labels = label_table()
    annotations = []
    for thing in reversed(objects):
        name = thing["label"]
        label = labels.get(name) or labels.get(name.removesuffix("group"))
        if label is None:
            raise DataError(f"'{name}' is not a label of Cityscapes.")
        if label.id < 0 or "deleted" in thing:
            continue
        # A point is a pixel, whose centre is at 0.5. Drawing covers every pixel that it touches.
        shape = shapely.Polygon(np.asarray(thing["polygon"], np.float32) + 0.5).buffer(
            0.5, quad_segs=4
        )
        seen = shape.difference(hidden) if label.id in _things() else None
        if seen is None or not seen.is_empty:
            hidden = hidden.union(shape)
        if seen is not None and not seen.is_empty:
            annotations.append(_annotation(seen, label.id, name.endswith("group")))
    return annotations


def _annotation(seen: Any, label_id: int, crowd: bool) -> dict[str, Any]:
    import shapely

    # Only outer borders are used: COCO's polygons have no holes.
    parts = [x for x in getattr(seen, "geoms", [seen]) if isinstance(x, shapely.Polygon)]
    return {
        "iscrowd": crowd,
        "category_id": _things().index(label_id),
        "segmentation": [[k for point in x.exterior.coords for k in point] for x in parts],
        "bbox": seen.bounds,
        "bbox_mode": BoxMode.XYXY_ABS,
    }


def check_ground_truth(name: str) -> None:
    """Check that a test set has all files that the evaluation needs.

    Args:
        name: name of a data set that detectron2 registers.

    Raises:
        DataError: a file or folder is missing.
    """
    metadata = MetadataCatalog.get(name)
    instances = metadata.evaluator_type == "cityscapes_instance"
    for kind in (INSTANCE_IDS, POLYGONS) if instances else (LABEL_IDS, INSTANCE_IDS):
        pairs = ground_truth_files(metadata.image_dir, metadata.gt_dir, (kind,))
        missing = [file for _, file in pairs if not os.path.isfile(file)]
        if missing:
            raise DataError(
                f"Data set '{name}' cannot be evaluated: the file {missing[0]} is missing, and "
                f"{len(missing) - 1} more for {len(pairs)} images."
            )


def label_problem(path: str) -> Problem | None:
    """Return the problem of the values in Cityscapes' semantic labels, or None.

    Args:
        path: path of a readable image; files that are not Cityscapes' labels have no problem.
    """
    if not path.endswith((LABEL_IDS, TRAIN_IDS)):
        return None
    if path.endswith(TRAIN_IDS):
        kind, known = "train id", {*train_id_table().tolist()}
    else:
        kind, known = "label id", {label.id for label in label_table().values()}
    with Image.open(path) as image:
        found = np.flatnonzero(np.bincount(np.asarray(image.convert("L")).ravel()))
    wrong = sorted(set(found.tolist()) - known)
    if not wrong:
        return None
    return Problem("unknown label", f"the value {wrong[0]} is not a {kind} of Cityscapes")


def register_cityscapes_semantic(name: str, root: str, split: str) -> None:
    """Register a data set for semantic segmentation with Cityscapes' layout and classes.

    Args:
        name: name in detectron2's catalogue; nothing happens if it has the same folder there.
        root: folder with ``leftImg8bit`` and ``gtFine``.
        split: name of the folder in both.
    """
    image_dir, gt_dir = (os.path.join(root, kind, split) for kind in ("leftImg8bit", "gtFine"))
    if name in DatasetCatalog.list() and MetadataCatalog.get(name).image_dir == image_dir:
        return
    DatasetCatalog.register(name, partial(load_cityscapes_semantic, image_dir, gt_dir))
    MetadataCatalog.get(name).set(
        image_dir=image_dir,
        gt_dir=gt_dir,
        evaluator_type="cityscapes_sem_seg",
        ignore_label=IGNORED,
        stuff_classes=[x.name for x in label_table().values() if 0 <= x.trainId < IGNORED],
        stuff_colors=[x.color for x in label_table().values() if 0 <= x.trainId < IGNORED],
    )


def _replace_loaders() -> None:
    loaders: dict[str, Callable[[str, str], list[dict[str, Any]]]] = {
        "cityscapes_instance": load_cityscapes_instances,
        "cityscapes_sem_seg": load_cityscapes_semantic,
    }
    kinds = ("instance_seg", "sem_seg")
    for name in [f"cityscapes_fine_{k}_{s}" for k in kinds for s in ("train", "val", "test")]:
        metadata = MetadataCatalog.get(name)
        load = loaders.get(metadata.get("evaluator_type"))
        if load and metadata.get("image_dir"):
            DatasetCatalog.remove(name)
            DatasetCatalog.register(name, partial(load, metadata.image_dir, metadata.gt_dir))


_replace_loaders()


# --------------------------------------------------------------------------------------- mapper


class _ToTrainIds(NoOpTransform):
    """Transform that maps label ids to train ids, and keeps the image."""

    def apply_segmentation(self, segmentation: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return train_id_table()[segmentation]


class ToTrainIds(Augmentation):
    """Augmentation that maps Cityscapes' label ids to train ids.

    It must be the first augmentation, because crops count classes.
    """

    def __init__(self) -> None:
        super().__init__()  # no arguments, which the log would show

    def get_transform(self, image: Any) -> _ToTrainIds:
        return _ToTrainIds()


def semantic_augmentations(cfg: CfgNode) -> list[Augmentation]:
    """Return detectron2's augmentations for training images without instances.

    ``INPUT.CROP`` crops the resized image, as in detectron2's DeepLab project, so that all crops
    have the same size; for detection, detectron2 crops first. If
    ``INPUT.CROP.SINGLE_CATEGORY_MAX_AREA`` is below 1, up to ten crops are drawn until no class
    fills more than this share. Ignored pixels do not count.
    """
    augmentations = build_augmentation(cfg, is_train=True)
    if cfg.INPUT.CROP.ENABLED:
        crop = RandomCrop_CategoryAreaConstraint(
            cfg.INPUT.CROP.TYPE,
            cfg.INPUT.CROP.SIZE,
            cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA,
            cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        )
        augmentations.insert(1, crop)
    return [Contiguous(), *augmentations]


class SemanticMapper(DatasetMapper):
    """detectron2's mapper for semantic segmentation, which also reads Cityscapes' label ids.

    Label ids are mapped to train ids. detectron2 expects train ids in files that users must make.

    Args:
        is_train: as in :class:`DatasetMapper`.
        augmentations: augmentations for images whose labels are train ids.
        options: other arguments of :class:`DatasetMapper`.
    """

    @configurable
    def __init__(self, is_train: bool, *, augmentations: list[Augmentation], **options: Any):
        super().__init__(is_train, augmentations=augmentations, **options)
        self._label_id_mapper = copy.copy(self)
        self._label_id_mapper.augmentations = AugmentationList([ToTrainIds(), *augmentations])

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        ret = super().from_config(cfg, is_train)
        return {**ret, "augmentations": semantic_augmentations(cfg)} if is_train else ret

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        label_ids = str(dataset_dict.get("sem_seg_file_name", "")).endswith(LABEL_IDS)
        return DatasetMapper.__call__(self._label_id_mapper if label_ids else self, dataset_dict)

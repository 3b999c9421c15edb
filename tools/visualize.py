"""What each method of a config looks at in one picture.

    python tools/visualize.py --config-file configs/quick/demo_tid.yaml --image 000000000012.jpg
        [--weights student.pth] [--out output/visualize] [KEY VALUE ...]

Writes one figure a method: MSSD's masks (paper, Fig. 3), MKD's joint attention and frequency-masked
features, IMA's instances with their α, TID's scores, areas and M (paper, Fig. 4), on every level
over the picture. The heads compute all of it, on networks in evaluation mode and the picture in the
size of the evaluation.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.modeling import build_model
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes
from detectron2.utils.file_io import PathManager
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.checkpoint import load_strictly, readable
from distill.config import building
from distill.data.datasets import class_names, load_training_set
from distill.engine import setup_config, train_mapper
from distill.errors import ConfigError, DataError, DistillError, WeightsError
from distill.heads import IMA, MKD, MSSD, TID
from distill.heads.ima import CROPPED, cell_labels
from distill.losses import joint_attention, tid_mask
from distill.losses.ima import frequency_filtered
from distill.losses.tid import tid_areas
from distill.meta_arch import DistillModel
from distill.structures import Batch, Signals

RANDOM = "random"  # --weights of a student that was never trained
MAX_OBJECTS = 8  # instances drawn, the largest
PANEL = 2.1  # inches, the width of a panel
OVERVIEW = 1.5  # width of the picture beside them, in panels
BOX_COLOR = "#7cfc00"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, AssertionError)


@dataclass(frozen=True)
class Panel:
    """A map to be drawn over the picture.

    Attributes:
        array: (H, W), NaN where there is nothing to say; None: the picture alone.
        area: left, top, right, bottom of the map in pixels of the picture.
        limits: of the colours; None: the array's own.
        zoom: show this area alone.
        names: of the array's values 0, 1, ..., which then are classes.
        marks: x, y in pixels and text.
    """

    array: NDArray[np.float32] | None
    area: tuple[float, float, float, float]
    limits: tuple[float, float] | None = None
    zoom: bool = False
    names: tuple[str, ...] = ()
    marks: tuple[tuple[float, float, str], ...] = ()


Grid = dict[tuple[str, str], Panel]
"""Panels by row (what is shown) and column (level or instance)."""


@dataclass(frozen=True)
class Scene:
    """A picture and what both networks say about it.

    Attributes:
        title: of its figures.
        image: (H, W, 3) RGB, as the student sees it.
        student, teacher: of a batch of this one picture.
        labels: of its ground-truth boxes.
        classes: names of the semantic classes, empty if unknown.
    """

    title: str
    image: NDArray[np.uint8]
    student: Signals
    teacher: Signals | None
    labels: list[str]
    classes: tuple[str, ...]


def mssd_grid(head: MSSD, scene: Scene) -> Grid:
    masks = [head.mask(scene.student, name, stride) for name, stride in head.strides.items()]
    name = "binary mask" if head.binary else f"mask, σ² = {head.sigma2:g}"
    return level_row(name, head.strides.items(), [x[0] for x in masks], (0, 1))


def mkd_grid(head: MKD, scene: Scene) -> Grid:
    levels = [(x.student, x.stride) for x in head.levels]
    maps = feature_maps(head, scene)
    grid: Grid = {}
    if "fad" in head.term_weights and head.options["attention"]:
        area = [joint_attention(s, t)[0, 0] for s, t in maps]
        grid |= level_row("attention A", levels, area, (0, 1))
    name, student = "student mean|F|", [s for s, _ in maps]
    if "fdmd" in head.term_weights:
        name = f"student mean|F̂|, ζ = {head.masks.mask_ratio:g}"
        student = [frequency_filtered(s, head.masks(s)) for s in student]
    grid |= level_row(name, levels, [magnitude(s[0]) for s in student])
    return grid | level_row("teacher mean|F|", levels, [magnitude(t[0]) for _, t in maps])


def ima_grid(head: IMA, scene: Scene) -> Grid:
    maps = feature_maps(head, scene)
    if head.scope in CROPPED:
        return _crops(head, scene, maps)
    levels = [(x.student, x.stride) for x in head.levels]
    grid: Grid = {}
    if head.scope == "class":
        grid = _classes(head, scene, maps)
    else:
        scales = [float(head.scales(s, t, None)) for s, t in maps]
        levels = [(f"α {a:.2f} · {name}", stride) for a, (name, stride) in zip(scales, levels)]
    grid |= level_row("student mean|F|", levels, [magnitude(s[0]) for s, _ in maps])
    return grid | level_row("teacher mean|F|", levels, [magnitude(t[0]) for _, t in maps])


def _crops(head: IMA, scene: Scene, maps: list[tuple[Tensor, Tensor]]) -> Grid:
    """Scopes "box" and "mask": one column an instance."""
    s, t, weight = head.crops(maps, scene.student.batch)
    scales = head.scales(s, t, weight)
    boxes = Boxes(scene.student.batch.boxes[0])
    pooler = head.pooler
    levels = assign_boxes_to_levels(
        [boxes],
        pooler.min_level,
        pooler.max_level,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )
    grid: Grid = {}
    for i in sorted(boxes.area().argsort(descending=True)[:MAX_OBJECTS].tolist()):
        level = head.levels[int(levels[i])]
        column = f"{scene.labels[i]}\n{level.student}, stride {level.stride} · α {scales[i]:.2f}"
        shown = {"picture": None, "student mean|F|": magnitude(s[i])}
        shown["teacher mean|F|"] = magnitude(t[i])
        if weight is not None:
            shown["mask"] = weight[i, 0]
        for row, x in shown.items():
            limits = (0.0, 1.0) if row == "mask" else None
            left, top, right, bottom = boxes.tensor[i].tolist()
            grid[row, column] = Panel(array(x), (left, top, right, bottom), limits, zoom=True)
    return grid


def _classes(head: IMA, scene: Scene, maps: list[tuple[Tensor, Tensor]]) -> Grid:
    """Scope "class": the cells of each class, and its α on them."""
    names = scene.classes or tuple(f"class {i}" for i in range(head.num_classes))
    grid: Grid = {}
    for level, (s, t) in zip(head.levels, maps):
        labels = cell_labels(scene.student.batch.sem_seg.to(s.device), *s.shape[2:])
        scales = head.class_scales(s, t, labels)[0]
        known = (labels[0] >= 0) & (labels[0] < head.num_classes)
        cells = labels[0].float().where(known, torch.nan)
        alpha = scales[labels[0].clamp(0, head.num_classes - 1)].where(known, torch.nan)
        marks = []
        for k in labels[0][known].unique().tolist():
            own = (labels[0] == k).nonzero().float()
            y, x = own[(own - own.mean(0)).square().sum(1).argmin()].tolist()
            centre = ((x + 0.5) * level.stride, (y + 0.5) * level.stride)
            marks.append((*centre, f"{scales[k]:.2f}"))
        column = [(level.student, level.stride)]
        for key, panel in level_row("classes", column, [cells], names=names).items():
            grid[key] = panel
        for key, panel in level_row("α", column, [alpha], (0, 1), marks=tuple(marks)).items():
            grid[key] = panel
    return grid


def tid_grid(head: TID, scene: Scene) -> Grid:
    assert scene.teacher is not None
    student, teacher = scene.student, scene.teacher
    levels = [(x.student, x.stride) for x in head.levels]
    judgement = head.judgement(student, teacher, 0)
    key, weak = tid_areas(*judgement, **head.value_options)
    masks = [tid_mask(v)[0] for v in head.values(student, teacher)]
    highest = float(torch.stack(judgement[:2]).max())
    rows = {
        "Score_T": (judgement.score_teacher, (0.0, highest)),
        "Score_S": (judgement.score_student, (0.0, highest)),
        "key area, Score_key": (key, (0.0, highest)),
        "weak area, Score_weak": (weak, (1.0, 1.5)),
    }
    grid: Grid = {}
    for name, (points, limits) in rows.items():
        maps = [x[0] for x in head.by_level(points[None], student)]
        grid |= level_row(name, levels, maps, limits)
    return grid | level_row("M", levels, masks, (0, max(float(x.max()) for x in masks)))


GRIDS: dict[type[nn.Module], Callable[[Any, Scene], Grid]] = {
    MSSD: mssd_grid,
    MKD: mkd_grid,
    IMA: ima_grid,
    TID: tid_grid,
}


def level_row(
    name: str,
    levels: Iterable[tuple[str, int]],
    maps: Sequence[Tensor],
    limits: tuple[float, float] | None = None,
    **options: Any,
) -> Grid:
    """One panel a level.

    Args:
        name: of the row.
        levels: name and stride in pixels.
        maps: (Hi, Wi) each.
        limits: of the colours of all panels; None: each panel's own.
        options: of every :class:`Panel`.
    """
    grid = {}
    for (level, stride), x in zip(levels, maps):
        area = (0.0, 0.0, float(x.shape[1] * stride), float(x.shape[0] * stride))
        grid[name, f"{level}, stride {stride}"] = Panel(array(x), area, limits, **options)
    return grid


def feature_maps(head: MKD | IMA, scene: Scene) -> list[tuple[Tensor, Tensor]]:
    assert scene.teacher is not None
    return [(s.float(), t.float()) for s, t in head.maps(scene.student, scene.teacher)]


def magnitude(maps: Tensor) -> Tensor:
    """(H, W) mean over the channels of |F|."""
    return maps.abs().mean(0)


def array(x: Tensor | None) -> NDArray[np.float32] | None:
    return None if x is None else x.float().cpu().numpy()


def missing_truth(head: nn.Module, entry: dict[str, Any]) -> str | None:
    """The ground truth that the head's figure shows and the picture lacks."""
    boxes = isinstance(head, (MSSD, TID)) or (isinstance(head, IMA) and head.scope in CROPPED)
    if boxes and "instances" not in entry:
        return "ground-truth boxes"
    if isinstance(head, IMA) and head.scope in CROPPED and not len(entry["instances"]):
        return "at least one ground-truth box"
    if isinstance(head, IMA) and head.scope == "class" and "sem_seg" not in entry:
        return "semantic labels"
    return None


def find_picture(cfg: CfgNode, image: str) -> dict[str, Any]:
    """The picture's entry in a test or training set of the config, tests first.

    Args:
        image: the end of its path, or its index, counted through the sets in that order.

    Raises:
        DataError: it is in none of them.
    """
    sets = tuple(dict.fromkeys((*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)))
    count = 0
    for name in sets:
        single = cfg.clone()
        single.defrost()
        single.DATASETS.TRAIN, single.DATALOADER.FILTER_EMPTY_ANNOTATIONS = (name,), False
        pictures = load_training_set(single)
        for index, entry in enumerate(pictures, count):
            if image == str(index) or _is_file(entry["file_name"], image):
                return {**entry, "dataset": name}
        count += len(pictures)
    raise DataError(
        f"--image {image}: none of the {count} pictures of {', '.join(sets)} has this file name "
        "or index."
    )


def _is_file(path: str, image: str) -> bool:
    parts = Path(image).parts
    return Path(path).parts[-len(parts) :] == parts or os.path.abspath(path) == image


def read_picture(cfg: CfgNode, model: DistillModel, image: str) -> dict[str, Any]:
    """One ``batched_inputs`` entry in the size of the evaluation, with ground truth if needed.

    Raises:
        DataError: a head needs ground truth that the picture lacks, or it cannot be read.
    """
    outside = os.path.isfile(image)
    heads = {k: v for k, v in model.heads.items() if type(v) in GRIDS}
    wanting = [(k, lack) for k, v in heads.items() if (lack := missing_truth(v, {}))]
    entry = {"file_name": image}
    if wanting or not outside:
        try:
            entry = find_picture(cfg, os.path.abspath(image) if outside else image)
        except DataError as e:
            if not outside or not wanting:
                raise
            name, lack = wanting[0]
            raise DataError(f"{name} needs {lack}, but {e}") from e
    plain = cfg.clone()
    plain.defrost()
    plain.INPUT.MIN_SIZE_TRAIN, plain.INPUT.MIN_SIZE_TRAIN_SAMPLING = (
        (cfg.INPUT.MIN_SIZE_TEST,),
        "choice",
    )
    plain.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST
    plain.INPUT.RANDOM_FLIP, plain.INPUT.CROP.ENABLED = "none", False
    try:
        mapped = train_mapper(plain)(entry)
    except _UNREADABLE as e:
        raise DataError(f"{entry['file_name']} cannot be read: {type(e).__name__} {e}") from e
    return mapped



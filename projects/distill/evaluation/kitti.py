"""KITTI's metrics of 2D detection, and COCO's metrics on KITTI's data.

The rules are those of the object benchmark's development kit (``evaluate_object.cpp`` of 2017),
with the 40 recall positions of 2019. Simonelli et al., "Disentangling monocular 3D object
detection", ICCV 2019, explain these positions.
"""

import itertools
import json
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from numpy.typing import NDArray

from ..data.kitti import DONT_CARE, KITTI_CLASSES, NEIGHBOURS, Label, read_labels
from .coco_recall import COCORecallEvaluator

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
RECALL_POSITIONS = 41  # 0, 1/40, ..., 1; the mean leaves out 0, where one hit would count twice
MIN_OVERLAP = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}


class Difficulty(NamedTuple):
    """Limits of a difficulty. Objects beyond them are ignored."""

    min_height: int  # pixels
    max_occlusion: int  # see Label
    max_truncation: float


DIFFICULTIES = {
    "easy": Difficulty(40, 0, 0.15),
    "moderate": Difficulty(25, 1, 0.30),
    "hard": Difficulty(25, 2, 0.50),
}


class Detections(NamedTuple):
    """The N detections in an image."""

    boxes: Floats  # (N, 4) left, top, right, bottom; pixels
    scores: Floats  # (N,)
    classes: NDArray[np.int64]  # (N,) indices into KITTI_CLASSES

    @classmethod
    def empty(cls) -> "Detections":
        """Return no detections."""
        return cls(np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=np.int64))


class ClassView(NamedTuple):
    """Data of one image for one class.

    G objects belong to the class or its neighbour. N detections belong to all classes.
    """

    overlaps: Floats  # (G, N) intersection over union
    own: Bools  # (G,) True for objects of the class, False for its neighbour
    heights: Floats  # (G,) pixels
    occlusions: NDArray[np.int64]  # (G,)
    truncations: Floats  # (G,)
    detected: Bools  # (N,) True for detections of the class
    detected_heights: Floats  # (N,) pixels
    scores: Floats  # (N,)
    dont_care: Bools  # (N,) True in a DontCare region


def kitti_average_precision(
    labels: Sequence[Sequence[Label]], detections: Sequence[Detections]
) -> dict[str, float]:
    """Return the AP of each class and difficulty over 40 recall positions, as ``"Car/moderate"``.

    A class with n objects reaches at most n - 1 of the 40 positions, because the first hit only
    serves recall 0. With fewer than 41 objects even perfect detections stay below 100.

    Args:
        labels: labels of each image, in the order of its file: earlier objects choose first.
        detections: detections of each image.

    Returns:
        Percent; NaN without such objects. ``"mAP/..."`` is the mean of the classes with objects.
    """
    results: dict[str, float] = {}
    for name in KITTI_CLASSES:
        views = [class_view(name, *image) for image in zip(labels, detections, strict=True)]
        for level, difficulty in DIFFICULTIES.items():
            ap = average_precision(views, difficulty, MIN_OVERLAP[name])
            results[f"{name}/{level}"] = 100 * ap
    for level in DIFFICULTIES:
        values = [results[f"{name}/{level}"] for name in KITTI_CLASSES]
        values = [value for value in values if not math.isnan(value)]
        results[f"mAP/{level}"] = sum(values) / len(values) if values else math.nan
    return results


def class_view(name: str, labels: Sequence[Label], detections: Detections) -> ClassView:
    """Return the data of one image that a class needs at every difficulty."""
    objects = [x for x in labels if name in (x.type, NEIGHBOURS.get(x.type))]
    boxes = _boxes(objects)
    shared = intersections(boxes, detections.boxes)
    areas = _areas(detections.boxes)
    unions = _areas(boxes)[:, None] + areas - shared
    regions = intersections(_boxes([x for x in labels if x.type == DONT_CARE]), detections.boxes)
    return ClassView(
        overlaps=shared / np.maximum(unions, 1e-12),
        own=np.array([x.type == name for x in objects], dtype=bool),
        heights=boxes[:, 3] - boxes[:, 1],
        occlusions=np.array([x.occlusion for x in objects], dtype=np.int64),
        truncations=np.array([x.truncation for x in objects], dtype=float),
        detected=detections.classes == KITTI_CLASSES.index(name),
        detected_heights=detections.boxes[:, 3] - detections.boxes[:, 1],
        scores=detections.scores,
        dont_care=np.any(regions > MIN_OVERLAP[name] * areas, axis=0),
    )


def _boxes(labels: Sequence[Label]) -> Floats:
    return np.array([x.box for x in labels], dtype=float).reshape(-1, 4)


def _areas(boxes: Floats) -> Floats:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def intersections(a: Floats, b: Floats) -> Floats:
    """Return the intersection areas (M, N) of boxes (M, 4) and (N, 4) in pixels².

    They are in float64, as in the kit.
    """
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return (high - low).clip(min=0).prod(axis=2)


def average_precision(
    views: Sequence[ClassView], difficulty: Difficulty, min_overlap: float
) -> float:
    """Return the mean of the precision at recall 1/40, 2/40, ..., 1.

    The precision at a recall is the best one at this recall or beyond.

    Returns:
        A value in [0, 1]; NaN without objects that count.
    """
    objects = sum(int(counted(view, difficulty).sum()) for view in views)
    if not objects:
        return math.nan
    views = [view for view in views if len(view.scores)]
    hits = [hit_scores(view, difficulty, min_overlap) for view in views]
    thresholds = recall_thresholds(np.concatenate([np.zeros(0), *hits]), objects)
    true, false = np.zeros((2, len(thresholds)))
    for view in views:
        in_view = count(view, difficulty, min_overlap, thresholds)
        true, false = true + in_view[0], false + in_view[1]
    precision = np.zeros(RECALL_POSITIONS)
    precision[: len(thresholds)] = true / np.maximum(true + false, 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(best[1:].mean())


def counted(view: ClassView, difficulty: Difficulty) -> Bools:
    """Return (G,) True for the objects that must be found. The others may be found."""
    return (
        view.own
        & (view.heights > difficulty.min_height)
        & (view.occlusions <= difficulty.max_occlusion)
        & (view.truncations <= difficulty.max_truncation)
    )


def hit_scores(view: ClassView, difficulty: Difficulty, min_overlap: float) -> Floats:
    """Return the scores of the detections that find an object if each object takes the best score.

    A detection that is too small to be judged is no hit, but an object can take it instead of
    another detection. As in the kit, this holds for small detections of *all* classes.
    """
    small = view.detected_heights < difficulty.min_height
    matches = (view.overlaps > min_overlap) & (view.detected | small)
    preference = np.broadcast_to(view.scores, matches.shape)
    taken, _ = assign(matches, preference, np.ones((1, len(small)), dtype=bool))
    found = taken[0]
    return view.scores[found[(found >= 0) & counted(view, difficulty) & ~small[found]]]


def count(
    view: ClassView, difficulty: Difficulty, min_overlap: float, thresholds: Floats
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count true and false positives (T,) among the detections of at least each threshold (T,).

    Each object takes the detection that overlaps most. Detections that are too small to be judged
    are left out. The kit gives them to objects that find no other detection, but that changes
    neither number.
    """
    judged = view.detected & (view.detected_heights >= difficulty.min_height)
    matches = (view.overlaps > min_overlap) & judged
    taken, free = assign(matches, view.overlaps, view.scores >= thresholds[:, None])
    true = (taken >= 0) & counted(view, difficulty)
    return true.sum(axis=1), (free & judged & ~view.dont_care).sum(axis=1)


def assign(matches: Bools, preference: Floats, free: Bools) -> tuple[NDArray[np.int64], Bools]:
    """Let each object in turn take the free matching detection that it prefers, at T thresholds.

    Args:
        matches: (G, N) True for the detections that an object may take.
        preference: (G, N) preference of each object. The first of equal detections is taken.
        free: (T, N) True for the detections that exist at a threshold.

    Returns:
        taken: (T, G) index of the detection that each object took, or -1.
        free: (T, N) True for the detections that are still free.
    """
    free, rows = free.copy(), np.arange(len(free))
    taken = np.full((len(free), len(matches)), -1)
    for index in np.flatnonzero(matches.any(axis=1)):
        best = np.where(free & matches[index], preference[index], -np.inf).argmax(axis=1)
        found = (free & matches[index])[rows, best]
        taken[found, index] = best[found]
        free[rows[found], best[found]] = False
    return taken, free


def recall_thresholds(scores: Floats, objects: int) -> Floats:
    """Return the scores at which recall is nearest to 0, 1/40, 2/40, ..., in descending order.

    There are at most 41.

    Args:
        scores: scores of the hits, in any order.
        objects: number of objects that must be found.
    """
    scores = np.sort(scores)[::-1]
    thresholds: list[float] = []
    wanted = 0.0
    for index, score in enumerate(scores):
        recall, following = (index + 1) / objects, (index + 2) / objects
        if index + 1 < len(scores) and following - wanted < wanted - recall:
            continue
        thresholds.append(score)
        wanted += 1 / (RECALL_POSITIONS - 1)
    return np.array(thresholds, dtype=float)


class KITTIEvaluator(DatasetEvaluator):
    """:func:`kitti_average_precision` as a detectron2 evaluator; results are under ``"kitti"``.

    All processes must call :meth:`evaluate`; the first one returns the results.

    Args:
        dataset_name: data set of ``register_kitti``. Its label files are read by :meth:`evaluate`.
    """

    def __init__(self, dataset_name: str):
        self.dataset_name = dataset_name
        self.reset()

    def reset(self) -> None:
        self.detections: dict[int, Detections] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for image, output in zip(inputs, outputs):
            instances = output["instances"].to("cpu")
            self.detections[image["image_id"]] = Detections(
                instances.pred_boxes.tensor.double().numpy(),
                instances.scores.double().numpy(),
                instances.pred_classes.numpy(),
            )

    def evaluate(self) -> dict[str, dict[str, float]]:
        gathered = comm.gather(self.detections, dst=0)
        if not comm.is_main_process():
            return {}
        detections = dict(itertools.chain.from_iterable(part.items() for part in gathered))
        images = DatasetCatalog.get(self.dataset_name)
        results = kitti_average_precision(
            [read_labels(x["label_file"]) for x in images],
            [detections.get(x["image_id"], Detections.empty()) for x in images],
        )
        logger.info("KITTI's AP at 40 recall positions:\n%s", create_small_table(results))
        return {"kitti": results}


def coco_evaluator(dataset_name: str, output_dir: str) -> COCORecallEvaluator:
    """Return an evaluator of COCO's metrics on KITTI, as ``"bbox"``. Crowds absorb detections.

    detectron2 would convert the data set to a file in the output folder and read that file in later
    runs, too. This converts the data set each time and keeps no file.

    Args:
        dataset_name: data set of ``register_kitti``.
        output_dir: folder for the predictions.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"{dataset_name}.json")
        with open(path, "w", encoding="utf-8") as f:
            json.dump(convert_to_coco_dict(dataset_name), f)
        # Separate metadata, because those of the data set cannot be changed again.
        MetadataCatalog.get(path).set(json_file=path, thing_classes=list(KITTI_CLASSES))
        try:
            return COCORecallEvaluator(path, tasks=("bbox",), output_dir=output_dir)
        finally:
            MetadataCatalog.remove(path)

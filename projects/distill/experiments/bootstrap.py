"""Bootstrap of gains in COCO's AP over the test images, paired: all runs see the same resample.

It measures another source of error than the seeds do: the test images are a sample, too.
pycocotools matches detections and objects once, per image. A resample only accumulates these
matches again, with each image counted as often as it was drawn.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

from ..evaluation.coco_errors import MATCH_IOU

Floats = NDArray[np.float64]
IOUS = {"AP": None, "AP50": 0.5, "AP75": 0.75}  # thresholds of a metric; None: all from 0.5 on


class ClassMatches(NamedTuple):
    """Detections of one class in all images, from the highest score to the lowest.

    Attributes:
        image: (D,) index of the detection's image.
        right: (T, D) whether it matches an object, by the threshold of the IoU.
        wrong: (T, D) whether it matches no object. Ignored detections are neither.
        objects: (I,) number of objects in each image.
    """

    image: NDArray[np.int64]
    right: NDArray[np.bool_]
    wrong: NDArray[np.bool_]
    objects: Floats


def class_matches(evaluation: COCOeval, metric: str) -> list[ClassMatches]:
    """Return the matches of objects of every size by class.

    Args:
        evaluation: result of :func:`distill.evaluation.coco_errors.coco_evaluation`.
        metric: a key of :data:`IOUS`.
    """
    thresholds, iou = evaluation.params.iouThrs, IOUS[metric]
    used = thresholds > MATCH_IOU - 1e-9 if iou is None else np.isclose(thresholds, iou)
    images = {image: k for k, image in enumerate(evaluation.params.imgIds)}
    every_size = evaluation.params.areaRng[0]
    entries: dict[Any, list[Any]] = {category: [] for category in evaluation.params.catIds}
    for entry in evaluation.evalImgs:
        if entry is not None and entry["aRng"] == every_size:
            entries[entry["category_id"]].append(entry)
    return [_of_class(found, images, used) for found in entries.values()]


def _of_class(
    entries: Iterable[Any], images: Mapping[Any, int], used: NDArray[np.bool_]
) -> ClassMatches:
    objects = np.zeros(len(images))
    image, scores = [np.zeros(0, np.int64)], [np.zeros(0)]
    right, wrong = ([np.zeros((int(used.sum()), 0), bool)] for _ in range(2))
    for entry in entries:
        k, number = images[entry["image_id"]], len(entry["dtScores"])
        objects[k] = np.sum(np.logical_not(entry["gtIgnore"]))
        matched, counted = entry["dtMatches"][used] > 0, np.logical_not(entry["dtIgnore"][used])
        image.append(np.full(number, k))
        scores.append(np.asarray(entry["dtScores"]))
        right.append(matched & counted)
        wrong.append(~matched & counted)
    order = np.argsort(-np.concatenate(scores), kind="mergesort")
    hits = np.concatenate(right, 1)[:, order]
    last = int(np.flatnonzero(hits.any(0)).max(initial=-1)) + 1  # later ones do not change AP
    order = order[:last]
    misses = np.concatenate(wrong, 1)[:, order]
    return ClassMatches(np.concatenate(image)[order], hits[:, :last], misses, objects)


def average_precision(classes: Sequence[ClassMatches], counts: Floats, recalls: Floats) -> float:
    """Return COCO's AP in [0, 1], with each image counted several times; NaN without objects.

    Args:
        classes: see :func:`class_matches`.
        counts: (I,) number of times that each image counts.
        recalls: the rising recalls at which the precision is read.
    """
    objects = [float(counts @ x.objects) for x in classes]
    found = [_precision(x, counts, n, recalls) for x, n in zip(classes, objects) if n]
    return float(np.mean(found)) if found else float("nan")


def _precision(x: ClassMatches, counts: Floats, objects: float, recalls: Floats) -> float:
    """Return the mean precision of a class over thresholds and recalls, as COCOeval's accumulate.

    Copies of an image follow each other, and only the last of them can be the highest precision of
    its recall. So one detection of the weight w is the same as w detections.
    """
    weights = counts[x.image]
    right, wrong = (np.cumsum(kind * weights, 1) for kind in (x.right, x.wrong))
    precision = right / (right + wrong + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    total = 0.0
    for row, recall in zip(precision, right / objects):
        places = np.searchsorted(recall, recalls, side="left")
        total += row[places[places < len(row)]].sum()
    return float(total / (len(precision) * len(recalls)))


class ImageBootstrap(NamedTuple):
    """Gains over resamples of the test images, in points of AP.

    Attributes:
        gain: mean gain on the images as they are.
        low, high: 2.5 % and 97.5 % quantile of the mean gain over the resamples.
        deviation: standard deviation over the resamples.
    """

    gain: float
    low: float
    high: float
    deviation: float


def bootstrap_gains(
    runs: Mapping[str, Sequence[Sequence[ClassMatches]]],
    reference: str,
    recalls: Floats,
    counts: Iterable[Floats],
) -> dict[str, ImageBootstrap]:
    """Return the bootstrap of the mean gain of ``reference`` over each other arm.

    Args:
        runs: matches by arm and seed; all of the same images in the same order.
        reference: the distilled arm.
        recalls: see :func:`average_precision`.
        counts: see :func:`resamples`.
    """
    (images,) = {len(x[0].objects) for arm in runs.values() for x in arm}

    def means(drawn: Floats) -> dict[str, float]:
        return {
            name: 100 * float(np.mean([average_precision(x, drawn, recalls) for x in arm]))
            for name, arm in runs.items()
        }

    once = means(np.ones(images))
    resampled = [means(drawn) for drawn in counts]
    found = {}
    for name in runs:
        if name != reference:
            gains = np.array([x[reference] - x[name] for x in resampled])
            low, high = np.nanquantile(gains, (0.025, 0.975)).tolist()
            own = once[reference] - once[name]
            found[name] = ImageBootstrap(own, low, high, float(np.nanstd(gains, ddof=1)))
    return found


def resamples(images: int, number: int, seed: int) -> Iterable[Floats]:
    """Yield, ``number`` times, how often each image is in a sample with replacement."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        yield rng.multinomial(images, np.full(images, 1 / images)).astype(np.float64)

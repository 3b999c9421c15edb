"""COCO's error analysis: precision and recall with kinds of errors removed one after another.

The curves are those of cocodataset.org/#detection-eval ("Analysis Code"), after Hoiem,
Chodpathumwan, Dai, "Diagnosing error in object detectors", ECCV 2012. pycocotools does all
matching.
"""

import contextlib
import io
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Floats = NDArray[np.float64]
CURVES = {
    "C75": "IoU of at least 0.75",
    "C50": "IoU of at least 0.5",
    "Loc": "IoU of at least 0.1: localization errors are ignored, duplicates are not",
    "Sim": "also ignores detections that match a class of the same supercategory",
    "Oth": "also ignores detections that match any other class",
    "BG": "also ignores detections that match no object",
    "FN": "also ignores missed objects",
}
MATCH_IOU, LOOSE_IOU = 0.5, 0.1  # IoU of judge(), and of all curves from Loc on


class AbsorbingEval(COCOeval):
    """COCOeval in which objects of other classes absorb the detections that match them.

    An absorbed detection counts neither as right nor as wrong. Each object absorbs at most one
    detection, and only a detection that matches no object of its own class.

    Args:
        truth, detections: in COCO's format.
        iou_type: "bbox" or "segm", see :func:`coco_evaluation`.
        absorbers: for each category of a detection, the other categories whose objects absorb it.
    """

    def __init__(
        self,
        truth: COCO,
        detections: COCO,
        iou_type: str,
        absorbers: Mapping[Any, Collection[Any]],
    ):
        super().__init__(truth, detections, iou_type)
        self.absorbers = absorbers

    def _prepare(self) -> None:
        super()._prepare()
        objects = dict(self._gts)
        for image, category in self._dts:
            others = [objects.get((image, other), ()) for other in self.absorbers[category]]
            ignored = [{**x, "ignore": 1} for group in others for x in group]
            self._gts[image, category] = [*objects.get((image, category), ()), *ignored]


def coco_evaluation(
    truth: COCO,
    detections: COCO,
    max_detections: int = 100,
    iou_type: str = "bbox",
    images: Collection[Any] | None = None,
) -> COCOeval:
    """Run COCO's evaluation at IoU 0.1 and at 0.5, 0.55, ..., 0.95.

    Args:
        truth, detections: in COCO's format.
        max_detections: number of detections per image and class, by descending score; at least 10.
        iou_type: "bbox", or "segm" for masks.
        images: ids of the images to evaluate; None: all.
    """
    evaluation = COCOeval(truth, detections, iou_type)
    if images is not None:
        evaluation.params.imgIds = sorted(images)
    evaluation.params.iouThrs = np.append(LOOSE_IOU, evaluation.params.iouThrs)
    evaluation.params.maxDets = [1, 10, max_detections]
    return _run(evaluation)


def coco_metrics(evaluation: COCOeval) -> dict[str, float]:
    """Return AP and AR as COCO defines them.

    Args:
        evaluation: result of :func:`coco_evaluation`.

    Returns:
        Values in [0, 1]; NaN without objects. The number after AR is the number of detections per
        image and class. The letters s, m and l are COCO's sizes of objects.
    """
    limits = evaluation.params.maxDets
    strict = slice(_threshold(evaluation, MATCH_IOU), None)
    precision = evaluation.eval["precision"]  # (T, R, K, A, M)
    recall = evaluation.eval["recall"]  # (T, K, A, M)
    sizes = {"s": 1, "m": 2, "l": 3}
    return {
        "AP": _mean(precision[strict, :, :, 0, -1]),
        "AP50": _mean(precision[_threshold(evaluation, 0.5), :, :, 0, -1]),
        "AP75": _mean(precision[_threshold(evaluation, 0.75), :, :, 0, -1]),
        **{f"AP{k}": _mean(precision[strict, :, :, a, -1]) for k, a in sizes.items()},
        **{f"AR{n}": _mean(recall[strict, :, 0, m]) for m, n in enumerate(limits)},
        **{f"AR{k}": _mean(recall[strict, :, a, -1]) for k, a in sizes.items()},
    }


def error_curves(evaluation: COCOeval) -> Floats:
    """Return the precision of the :data:`CURVES`, (7, R, K), at R recalls for K classes by id.

    The mean over the recalls is the area below a curve. The mean over the classes is COCO's overall
    curve. If no category has a supercategory, Sim equals Loc.

    Args:
        evaluation: result of :func:`coco_evaluation`.

    Returns:
        Values in [0, 1]; NaN for classes without objects.
    """
    precision = evaluation.eval["precision"][..., 0, -1]  # (T, R, K)
    c75, c50, loc = (precision[_threshold(evaluation, iou)] for iou in (0.75, 0.5, LOOSE_IOU))
    categories = evaluation.cocoGt.loadCats(evaluation.params.catIds)
    supers = {x["id"]: x.get("supercategory") for x in categories}
    similar = {i: [j for j in supers if j != i and supers[j] == supers[i]] for i in supers}
    similar = {i: others if supers[i] else [] for i, others in similar.items()}
    any_other = {i: [j for j in supers if j != i] for i in supers}
    sim, oth = (_absorbing(evaluation, others) for others in (similar, any_other))
    curves = np.stack([c75, c50, loc, sim, oth, oth > 0, np.ones_like(oth)])
    return np.where(loc < 0, np.nan, curves)


def mean_of_classes(curves: Floats) -> Floats:
    """Return the mean over the last axis, the classes, of those that have objects."""
    defined: Floats = curves[..., ~np.isnan(curves).any(tuple(range(curves.ndim - 1)))]
    return defined.mean(-1)


def _absorbing(evaluation: COCOeval, absorbers: Mapping[Any, Collection[Any]]) -> Floats:
    """Return the precision (R, K) at IoU 0.1 if objects of other classes absorb detections."""
    absorbing = AbsorbingEval(
        evaluation.cocoGt, evaluation.cocoDt, evaluation.params.iouType, absorbers
    )
    absorbing.params.imgIds = evaluation.params.imgIds
    absorbing.params.iouThrs = np.array([LOOSE_IOU])
    absorbing.params.maxDets = evaluation.params.maxDets[-1:]
    absorbing.params.areaRng = evaluation.params.areaRng[:1]
    return _run(absorbing).eval["precision"][0, :, :, 0, 0]


class Judged(NamedTuple):
    """Detections of an image, judged at IoU 0.5. Crowds and their detections are left out.

    Attributes:
        right: ids of detections that match an object.
        wrong: ids of detections that match no object, or an object that is already matched.
        missed: ids of objects without a matching detection.
    """

    right: list[int]
    wrong: list[int]
    missed: list[int]

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 if there are no objects and no detections."""
        mistakes = len(self.wrong) + len(self.missed)
        return 2 * len(self.right) / (2 * len(self.right) + mistakes) if mistakes else 1.0


def judge(evaluation: COCOeval, min_score: float) -> dict[Any, Judged]:
    """Judge the detections with a score of at least ``min_score``, by image id.

    Args:
        evaluation: result of :func:`coco_evaluation`.
        min_score: in [0, 1].
    """
    iou_index = _threshold(evaluation, MATCH_IOU)
    judged = {image: Judged([], [], []) for image in evaluation.params.imgIds}
    for result in evaluation.evalImgs:  # one per class, image and COCO size
        if result is None or result["aRng"] != evaluation.params.areaRng[0]:
            continue
        right, wrong, missed = judged[result["image_id"]]
        found = set()
        columns = (
            result["dtIds"],
            result["dtScores"],
            result["dtMatches"][iou_index],
            result["dtIgnore"][iou_index],
        )
        for detection, score, match, ignored in zip(*columns):
            if score >= min_score:
                found.add(match)
                if not ignored:
                    (right if match else wrong).append(detection)
        objects = zip(result["gtIds"], result["gtIgnore"])
        missed += [x for x, ignored in objects if not ignored and x not in found]
    return judged


def _run(evaluation: COCOeval) -> COCOeval:
    """Run COCOeval without its printed output."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _threshold(evaluation: COCOeval, iou: float) -> int:
    """Return the index of an IoU threshold."""
    return int(np.flatnonzero(np.isclose(evaluation.params.iouThrs, iou))[0])


def _mean(values: Floats) -> float:
    """Return the mean of the defined values. pycocotools writes -1 where there are no objects."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan

"""COCO's analysis of errors: precision and recall without one kind of error after another.

The curves are those of cocodataset.org/#detection-eval ("Analysis Code"), after Hoiem,
Chodpathumwan, Dai, "Diagnosing error in object detectors", ECCV 2012. All matching is pycocotools'.
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
    "Loc": "IoU of at least 0.1: errors of localization ignored, duplicates not",
    "Sim": "detections that match objects of another class of the same supercategory ignored, too",
    "Oth": "detections that match objects of any other class ignored, too",
    "BG": "detections that match no object ignored, too",
    "FN": "missed objects ignored, too",
}
MATCH, TOUCH = 0.5, 0.1  # IoU at which a picture is judged, and that all curves from Loc on have


class AbsorbingEval(COCOeval):
    """COCOeval of boxes, in which objects of other classes absorb the detections that match them.

    Such a detection counts neither as right nor as wrong. Like all objects, these are matched once;
    and only by detections that match no object of their own class.

    Args:
        truth, detections: in COCO's format.
        absorbers: by the category of a detection, the other categories whose objects absorb it.
    """

    def __init__(self, truth: COCO, detections: COCO, absorbers: Mapping[Any, Collection[Any]]):
        super().__init__(truth, detections, "bbox")
        self.absorbers = absorbers

    def _prepare(self) -> None:
        super()._prepare()
        objects = dict(self._gts)
        for image, category in self._dts:
            others = [objects.get((image, other), ()) for other in self.absorbers[category]]
            ignored = [{**x, "ignore": 1} for group in others for x in group]
            self._gts[image, category] = [*objects.get((image, category), ()), *ignored]


def coco_evaluation(truth: COCO, detections: COCO, max_detections: int = 100) -> COCOeval:
    """COCO's evaluation of boxes, at IoU 0.1 beside 0.5, 0.55, ..., 0.95.

    Args:
        truth, detections: in COCO's format.
        max_detections: of a picture and class, those of highest score; at least 10.
    """
    evaluation = COCOeval(truth, detections, "bbox")
    evaluation.params.iouThrs = np.append(TOUCH, evaluation.params.iouThrs)
    evaluation.params.maxDets = [1, 10, max_detections]
    return _run(evaluation)


def coco_metrics(evaluation: COCOeval) -> dict[str, float]:
    """AP and AR of boxes, as COCO defines them.

    Args:
        evaluation: of :func:`coco_evaluation`.

    Returns:
        0 ... 1, NaN without objects. The number behind AR is that of the detections of a class in
        a picture; s, m, l are COCO's sizes of objects.
    """
    limits = evaluation.params.maxDets
    strict = slice(_threshold(evaluation, MATCH), None)
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
    """Precision (7, R, K) of the :data:`CURVES` at R recalls, of K classes in order of their ids.

    The mean over the recalls is the area below a curve, the mean over the classes COCO's overall
    curve. Where no category has a supercategory, Sim is Loc.

    Args:
        evaluation: of :func:`coco_evaluation`.

    Returns:
        0 ... 1, NaN for classes without objects.
    """
    precision = evaluation.eval["precision"][..., 0, -1]  # (T, R, K)
    c75, c50, loc = (precision[_threshold(evaluation, iou)] for iou in (0.75, 0.5, TOUCH))
    categories = evaluation.cocoGt.loadCats(evaluation.params.catIds)
    supers = {x["id"]: x.get("supercategory") for x in categories}
    similar = {i: [j for j in supers if j != i and supers[j] == supers[i]] for i in supers}
    similar = {i: others if supers[i] else [] for i, others in similar.items()}
    any_other = {i: [j for j in supers if j != i] for i in supers}
    sim, oth = (_absorbing(evaluation, others) for others in (similar, any_other))
    curves = np.stack([c75, c50, loc, sim, oth, oth > 0, np.ones_like(oth)])
    return np.where(loc < 0, np.nan, curves)


def _absorbing(evaluation: COCOeval, absorbers: Mapping[Any, Collection[Any]]) -> Floats:
    """Precision (R, K) at IoU 0.1 if objects of other classes absorb detections."""
    again = AbsorbingEval(evaluation.cocoGt, evaluation.cocoDt, absorbers)
    again.params.iouThrs = np.array([TOUCH])
    again.params.maxDets = evaluation.params.maxDets[-1:]
    again.params.areaRng = evaluation.params.areaRng[:1]
    return _run(again).eval["precision"][0, :, :, 0, 0]


class Judged(NamedTuple):
    """What the detections of a picture are at IoU 0.5; crowds and what matches them are left out.

    Attributes:
        right: ids of detections that find an object.
        wrong: ids of detections that find none, or one that is found already.
        missed: ids of objects that no detection finds.
    """

    right: list[int]
    wrong: list[int]
    missed: list[int]

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 where there is nothing and nothing is found."""
        mistakes = len(self.wrong) + len(self.missed)
        return 2 * len(self.right) / (2 * len(self.right) + mistakes) if mistakes else 1.0


def judge(evaluation: COCOeval, min_score: float) -> dict[Any, Judged]:
    """Judge the detections of at least ``min_score``, by the id of each picture.

    Args:
        evaluation: of :func:`coco_evaluation`.
    """
    at = _threshold(evaluation, MATCH)
    judged = {image: Judged([], [], []) for image in evaluation.params.imgIds}
    for view in evaluation.evalImgs:  # of a class and a picture, at each of COCO's sizes
        if view is None or view["aRng"] != evaluation.params.areaRng[0]:
            continue
        right, wrong, missed = judged[view["image_id"]]
        found = set()
        columns = (view["dtIds"], view["dtScores"], view["dtMatches"][at], view["dtIgnore"][at])
        for detection, score, match, ignored in zip(*columns):
            if score >= min_score:
                found.add(match)
                if not ignored:
                    (right if match else wrong).append(detection)
        objects = zip(view["gtIds"], view["gtIgnore"])
        missed += [x for x, ignored in objects if not ignored and x not in found]
    return judged


def _run(evaluation: COCOeval) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _threshold(evaluation: COCOeval, iou: float) -> int:
    return int(np.flatnonzero(np.isclose(evaluation.params.iouThrs, iou))[0])


def _mean(values: Floats) -> float:
    """Mean of what is defined: pycocotools writes -1 where there are no objects."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan

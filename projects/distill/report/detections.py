"""Detections of runs on a test set: the kinds of their errors, and the images to show."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools.cocoeval import COCOeval

from ..errors import DataError
from ..evaluation.coco_errors import (
    CURVES,
    coco_evaluation,
    error_curves,
    judge,
    mean_of_classes,
)
from ..evaluation.coco_format import AnnotatedSet, load_results, read_results
from ..utils.io import write_text
from .panels import (
    ComparedImage,
    JudgedModel,
    compared_image,
    least_right,
    most_different,
)
from .runs import TEACHER, Run

FILE = Path("inference", "coco_instances_results.json")  # written by detectron2's evaluator
KINDS = {"bbox": "boxes", "segm": "masks"}  # by COCO's type of IoU
MIN_SCORE = 0.5  # detections with a lower score are not shown
Evaluations = dict[str, COCOeval]
"""Evaluations of one run by a key of :data:`KINDS`, or of one kind by run."""


class TeacherDetections(NamedTuple):
    """Detections of the teacher in some images of the test set.

    Attributes:
        images: ids of the images.
        results: detections in COCO's format of results.
    """

    images: list[Any]
    results: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        write_text(folder / TEACHER, json.dumps(self._asdict()) + "\n")


class ErrorKinds(NamedTuple):
    """Area in percent below each of the :data:`CURVES` by run, for boxes or masks.

    It is empty if the images have no objects.
    """

    kind: str
    areas: dict[str, dict[str, float]]


class ImageGroup(NamedTuple):
    """Images to show.

    Attributes:
        title, rule: heading, and the sentence that says how the images are chosen.
    """

    title: str
    rule: str
    images: list[ComparedImage]


class Comparison(NamedTuple):
    """Comparison of runs on a test set.

    Attributes:
        analyzed, total: number of its images that are analyzed, and of all.
        errors: for boxes, and for masks if the runs have masks.
        groups: images to show.
        problems: sentences that say which parts are missing, and why.
    """

    analyzed: int
    total: int
    errors: list[ErrorKinds]
    groups: list[ImageGroup]
    problems: list[str]


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most ``most`` of the items, evenly spread over them."""
    number = min(len(items), most)
    return [items[k * len(items) // number] for k in range(number)]


def compare(data: AnnotatedSet, runs: Sequence[Run], shown: int, most: int) -> Comparison:
    """Compare the last detections of runs on a test set.

    Args:
        data: the test set.
        runs: the runs; the first of several is the baseline.
        shown: number of images to show for each reason.
        most: number of images to analyze, evenly spread over the set.
    """
    every = sorted(data.truth.imgs)
    teacher = next((x for run in reversed(runs) if (x := _read_teacher(run, data))), None)
    images = sorted({*spread(every, most), *(teacher.images if teacher else ())})
    found: dict[str, Evaluations] = {}
    problems = []
    for run in runs:
        try:
            found[run.name] = _evaluations(data, run, images)
        except DataError as e:
            problems.append(f"{run.name}: {e}")
    kinds = [k for k in KINDS if found and all(k in x for x in found.values())]
    errors = [ErrorKinds(KINDS[k], _areas({n: x[k] for n, x in found.items()})) for k in kinds]
    groups: list[ImageGroup] = []
    if kinds and shown:
        try:
            groups = _groups(data, kinds, found, teacher, shown)
        except DataError as e:  # an image is not there any more, say
            problems.append(str(e))
    return Comparison(len(images), len(every), errors, groups, problems)


def _evaluations(data: AnnotatedSet, run: Run, images: Sequence[Any]) -> Evaluations:
    path = run.folder / FILE
    results = read_results(str(path))
    kinds = [kind for kind in KINDS if _has(kind, results)]
    return {kind: _evaluation(data, results, f"'{path}'", kind, images) for kind in kinds}


def _evaluation(
    data: AnnotatedSet, results: Any, source: str, kind: str, images: Sequence[Any]
) -> COCOeval:
    detections = load_results(data.truth, results, source, kind, images)
    return coco_evaluation(data.truth, detections, data.max_detections, kind, images)


def _has(kind: str, results: Any) -> bool:
    """Return whether detections have what is compared. If there are no detections, use boxes."""
    first = results[0] if isinstance(results, list) and results else None
    return kind == "bbox" or (isinstance(first, dict) and "segmentation" in first)


def _areas(evaluations: Evaluations) -> dict[str, dict[str, float]]:
    """Return the areas by run; empty if the images have no objects."""
    areas = {name: error_curves(x).mean(1) for name, x in evaluations.items()}  # (7, K)
    return {
        name: dict(zip(CURVES, (100 * mean_of_classes(x)).tolist()))
        for name, x in areas.items()
        if not np.isnan(x).all()
    }


def _read_teacher(run: Run, data: AnnotatedSet) -> TeacherDetections | None:
    """Read the teacher's detections of a run, or None without such a file for this test set."""
    path = run.folder / TEACHER
    if not path.is_file():
        return None
    try:
        teacher = TeacherDetections(**json.loads(path.read_text("utf-8")))
        known = bool(teacher.images) and {*teacher.images} <= data.truth.imgs.keys()
    except (OSError, ValueError, TypeError):
        return None
    return teacher if known else None


# ---- Images


def _groups(
    data: AnnotatedSet,
    kinds: Sequence[str],
    found: Mapping[str, Evaluations],
    teacher: TeacherDetections | None,
    shown: int,
) -> list[ImageGroup]:
    """Return the images that changed most, and those where the teacher is wrong."""
    # Masks if all have masks.
    kind = next(k for k in reversed(kinds) if not teacher or _has(k, teacher.results))
    models = [_judged(name, x[kind]) for name, x in found.items()]
    experts = []
    if teacher:
        evaluation = _evaluation(data, teacher.results, "the teacher", kind, teacher.images)
        experts = [_judged("teacher", evaluation)]
        models = [x._replace(judged={i: x.judged[i] for i in teacher.images}) for x in models]

    def group(title: str, rule: str, chosen: Sequence[Any]) -> ImageGroup:
        every = [*models, *experts]
        drawn = [
            compared_image(data.truth, data.image_root, x, every, kind == "segm") for x in chosen
        ]
        return ImageGroup(title, rule, drawn)

    compared = models if len(models) > 1 else [*models, *experts]
    if len(compared) > 1:
        others = "the runs" if len(models) > 1 else "student and teacher"
        rule = f"The largest difference in F1 between {others}."
        chosen = most_different([x.judged for x in compared], shown)
        groups = [group("Images that changed most", rule, chosen)]
    else:
        chosen = least_right(models[0].judged, shown)
        groups = [group("Images with most errors", "The lowest F1.", chosen)]
    for expert in experts:
        rule = "The lowest F1 of the teacher, which passes its errors on."
        chosen = least_right(expert.judged, shown)
        groups.append(group("Images where the teacher is wrong", rule, chosen))
    return groups


def _judged(name: str, evaluation: COCOeval) -> JudgedModel:
    found = evaluation.cocoDt.anns.items()
    shown = {i: x for i, x in found if x["score"] >= MIN_SCORE}
    return JudgedModel(name, shown, judge(evaluation, MIN_SCORE))

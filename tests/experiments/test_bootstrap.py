"""The bootstrap over images: its AP is that of a literal evaluation of duplicated images."""

import contextlib
import copy
import io
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from distill.evaluation.coco_errors import coco_evaluation, coco_metrics
from distill.evaluation.coco_format import load_results
from distill.experiments.bootstrap import (
    IOUS,
    ClassMatches,
    average_precision,
    bootstrap_gains,
    class_matches,
    resamples,
)

IMAGES, CLASSES = 6, 3
RECALLS = np.linspace(0, 1, 101)


def scene(seed: int, hits: float = 0.7) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return annotations, one of them a crowd, and detections: near objects and anywhere."""
    rng = np.random.default_rng(0)  # the objects are those of every seed
    objects = []
    for image in range(IMAGES):
        for _ in range(int(rng.integers(0, 5))):
            x, y, w, h = rng.uniform((0, 0, 20, 20), (60, 60, 60, 60)).tolist()
            entry = {"id": len(objects) + 1, "image_id": image, "bbox": [x, y, w, h]}
            category = int(rng.integers(1, CLASSES))  # the last class has no objects
            objects.append({**entry, "category_id": category, "area": w * h, "iscrowd": 0})
    objects[2]["iscrowd"] = 1
    content = {
        "images": [{"id": k, "width": 128, "height": 128} for k in range(IMAGES)],
        "categories": [{"id": k + 1, "name": str(k)} for k in range(CLASSES)],
        "annotations": objects,
    }
    rng = np.random.default_rng(seed)
    found = []
    for x in objects:
        for _ in range(2):
            near = rng.uniform() < hits
            box = x["bbox"] + rng.normal(scale=5 if near else 40, size=4)
            found.append({**x, "bbox": np.maximum(box, 1).tolist(), "score": rng.uniform()})
    keys = ("image_id", "category_id", "bbox", "score")
    return content, [{k: x[k] for k in keys} for x in found]


def duplicated(content: dict[str, Any], found: list[dict[str, Any]], drawn: list[int]) -> Any:
    """Return annotations and detections in which each drawn image is an image of its own."""
    many: dict[str, Any] = {**content, "images": [], "annotations": []}
    results = []
    for new, old in enumerate(drawn):
        many["images"].append({**content["images"][old], "id": new})
        for x in content["annotations"]:
            if x["image_id"] == old:
                entry = {**x, "image_id": new, "id": len(many["annotations"]) + 1}
                many["annotations"].append(entry)
        results += [{**x, "image_id": new} for x in found if x["image_id"] == old]
    return many, results


def evaluate(content: dict[str, Any], found: list[dict[str, Any]]) -> Any:
    truth = COCO()
    truth.dataset = copy.deepcopy(content)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return coco_evaluation(truth, load_results(truth, found, "the test"))


@pytest.mark.parametrize("metric", IOUS)
def test_the_ap_of_a_resample_is_that_of_duplicated_images(metric: str) -> None:
    content, found = scene(1)
    matches = class_matches(evaluate(content, found), metric)
    rng = np.random.default_rng(2)
    draws = [list(range(IMAGES)), *rng.integers(IMAGES, size=(8, IMAGES)).tolist()]
    values = set()
    for drawn in draws:
        expected = coco_metrics(evaluate(*duplicated(content, found, sorted(drawn))))[metric]
        counts = np.bincount(drawn, minlength=IMAGES).astype(float)
        assert average_precision(matches, counts, RECALLS) == pytest.approx(expected, abs=1e-12)
        values.add(round(expected, 6))
    assert len(values) > 5  # the resamples differ


def test_without_objects_there_is_no_ap() -> None:
    content, found = scene(1)
    matches = class_matches(evaluate(content, found), "AP")
    assert np.isnan(average_precision(matches, np.zeros(IMAGES), RECALLS))
    nothing = class_matches(evaluate(content, []), "AP")
    assert average_precision(nothing, np.ones(IMAGES), RECALLS) == 0


def test_gains_are_paired_by_image() -> None:
    """A run has no gain over itself in any resample, and a better run has one in nearly all."""
    content, _ = scene(0)
    runs = {
        name: [class_matches(evaluate(content, scene(seed, hits)[1]), "AP") for seed in (1, 2)]
        for name, hits in (("distilled", 1.0), ("alone", 0.2))
    }
    runs["same"] = runs["distilled"]
    drawn = list(resamples(IMAGES, 200, seed=0))
    found = bootstrap_gains(runs, "distilled", RECALLS, drawn)
    assert found["same"] == (0, 0, 0, 0)
    assert 0 < found["alone"].low < found["alone"].gain < found["alone"].high
    for values in found.values():
        assert all(isinstance(x, float) for x in values)


def test_the_interval_of_a_mean_is_the_textbooks() -> None:
    """One object per image, found or not: AP75 of one score is the share of images."""
    rng = np.random.default_rng(0)
    images = 400

    def run(share: float) -> list[ClassMatches]:
        right = rng.uniform(size=(1, images)) < share
        order = np.argsort(~right[0], kind="stable")
        image, right = np.arange(images)[order], right[:, order]
        return [ClassMatches(image, right, ~right, np.ones(images))]

    better, worse = run(0.6), run(0.5)
    (found,) = bootstrap_gains(
        {"a": [better], "b": [worse]}, "a", RECALLS, resamples(images, 500, seed=0)
    ).values()
    p, q = (x[0].right.mean() for x in (better, worse))
    assert found.gain == pytest.approx(100 * (p - q), abs=1)
    expected = 100 * ((p * (1 - p) + q * (1 - q)) / images) ** 0.5
    assert found.deviation == pytest.approx(expected, rel=0.15)
    assert found.high - found.low == pytest.approx(2 * 1.96 * expected, rel=0.15)


def test_resamples_have_a_seed() -> None:
    one, same, other = (np.array(list(resamples(5, 3, seed))) for seed in (0, 0, 1))
    assert (one == same).all() and (one != other).any() and (one.sum(1) == 5).all()

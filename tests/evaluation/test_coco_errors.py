"""Test COCO's error analysis: single errors counted by hand, and properties of the curves."""

import contextlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import encode

from distill.errors import DataError
from distill.evaluation.coco_errors import (
    CURVES,
    coco_evaluation,
    coco_metrics,
    error_curves,
    judge,
)
from distill.evaluation.coco_format import load_results, read_results

Box = tuple[float, float, float, float]  # x, y, width, height
Object = tuple[int, int, Box]  # image, category, box
Found = tuple[int, int, Box, float]  # image, category, box, score

CAT, DOG, CAR = 1, 2, 3
ANIMALS = {CAT: "animal", DOG: "animal", CAR: "vehicle"}
HERE: Box = (10, 10, 100, 100)
THERE: Box = (150, 10, 100, 100)
NOWHERE: Box = (10, 150, 100, 100)


def shifted(box: Box, iou: float) -> Box:
    """Move the box to the right until its IoU with itself is ``iou``."""
    x, y, width, height = box
    return (x + width * (1 - iou) / (1 + iou), y, width, height)


def dataset(objects: Sequence[Object], supers: dict[int, Any] = ANIMALS, images: int = 2) -> COCO:
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": 300, "width": 300} for i in range(1, images + 1)],
        "categories": [
            {"id": i, "name": f"class {i}"} | ({"supercategory": x} if x else {})
            for i, x in supers.items()
        ],
        "annotations": [
            {"id": i, "image_id": image, "category_id": c, "bbox": list(box), "iscrowd": 0}
            | {"area": box[2] * box[3]}
            for i, (image, c, box) in enumerate(objects, 1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def detections(truth: COCO, found: Sequence[Found]) -> COCO:
    results = [
        {"image_id": image, "category_id": c, "bbox": list(box), "score": score}
        for image, c, box, score in found
    ]
    return load_results(truth, results, "test")


def areas(truth: COCO, found: Sequence[Found]) -> dict[str, list[float]]:
    """Return the area below each curve by its name, for the classes in order."""
    curves = error_curves(coco_evaluation(truth, detections(truth, found)))
    assert curves.shape == (7, 101, len(truth.cats))
    return {name: x.round(6).tolist() for name, x in zip(CURVES, curves.mean(1))}


# ------------------------------------------------------------------------------ counted by hand
# There is one cat HERE in each of two images, and the case adds objects and detections to each
# image. Every cat is found with score 0.5 and every error has score 0.9, so that the precision is
# the same at each recall.

ALL, HALF = [1.0] * 7, 0.5
CASES: dict[str, tuple[list[Object], list[Found], list[float]]] = {
    "perfect": ([], [], ALL),
    "an error of lower score": ([], [(1, CAT, NOWHERE, 0.1), (2, CAT, NOWHERE, 0.1)], ALL),
    "background": (
        [],
        [(1, CAT, NOWHERE, 0.9), (2, CAT, NOWHERE, 0.9)],
        [HALF, HALF, HALF, HALF, HALF, 1, 1],
    ),
    "a dog taken for a cat": (
        [(1, DOG, THERE), (2, DOG, THERE)],
        [(1, CAT, THERE, 0.9), (2, CAT, THERE, 0.9)],
        [HALF, HALF, HALF, 1, 1, 1, 1],
    ),
    "a dog taken for a cat, loosely": (
        [(1, DOG, THERE), (2, DOG, THERE)],
        [(1, CAT, shifted(THERE, 0.15), 0.9), (2, CAT, shifted(THERE, 0.15), 0.9)],
        [HALF, HALF, HALF, 1, 1, 1, 1],
    ),
    "a dog barely touched": (
        [(1, DOG, THERE), (2, DOG, THERE)],
        [(1, CAT, shifted(THERE, 0.05), 0.9), (2, CAT, shifted(THERE, 0.05), 0.9)],
        [HALF, HALF, HALF, HALF, HALF, 1, 1],
    ),
    "a dog taken for two cats": (  # an object absorbs one detection
        [(1, DOG, THERE), (2, DOG, THERE)],
        [(i, CAT, THERE, 0.9) for i in (1, 1, 2, 2)],
        [1 / 3, 1 / 3, 1 / 3, HALF, HALF, 1, 1],
    ),
    "a car taken for a cat": (
        [(1, CAR, THERE), (2, CAR, THERE)],
        [(1, CAT, THERE, 0.9), (2, CAT, THERE, 0.9)],
        [HALF, HALF, HALF, HALF, 1, 1, 1],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_error_alone(case: str) -> None:
    objects, found, expected = CASES[case]
    truth = dataset([(1, CAT, HERE), (2, CAT, HERE), *objects])
    cats = [(1, CAT, HERE, 0.5), (2, CAT, HERE, 0.5)]
    measured = {name: x[0] for name, x in areas(truth, [*cats, *found]).items()}
    assert measured == pytest.approx(dict(zip(CURVES, expected)), abs=1e-6)


def test_localization_alone() -> None:
    truth = dataset([(1, CAT, HERE), (2, CAT, HERE)])
    for iou, expected in ((0.3, [0, 0, 1, 1]), (0.6, [0, 1, 1, 1]), (0.05, [0, 0, 0, 0])):
        found = [(i, CAT, shifted(HERE, iou), 0.9) for i in (1, 2)]
        measured = [x[0] for x in areas(truth, found).values()]
        # A detection without a match is background. Without it the cats are missed.
        assert measured == [*expected, expected[-1], expected[-1], 1]


def test_a_duplicate_alone() -> None:
    """The duplicate ranks between the cats: beyond recall 0.5, two of three are right."""
    truth = dataset([(1, CAT, HERE), (2, CAT, HERE)])
    found = [(1, CAT, HERE, 0.9), (1, CAT, shifted(HERE, 0.8), 0.8), (2, CAT, HERE, 0.7)]
    measured = [x[0] for x in areas(truth, found).values()]
    assert measured == pytest.approx([(51 + 50 * 2 / 3) / 101] * 5 + [1, 1], abs=1e-6)


def test_missed_objects_alone() -> None:
    """Half of the cats are found: precision is 1 at recalls 0, 0.01, ..., 0.5, and 0 beyond."""
    truth = dataset([(1, CAT, HERE), (2, CAT, HERE)])
    measured = [x[0] for x in areas(truth, [(1, CAT, HERE, 0.9)]).values()]
    assert measured == pytest.approx([51 / 101] * 6 + [1], abs=1e-6)
    measured = [x[0] for x in areas(truth, []).values()]
    assert measured == [0] * 6 + [1]


def test_an_object_of_the_own_class_comes_first() -> None:
    """A dog in the same place does not absorb a detection that finds the cat with a small IoU."""
    truth = dataset([(1, CAT, HERE), (1, DOG, shifted(HERE, 0.2)), (2, CAT, HERE)])
    found = [(1, CAT, shifted(HERE, 0.2), 0.9), (2, CAT, HERE, 0.9)]
    assert [x[0] for x in areas(truth, found).values()][2:] == [1] * 5


def test_classes_without_objects_are_undefined() -> None:
    truth = dataset([(1, CAT, HERE)])
    for name, values in areas(truth, [(1, CAT, HERE, 0.9), (1, CAR, HERE, 0.9)]).items():
        assert values[0] == 1, name
        assert np.isnan(values[1:]).all()


def test_no_supercategory_is_similar_to_none() -> None:
    objects = [(1, CAT, HERE), (1, DOG, THERE)]
    found = [(1, CAT, HERE, 0.5), (1, CAT, THERE, 0.9)]
    for supers in (dict.fromkeys(ANIMALS), {**ANIMALS, DOG: "pet"}):
        measured = areas(dataset(objects, supers), found)
        assert measured["Sim"][0] == measured["Loc"][0] == HALF and measured["Oth"][0] == 1
    measured = areas(dataset(objects, dict.fromkeys(ANIMALS, "thing")), found)
    assert measured["Sim"][:2] == measured["Oth"][:2] == [1, 0]


def test_the_limit_of_detections() -> None:
    """Per class only the detections of highest score count: here all except the right one."""
    truth = dataset([(1, CAT, HERE)])
    found = [(1, CAT, NOWHERE, 0.9)] * 12 + [(1, CAT, HERE, 0.5)]
    for limit, recall in ((12, 0), (13, 1)):
        evaluation = coco_evaluation(truth, detections(truth, found), limit)
        curves = error_curves(evaluation)
        assert (curves[5, -1, 0] == 1) == bool(recall)
        assert coco_metrics(evaluation)[f"AR{limit}"] == recall


# --------------------------------------------------------------------------------- random data


def random_case(seed: int) -> tuple[COCO, list[Found]]:
    """Return crowded images, and detections made by moving and renaming some of their objects."""
    rng = np.random.default_rng(seed)
    objects: list[Object] = []
    found: list[Found] = []
    for image in range(1, 9):
        for _ in range(rng.integers(0, 12)):
            box = (*rng.uniform(0, 150, 2), *rng.uniform(15, 120, 2))
            category = int(rng.integers(1, 7))
            objects.append((image, category, box))
            for _ in range(rng.integers(0, 4)):
                moved = tuple(np.abs(np.array(box) + rng.normal(0, rng.choice([1, 8, 30]), 4)))
                named = category if rng.random() < 0.6 else int(rng.integers(1, 7))
                found.append((image, named, moved, round(rng.random(), 2)))
    supers = {1: "a", 2: "a", 3: "a", 4: "b", 5: "b", 6: None}
    return dataset(objects, supers, images=8), found


@pytest.mark.parametrize("seed", range(5))
def test_every_removed_kind_of_error_helps(seed: int) -> None:
    truth, found = random_case(seed)
    curves = error_curves(coco_evaluation(truth, detections(truth, found)))
    defined = curves[..., ~np.isnan(curves[0, 0])]
    assert (np.diff(defined, axis=0) >= -1e-12).all()  # at each recall of each class
    assert (defined[-1] == 1).all()
    assert (np.diff(defined.mean((1, 2))) > 0.001).all()  # there are errors of each kind


class OneClass(COCOeval):
    """COCO's analysis of one class as in its authors' code: all other objects are ignored."""

    def __init__(self, truth: COCO, found: COCO, category: int):
        super().__init__(truth, found, "bbox")
        self.category = category
        self.params.useCats = 0
        self.params.iouThrs = np.array([0.1])
        self.params.areaRng = self.params.areaRng[:1]

    def _prepare(self) -> None:
        super()._prepare()
        for (_, category), objects in self._gts.items():
            if category != self.category:
                objects[:] = [{**x, "ignore": 1} for x in objects]


def of_categories(coco: COCO, categories: Sequence[int]) -> COCO:
    kept = COCO()
    annotations = [x for x in coco.dataset["annotations"] if x["category_id"] in categories]
    kept.dataset = {**coco.dataset, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        kept.createIndex()
    return kept


@pytest.mark.parametrize("seed", range(4))
def test_absorbed_detections_are_those_of_cocos_analysis(seed: int) -> None:
    truth, found = random_case(seed)
    rng = np.random.default_rng(seed)
    for x in truth.dataset["annotations"]:
        x["iscrowd"] = int(rng.random() < 0.15)
    everything = detections(truth, found)
    curves = dict(zip(CURVES, error_curves(coco_evaluation(truth, everything))))
    supers = {x["id"]: x.get("supercategory") for x in truth.dataset["categories"]}
    for place, category in enumerate(supers):
        kin = [k for k in supers if supers[k] == supers[category]] if supers[category] else []
        for name, others in {"Sim": kin or [category], "Oth": list(supers)}.items():
            reference = OneClass(
                of_categories(truth, others), of_categories(everything, [category]), category
            )
            with contextlib.redirect_stdout(io.StringIO()):
                reference.evaluate()
                reference.accumulate()
            expected = reference.eval["precision"][0, :, 0, 0, -1]
            assert np.array_equal(curves[name][:, place], expected), (name, category)


@pytest.mark.parametrize("seed", range(3))
def test_the_measures_are_those_of_pycocotools(seed: int) -> None:
    truth, found = random_case(seed)
    plain = COCOeval(truth, detections(truth, found), "bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        plain.evaluate()
        plain.accumulate()
        plain.summarize()
    evaluation = coco_evaluation(truth, detections(truth, found))
    metrics = coco_metrics(evaluation)
    names = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl"
    assert list(metrics) == names.split()
    expected = np.where(plain.stats < 0, np.nan, plain.stats)
    np.testing.assert_allclose(list(metrics.values()), expected, rtol=1e-12)
    curves = error_curves(evaluation)
    for curve, threshold in ((0, 5), (1, 0)):
        own = plain.eval["precision"][threshold, :, :, 0, -1]
        np.testing.assert_array_equal(curves[curve], np.where(own < 0, np.nan, own))


def test_a_size_without_objects_is_undefined() -> None:
    truth = dataset([(1, CAT, HERE)])
    metrics = coco_metrics(coco_evaluation(truth, detections(truth, [(1, CAT, HERE, 0.9)])))
    undefined = {name for name, value in metrics.items() if np.isnan(value)}
    assert undefined == {"APs", "APm", "ARs", "ARm"} and metrics["AR1"] == 1


# --------------------------------------------------------------------------------------- images


def test_images_are_judged_by_hand() -> None:
    truth = dataset([(1, CAT, HERE), (1, DOG, THERE), (2, CAR, HERE)], images=4)
    truth.anns[3]["iscrowd"] = 1
    found = [
        (1, CAT, shifted(HERE, 0.6), 0.8),  # 1: right
        (1, CAT, HERE, 0.7),  # 2: the cat is already found
        (1, DOG, THERE, 0.4),  # 3: score too low
        (1, CAT, THERE, 0.5),  # 4: there is no cat
        (2, CAR, HERE, 0.9),  # 5: in a crowd
        (3, CAR, HERE, 0.9),  # 6: there is no object
    ]
    judged = judge(coco_evaluation(truth, detections(truth, found)), 0.5)
    assert judged[1] == ([1], [2, 4], [2]) and judged[1].f1 == 0.4
    assert judged[2] == ([], [], []) and judged[2].f1 == 1
    assert judged[3] == ([], [6], []) and judged[3].f1 == 0
    assert judged[4].f1 == 1
    judged = judge(coco_evaluation(truth, detections(truth, found)), 0.4)
    assert judged[1] == ([1, 3], [2, 4], [])


def run_lengths(box: Box) -> dict[str, Any]:
    """Return the mask of a box, as detectron2 writes it."""
    x, y, width, height = map(round, box)
    mask = np.zeros((300, 300), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    encoded = encode(mask)
    return {**encoded, "counts": encoded["counts"].decode()}


def mask_results(found: Sequence[tuple[Found, Box]]) -> list[dict[str, Any]]:
    """Return detections whose masks are other boxes."""
    return [
        {"image_id": image, "category_id": c, "bbox": list(box), "score": score}
        | {"segmentation": run_lengths(mask)}
        for (image, c, box, score), mask in found
    ]


def mask_areas(truth: COCO, results: list[dict[str, Any]], kind: str) -> dict[str, list[float]]:
    loaded = load_results(truth, results, "test", kind)
    curves = error_curves(coco_evaluation(truth, loaded, iou_type=kind))
    return {name: x.round(6).tolist() for name, x in zip(CURVES, curves.mean(1))}


def test_errors_of_masks() -> None:
    """The boxes are right. One mask lies elsewhere, and one on an object of another class."""
    truth = dataset([(1, CAT, HERE), (2, CAT, HERE), (2, DOG, THERE)])
    for x in truth.anns.values():
        x["segmentation"] = run_lengths(x["bbox"])
    found = [((1, CAT, HERE, 0.9), NOWHERE), ((2, CAT, HERE, 0.8), THERE)]
    results = mask_results([*found, ((2, DOG, THERE, 0.7), THERE)])
    boxes, masks = (mask_areas(truth, results, kind) for kind in ("bbox", "segm"))
    assert boxes["C75"][:2] == [1, 1] and all(math.isnan(x[2]) for x in boxes.values())
    assert masks["C50"][:2] == masks["Loc"][:2] == [0, 1]
    assert masks["BG"][0] == 0 and masks["FN"][0] == 1  # no mask of a cat is found at all
    right = mask_results([((1, CAT, HERE, 0.9), HERE), ((2, CAT, HERE, 0.8), THERE)])
    right += mask_results([((2, CAT, HERE, 0.7), HERE), ((2, DOG, THERE, 0.7), THERE)])
    masks = mask_areas(truth, right, "segm")
    assert masks["C50"][0] < 1 and masks["Oth"][0] == masks["Sim"][0] == 1  # dogs are similar


def test_masks_have_their_own_area() -> None:
    results = mask_results([((1, CAT, HERE, 0.9), (10, 10, 20, 5))])
    truth = dataset([(1, CAT, HERE)])
    assert load_results(truth, results, "a.json", "segm").anns[1]["area"] == 100
    assert load_results(truth, results, "a.json").anns[1]["area"] == 10000


def test_some_images_only() -> None:
    truth = dataset([(1, CAT, HERE), (2, CAT, HERE)])
    results = [{**GOOD, "image_id": i, "bbox": list(HERE)} for i in (1, 2)]
    loaded = load_results(truth, results, "a.json", images=[2])
    assert [x["image_id"] for x in loaded.anns.values()] == [2]
    evaluation = coco_evaluation(truth, loaded, images=[2])
    assert judge(evaluation, 0.5) == {2: ([1], [], [])}
    (area,) = (x for x in error_curves(evaluation)[1].mean(0) if not math.isnan(x))
    assert area == pytest.approx(1)  # image 1 would be missed
    assert judge(coco_evaluation(truth, loaded, images=[1]), 0.5) == {1: ([], [], [1])}


# -------------------------------------------------------------------------------------- results


GOOD = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.5}
WRONG: dict[str, tuple[Any, str]] = {
    "no list": ({"annotations": []}, "a JSON dict, not a list of detections"),
    "no object": ([3], "detection 0: 3 is not a JSON object"),
    "no score": (
        [{**GOOD}, {"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5]}],
        "detection 1: it has no score",
    ),
    "masks": (
        [{k: v for k, v in GOOD.items() if k != "bbox"} | {"segmentation": {}}],
        "it has no bbox, only a segmentation",
    ),
    "no box": ([{**GOOD, "bbox": [1, 2, 3]}], "bbox [1, 2, 3] must be [x, y"),
    "box of corners": ([{**GOOD, "bbox": [9, 9, -3, 5]}], "must be [x, y, width, height]"),
    "NaN": ([{**GOOD, "bbox": [0, 0, float("nan"), 1]}], "must be [x, y"),
    "score": ([{**GOOD, "score": float("nan")}], "score nan is not a number"),
    "image": ([{**GOOD, "image_id": 7}], "no image with image_id 7"),
    "unusable image id": ([{**GOOD, "image_id": [1]}], "no image with image_id [1]"),
    "category": ([{**GOOD, "category_id": 0}], "no category with category_id 0"),
}


@pytest.mark.parametrize("mask", [[[1, 2, 3, 4, 5, 6]], {"size": [9, 300], "counts": "1"}, {}])
def test_wrong_masks_are_refused(mask: Any) -> None:
    with pytest.raises(DataError, match=r"must be compressed run lengths of size \[300, 300\]"):
        load_results(dataset([(1, CAT, HERE)]), [{**GOOD, "segmentation": mask}], "a.json", "segm")


@pytest.mark.parametrize("case", WRONG)
def test_wrong_results_are_refused(case: str) -> None:
    results, message = WRONG[case]
    with pytest.raises(DataError) as error:
        load_results(dataset([(1, CAT, HERE)]), results, "a.json")
    assert str(error.value).startswith("a.json") and message in str(error.value)


def test_results_are_not_changed_and_masks_left_out() -> None:
    entry = {**GOOD, "segmentation": {"counts": "x"}}
    loaded = load_results(dataset([(1, CAT, HERE)]), [entry], "a.json")
    assert entry == {**GOOD, "segmentation": {"counts": "x"}}
    assert loaded.anns[1]["bbox"] == GOOD["bbox"] and loaded.anns[1]["area"] == 25


def test_unreadable_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened"):
        read_results(str(tmp_path / "none.json"))
    (tmp_path / "half.json").write_text('[{"image_id": 1,')
    with pytest.raises(DataError, match="are not valid JSON"):
        read_results(str(tmp_path / "half.json"))

"""faster-coco-eval has the numbers of pycocotools, to rounding."""

import copy
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.evaluation import coco_evaluation
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from distill.evaluation.fast_coco import FastCOCOeval, FastCOCOevalMaxDets, fast_evaluation

HEIGHT, WIDTH, CLASSES, POINTS = 120, 160, 4, 17


def encoded(box: np.ndarray) -> dict[str, Any]:
    """Return a mask with a hole in the box."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    x, y, w, h = box.astype(int)
    mask[y : y + h, x : x + w] = 1
    mask[y + h // 3 : y + h // 2, x : x + w // 3] = 0
    code = mask_util.encode(mask)
    return {"size": code["size"], "counts": code["counts"].decode()}


def random_box(rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([rng.random(2) * (WIDTH / 2, HEIGHT / 2), rng.random(2) * 60 + 4])


def points_in(box: np.ndarray, rng: np.random.Generator) -> list[float]:
    xy = box[:2] + rng.random((POINTS, 2)) * box[2:]
    return np.column_stack([xy, rng.integers(0, 3, POINTS)]).ravel().tolist()


def data_and_detections(images: int, seed: int) -> tuple[COCO, list[dict[str, Any]]]:
    """Return random objects, some of them crowds, and detections near them and elsewhere."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []

    def detect(image: int, box: np.ndarray, category: int, points: list[float]) -> None:
        found = {"image_id": image, "category_id": category, "bbox": box.tolist()}
        found |= {"segmentation": encoded(box), "keypoints": points}
        detections.append({**found, "score": round(float(rng.random()), 2)})  # with ties

    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 7)):
            box, category = random_box(rng), int(rng.integers(1, CLASSES))  # the last has no object
            points = points_in(box, rng)
            annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": category}
            annotation |= {"bbox": box.tolist(), "area": float(box[2] * box[3])}
            annotation |= {"iscrowd": int(rng.random() < 0.15), "segmentation": encoded(box)}
            annotation |= {
                "keypoints": points,
                "num_keypoints": int(np.count_nonzero(points[2::3])),
            }
            annotations.append(annotation)
            for _ in range(rng.integers(0, 4)):
                moved = box + rng.normal(0, 3, 4)
                moved[:2], moved[2:] = moved[:2].clip(0, 70), moved[2:].clip(3, 64)
                near = np.array(points) + rng.normal(0, 1, len(points))
                detect(image, moved, category, near.tolist())
        for _ in range(rng.integers(0, 30)):
            box = random_box(rng)
            detect(image, box, int(rng.integers(1, CLASSES + 1)), points_in(box, rng))
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": k + 1, "height": HEIGHT, "width": WIDTH} for k in range(images)],
        "annotations": annotations,
        "categories": [{"id": k + 1, "name": str(k)} for k in range(CLASSES)],
    }
    truth.createIndex()
    return truth, detections


@pytest.mark.parametrize("most", [100, 7])
@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_precision_recall_and_summary(iou_type: str, most: int) -> None:
    truth, detections = data_and_detections(images=12, seed=most)
    other = {"bbox": "segmentation", "segm": "bbox", "keypoints": "segmentation"}[iou_type]
    own = [{k: v for k, v in x.items() if k != other} for x in detections]

    def evaluated(kind: Any) -> Any:
        evaluation = kind(truth, truth.loadRes(copy.deepcopy(own)), iou_type)
        if iou_type != "keypoints":
            evaluation.params.maxDets = [1, 5, most]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation

    slow = iou_type == "keypoints" or most == 100
    expected = evaluated(COCOeval if slow else COCOevalMaxDets)
    found = evaluated(FastCOCOeval if slow else FastCOCOevalMaxDets)
    for key in ("precision", "recall", "scores"):
        np.testing.assert_allclose(found.eval[key], expected.eval[key], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.stats, expected.stats, rtol=0, atol=1e-12)
    assert 0.01 < expected.stats[0] < 0.9


def test_more_detections_than_images_may_have() -> None:
    """300 in one image: the rest is cut by score, as pycocotools does."""
    truth, detections = data_and_detections(images=2, seed=5)
    many = [{**x, "image_id": 1, "score": k / 400} for k, x in enumerate(300 * detections[:1])]
    stats = []
    for kind in (COCOeval, FastCOCOeval):
        evaluation = kind(truth, truth.loadRes(copy.deepcopy(detections + many)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        stats.append(evaluation.stats)
    np.testing.assert_allclose(*stats, rtol=0, atol=1e-12)


def test_detectron2_keeps_its_own_classes() -> None:
    before = coco_evaluation.COCOeval
    with fast_evaluation():
        assert coco_evaluation.COCOeval is FastCOCOeval
    assert coco_evaluation.COCOeval is before

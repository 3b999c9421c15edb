"""Test the images of predictions that each evaluation draws."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from PIL import Image

from distill.engine import Trainer
from distill.evaluation.images import GAP, LONGEST_SIDE, ImageEvaluator, stacked
from tests.support.trainings import trainable_cfg

SIZE = (60, 80)
CLASSES = ("widget", "gear")
Shapes = tuple[str, str, str]

pytestmark = pytest.mark.usefixtures("catalogues")


@pytest.fixture
def entry(tmp_path: Path) -> dict[str, Any]:
    """A dataset dict of a black image, with an object and a crowd."""
    path = tmp_path / "a.png"
    Image.new("RGB", SIZE[::-1]).save(path)
    thing = {"bbox": [10, 10, 40, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
    crowd = {**thing, "bbox": [60, 10, 70, 50], "iscrowd": 1}
    return {"file_name": str(path), "annotations": [thing, crowd]}


def detections(*found: tuple[int, float], **fields: Any) -> Instances:
    instances = Instances(SIZE)
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 10, 40, 40]] * len(found)))
    instances.pred_classes = torch.tensor([k for k, _ in found], dtype=torch.long)
    instances.scores = torch.tensor([score for _, score in found])
    for name, value in fields.items():
        instances.set(name, value)
    return instances


def grid(evaluator: ImageEvaluator, *pairs: tuple[dict[str, Any], Any]) -> Any:
    """Return (H, W, 3) pixels of the image that the evaluator puts into the storage, or None."""
    evaluator.reset()
    for truth, output in pairs:
        evaluator.process([truth], [output])
    with EventStorage(7) as storage:
        assert evaluator.evaluate() is None
        images = [image for _, image, _ in storage._vis_data]
        assert [(name, at) for name, _, at in storage._vis_data] == [("predictions/own", 7)] * len(
            images
        )
    return images[0].transpose(1, 2, 0) if images else None


def colored(pixels: Any) -> Any:
    """Return True for the pixels that are not grey, of boxes and masks."""
    return np.ptp(pixels.astype(int), -1) > 30


def test_truth_left_and_predictions_right(entry: dict[str, Any]) -> None:
    MetadataCatalog.get("own").set(thing_classes=["other", "gear"])
    pairs = [({"truth": entry}, {"instances": detections((1, 0.9))})]
    drawn = grid(ImageEvaluator("own", CLASSES), *pairs)
    height, width = SIZE
    assert drawn.shape == (height, 2 * width + GAP, 3) and drawn.dtype == np.uint8
    left, right = drawn[:, :width], drawn[:, -width:]
    assert colored(left)[10, 30] and colored(right)[10, 30]
    assert (left[10, 30] == right[10, 30]).all()  # the same class has the same colour
    assert not colored(left)[:, 58:].any()  # crowds are not drawn
    MetadataCatalog.remove("own")


@pytest.mark.parametrize(
    "output",
    [
        {},
        {"instances": detections()},
        {"instances": detections((0, 0.2))},
        {"proposals": None},
    ],
)
def test_nothing_to_draw(output: dict[str, Any], entry: dict[str, Any]) -> None:
    drawn = grid(ImageEvaluator("own", CLASSES), ({"truth": {**entry, "annotations": []}}, output))
    assert not colored(drawn).any()
    assert grid(ImageEvaluator("own", CLASSES), ({}, output)) is None


def test_masks_and_classes_without_a_name(entry: dict[str, Any]) -> None:
    entry["annotations"][0]["segmentation"] = [[10, 10, 40, 10, 40, 40]]
    masks = torch.zeros(1, *SIZE, dtype=torch.bool)
    masks[0, 12:38, 12:38] = True
    found = detections((5, 0.9), pred_masks=masks)
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    drawn = grid(ImageEvaluator("own", ()), ({"truth": entry}, {"instances": found}))
    assert drawn[30, SIZE[1] + GAP + 30].min() > 50 and drawn[35, 12].max() < 50
    assert (np.random.get_state()[1] == state).all()  # type: ignore[index]


def test_semantic_labels(entry: dict[str, Any], tmp_path: Path) -> None:
    MetadataCatalog.get("own").set(stuff_classes=["road", "sky"])
    labels = np.zeros(SIZE, np.uint8)
    labels[:30], labels[50:] = 1, 255
    Image.fromarray(labels).save(tmp_path / "labels.png")
    truth = {"file_name": entry["file_name"], "sem_seg_file_name": str(tmp_path / "labels.png")}
    logits = torch.nn.functional.one_hot(torch.from_numpy(labels % 255).long(), 2).permute(2, 0, 1)
    drawn = grid(ImageEvaluator("own", ()), ({"truth": truth}, {"sem_seg": logits}))
    left, right = drawn[:, : SIZE[1]], drawn[:, -SIZE[1] :]
    assert (left[5, 5] == right[5, 5]).all() and (left[45, 5] != left[5, 5]).any()
    assert left[55, 5].max() < 10  # no class
    MetadataCatalog.remove("own")


def test_large_images_become_small_and_sizes_may_differ(tmp_path: Path) -> None:
    pairs = []
    for size in ((4 * LONGEST_SIDE, 300), (90, 80)):
        Image.new("RGB", size).save(tmp_path / f"{size[0]}.png")
        pairs.append(({"truth": {"file_name": str(tmp_path / f"{size[0]}.png")}}, {}))
    drawn = grid(ImageEvaluator("own", ()), *pairs)
    assert drawn.shape == (75 + GAP + 80, 2 * LONGEST_SIDE + GAP, 3)
    assert (drawn[-1, -1] == 255).all()
    pixels = np.zeros((2, 3, 3), np.uint8)
    assert stacked([pixels, pixels], 1).shape == (2, 6 + GAP, 3)


def test_a_loader_gives_the_first_images_their_labels(shapes: Shapes, tmp_path: Path) -> None:
    cfg = trainable_cfg("faster", shapes, tmp_path, "TEST.VIS_IMAGES", 2)
    entries = [entry for batch in Trainer.build_test_loader(cfg, shapes[0]) for entry in batch]
    assert ["truth" in x for x in entries] == [True, True, False, False, False, False]
    assert [x["truth"]["file_name"] for x in entries[:2]] == [x["file_name"] for x in entries[:2]]
    assert all(x["truth"]["annotations"] for x in entries[:2])
    with EventStorage():
        assert isinstance(Trainer.build_evaluator(cfg, shapes[0])._evaluators[-1], ImageEvaluator)
        with_tta = Trainer.build_evaluator(cfg, shapes[0], str(tmp_path))._evaluators
    plain = Trainer.build_evaluator(cfg, shapes[0])._evaluators
    assert not any(isinstance(x, ImageEvaluator) for x in (*with_tta, *plain))

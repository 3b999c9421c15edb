"""Test the panels of an image: what is drawn, and where the labels are."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from distill.errors import DataError
from distill.evaluation.coco_errors import Judged
from distill.report.panels import (
    LONGEST_SIDE,
    DrawnBox,
    JudgedModel,
    compared_image,
    least_right,
    most_different,
)

SQUARE = [10.0, 20.0, 30.0, 40.0]
POLYGON = [[10.0, 20.0, 40.0, 20.0, 40.0, 60.0, 10.0, 60.0]]


@pytest.fixture
def truth(tmp_path: Path) -> COCO:
    """One image of 1000 x 100 pixels with an object and a crowd, and one without objects."""
    for name in ("full.png", "empty.png"):
        Image.fromarray(np.zeros((100, 1000, 3), np.uint8)).save(tmp_path / name)
    size = {"width": 1000, "height": 100}
    box: dict[str, Any] = {"image_id": 1, "category_id": 1, "bbox": SQUARE, "segmentation": POLYGON}
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": 1, "file_name": "full.png", **size},
            {"id": 2, "file_name": "empty.png", **size},
        ],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "iscrowd": 0, **box}, {"id": 2, "iscrowd": 1, **box}],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def model(**judged: Judged) -> JudgedModel:
    found = {"image_id": 1, "category_id": 1, "bbox": SQUARE, "score": 0.75}
    shown = {7: {**found, "segmentation": POLYGON}}
    return JudgedModel("m", shown, {int(k[1:]): x for k, x in judged.items()})


def test_an_object_that_is_found(truth: COCO, tmp_path: Path) -> None:
    found = model(_1=Judged([7], [], []))
    image = compared_image(truth, str(tmp_path), 1, [found])
    assert (image.width, image.height) == (1000, 100)
    assert Image.open(io.BytesIO(image.jpeg)).size == (LONGEST_SIDE, LONGEST_SIDE / 10)
    objects, right = image.panels  # the crowd is no object
    assert objects == ("ground truth", "1 object", [(tuple(SQUARE), "cat", "object", "")])
    assert right.summary == "F1 1.00: 1 right, 0 wrong, 0 missed"
    assert right.boxes == [(tuple(SQUARE), "cat 0.75", "right", "")]
    masks = compared_image(truth, str(tmp_path), 1, [found], masks=True)
    assert masks.panels[0].boxes[0].outline.startswith("M10,20 10,59 39,59 39,20Z")


def test_an_image_without_objects(truth: COCO, tmp_path: Path) -> None:
    missed = model(_2=Judged([], [7], []))
    objects, wrong = compared_image(truth, str(tmp_path), 2, [missed]).panels
    assert objects.summary == "0 objects" and objects.boxes == []
    assert wrong.boxes[0].kind == "wrong" and wrong.summary.startswith("F1 0.00")
    nothing = model(_2=Judged([], [], []))
    assert compared_image(truth, str(tmp_path), 2, [nothing]).panels[1].boxes == []


def test_an_image_that_cannot_be_read(truth: COCO, tmp_path: Path) -> None:
    (tmp_path / "full.png").write_text("no image")
    with pytest.raises(DataError, match=r"full\.png' cannot be read as an image"):
        compared_image(truth, str(tmp_path), 1, [])


@pytest.mark.parametrize("kind", ["right", "missed"])
@pytest.mark.parametrize("box", [(-5, -5, 10, 10), (95, 95, 10, 10), (0, 0, 100, 100)])
def test_labels_stay_in_the_image(kind: str, box: tuple[float, ...]) -> None:
    place = DrawnBox(box, "cat", kind).text_place(100, 100)
    assert 0 <= place["x"] <= 100 and 4 <= place["y"] <= 100
    assert place["text-anchor"] == ("end" if box[0] > 60 else "start")


def test_the_choice_of_images() -> None:
    """Image 3 changes most; of the equal 1 and 2, image 2 has more objects. In 4 all is equal."""
    some, more = Judged([1], [2], []), Judged([1, 2], [3, 4], [])
    all_right, all_more = Judged([1], [], []), Judged([1, 2], [], [])
    a = {1: some, 2: more, 3: Judged([], [], [1]), 4: some}
    b = {1: all_right, 2: all_more, 3: all_right, 4: some}
    assert most_different([a, b], 9) == [3, 2, 1] and most_different([a, b], 1) == [3]
    assert least_right(a, 9) == [3, 2, 1, 4] and least_right(b, 9) == [4]
    assert most_different([{}], 3) == []

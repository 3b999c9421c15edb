"""Test that all issues of annotations are found without errors, and that valid ones train."""

import copy
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.coco import load_coco_json
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from distill.data.checks.coco_file import NOT_EVALUABLE, CocoFile
from distill.data.checks.issues import Issue, as_root, config_issues, entry_issues, path_issues
from distill.data.datasets import check_test_set, find_issues, load_training_set
from distill.data.guarded_mapper import GuardedMapper
from distill.data.shapes import LAYOUTS, SceneConfig
from distill.errors import DataError
from tests.support.networks import tiny_cfg
from tests.support.trainings import trainable_cfg

WIDTH, HEIGHT = 20, 10
KEY = "MODEL.ROI_HEADS.NUM_CLASSES"
Shapes = tuple[str, str, str]
Content = dict[str, Any]


pytestmark = pytest.mark.usefixtures("catalogues")


def found(issues: Any) -> list[tuple[str, bool, bool]]:
    """Return the kind, True if it is fatal, and True if dropping the image avoids it."""
    return [(x.kind, x.fatal, bool(x.image)) for x in issues]


# --------------------------------------------------------------------------------- dataset dicts


def entry(**annotation: Any) -> Content:
    box = {"bbox": [1, 2, 9, 8], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}
    sizes = {"width": WIDTH, "height": HEIGHT}
    return {"file_name": "/data/a.jpg", **sizes, "annotations": [{**box, **annotation}]}


XYWH = {"bbox_mode": BoxMode.XYWH_ABS}
ROTATED = {"bbox_mode": BoxMode.XYWHA_ABS}
POLYGON = [1, 1, 9, 1, 9, 9]
RLE = {"size": [HEIGHT, WIDTH], "counts": [150, 50]}
BOXES: dict[str, tuple[dict[str, Any], str]] = {
    "corners": ({"bbox": (0, 0, WIDTH, HEIGHT)}, ""),
    "NumPy": ({"bbox": np.array([0.0, 0, WIDTH, HEIGHT])}, ""),
    "within the tolerance": ({"bbox": [-1, -1, WIDTH + 1, HEIGHT + 1]}, ""),
    "width and height": ({"bbox": [5, 5, 15, 5], **XYWH}, ""),
    "rotated": ({"bbox": [10, 5, 4, 4, 45.0], **ROTATED}, ""),
    "missing": ({"bbox": None}, "no box"),
    "empty": ({"bbox": []}, "no box"),
    "too short": ({"bbox": [1, 2, 3]}, "no box"),
    "text": ({"bbox": "1 2 3 4"}, "no box"),
    "texts": ({"bbox": ["1", "2", "3", "4"]}, "box that is not finite"),
    "NaN": ({"bbox": [math.nan, 0, 1, 1]}, "box that is not finite"),
    "infinite": ({"bbox": [0, 0, math.inf, 1]}, "box that is not finite"),
    "huge": ({"bbox": [0, 0, 10**400, 1]}, "box that is not finite"),
    "true": ({"bbox": [True, 0, 1, 1]}, "box that is not finite"),
    "turned round": ({"bbox": [9, 0, 1, 1]}, "box of negative size"),
    "negative height": ({"bbox": [1, 1, 5, -1], **XYWH}, "box of negative size"),
    "right": ({"bbox": [0, 0, WIDTH + 1.1, 1]}, "box outside its image"),
    "below": ({"bbox": [0, 6, 1, 6], **XYWH}, "box outside its image"),
    "left": ({"bbox": [-1.1, 0, 1, 1]}, "box outside its image"),
    "no width": ({"bbox": [3, 3, 3, 5]}, "box without area"),
    "relative": ({"bbox": [0, 0, 1, 1], "bbox_mode": BoxMode.XYXY_REL}, "value of a wrong type"),
    "no mode": ({"bbox_mode": None}, "value of a wrong type"),
    "crowd as text": ({"iscrowd": "0"}, "iscrowd that is not 0 or 1"),
    "negative class": ({"category_id": -1}, "unknown category"),
    "class beyond": ({"category_id": 3}, "unknown category"),
    "class as text": ({"category_id": "0"}, "unknown category"),
    "polygon": ({"segmentation": [POLYGON]}, ""),
    "2 points": ({"segmentation": [POLYGON, [1, 1, 2, 2]]}, "polygon of fewer than 3 points"),
    "odd": ({"segmentation": [[*POLYGON, 1]]}, "polygon of fewer than 3 points"),
    "NaN in a polygon": ({"segmentation": [[*POLYGON, 1, math.nan]]}, "polygon out of range"),
    "text in a polygon": ({"segmentation": [[*POLYGON, "1", 2]]}, "polygon out of range"),
    "far polygon": ({"segmentation": [[*POLYGON, 1e9, 1]]}, "polygon out of range"),
    "flat polygon": ({"segmentation": POLYGON}, "value of a wrong type"),
    "run lengths": ({"segmentation": RLE}, ""),
    "too few pixels": ({"segmentation": {**RLE, "counts": [150, 49]}}, "broken mask"),
    "too many pixels": ({"segmentation": {**RLE, "counts": [150, 51]}}, "broken mask"),
    "negative run": ({"segmentation": {**RLE, "counts": [-1, 201]}}, "value of a wrong type"),
    "no runs": ({"segmentation": {"size": [HEIGHT, WIDTH]}}, "value of a wrong type"),
    "no size": ({"segmentation": {"counts": "0"}}, "value of a wrong type"),
    "transposed": ({"segmentation": {**RLE, "size": [WIDTH, HEIGHT]}}, "mask of another size"),
    "odd characters": ({"segmentation": {**RLE, "counts": "é"}}, "broken mask"),
    "nothing": ({"segmentation": {**RLE, "counts": ""}}, "broken mask"),
}
REMARKS = ("box without area",)


@pytest.mark.parametrize("case", BOXES)
def test_annotations(case: str) -> None:
    change, kind = BOXES[case]
    issues = list(entry_issues(entry(**change), classes=3))
    assert found(issues) == ([(kind, kind not in REMARKS, True)] if kind else [])
    assert all("/data/a.jpg (annotations[0])" in x.where and "\n" not in x.detail for x in issues)


def test_masks_are_remarks_if_they_are_not_trained() -> None:
    broken = {"segmentation": [[*POLYGON, math.nan, 1]]}
    assert found(entry_issues(entry(**broken), masks=False)) == [
        ("polygon out of range", False, True)
    ]
    assert found(entry_issues(entry(**broken, iscrowd=1))) == [
        ("polygon out of range", False, True)
    ]


@pytest.mark.parametrize("size", [{"width": 0}, {"height": "10"}, {"width": None}, {"height": 1.5}])
def test_sizes(size: dict[str, Any]) -> None:
    assert found(entry_issues({**entry(), **size})) == [("image without a size", True, True)]


def test_images_without_annotated_size_have_boxes_anywhere() -> None:
    image = entry(bbox=[0, 0, 999, 999])
    del image["width"], image["height"]
    assert not list(entry_issues(image))


def test_run_lengths_are_checked_as_pycocotools_reads_them() -> None:
    """Complete run lengths have no issue, and run lengths without their end have one."""
    rng = np.random.default_rng(0)
    broken = 0
    for _ in range(300):
        shape = tuple(rng.integers(1, 40, 2).tolist())
        mask = np.asfortranarray((rng.random(shape) < rng.random() ** 3).astype(np.uint8))
        rle = mask_util.encode(mask)
        image = {"width": shape[1], "height": shape[0]}
        whole = {"segmentation": {"size": list(shape), "counts": rle["counts"].decode()}}
        assert not list(entry_issues({**entry(bbox=[0, 0, 0, 0], **whole), **image}))[1:]
        cut = {"segmentation": {**whole["segmentation"], "counts": rle["counts"][:-1]}}
        broken += bool(list(entry_issues({**entry(bbox=[0, 0, 0, 0], **cut), **image}))[1:])
    assert broken == 300


# ----------------------------------------------------------------------------------------- config


def test_annotations_that_do_not_fit_the_config() -> None:
    assert found(config_issues(entry(category_id=3), 3, KEY)) == [
        ("class beyond the config's number", True, False)
    ]
    assert found(config_issues(entry(), 3, KEY, "polygon")) == [
        ("object without a mask", True, True)
    ]
    assert found(config_issues(entry(segmentation=RLE), 3, KEY, "polygon")) == [
        ("mask of another format", True, False)
    ]
    assert not list(config_issues(entry(segmentation=RLE), 3, KEY, "bitmask"))
    assert not list(config_issues(entry(iscrowd=1), 3, KEY, "polygon"))
    assert not list(config_issues(entry(category_id=99), None, KEY))


# ------------------------------------------------------------------------------------------ paths

ESCAPES = ("../a.jpg", "/etc/passwd", "b/../../a.jpg", "..", "", "a\0.jpg", "./../images2/a.jpg")


@pytest.mark.parametrize(
    "name", ["a.jpg", "b/a.jpg", "b/../a.jpg", "..a.jpg", "/data/images/a.jpg"]
)
def test_paths_inside(name: str) -> None:
    path = str(Path("/data/images") / name)
    assert not list(path_issues({"file_name": path}, [as_root("/data/images")]))


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("key", ["file_name", "sem_seg_file_name", "pan_seg_file_name"])
def test_paths_outside(name: str, key: str) -> None:
    path = "/data/images/" + name if not name.startswith("/") else name
    image = {"file_name": "/data/images/x.jpg", key: path}
    (issue,) = path_issues(image, [as_root("/data/images")])
    assert issue.fatal and issue.where == path and issue.image == image["file_name"]


def test_every_folder_of_a_set_counts_and_so_does_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    roots = [as_root("images"), as_root("labels/")]
    files = {"file_name": "images/a.jpg", "sem_seg_file_name": str(tmp_path / "labels/a.png")}
    assert not list(path_issues(files, roots))
    assert list(path_issues({"file_name": "images/../a.jpg"}, roots))
    assert not list(path_issues({"file_name": "anywhere.jpg"}, []))  # nothing to compare with
    assert not list(path_issues({"file_name": "/a.jpg"}, [as_root("/")]))


def test_symbolic_links_are_not_resolved(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images").symlink_to(tmp_path / "elsewhere")
    path = {"file_name": str(tmp_path / "images" / "a.jpg")}
    assert not list(path_issues(path, [as_root(tmp_path / "images")]))


# ---------------------------------------------------------------------------------- files of COCO


def coco(folder: Path) -> Content:
    """Write two images, and return a valid file with both kinds of masks."""
    (folder / "images").mkdir(exist_ok=True)
    for k in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / f"{k}.png")
    size = {"width": WIDTH, "height": HEIGHT}
    box = {"bbox": [1, 1, 8, 8], "area": 64, "category_id": 1, "iscrowd": 0}
    return {
        "images": [{"id": k, "file_name": f"{k}.png", **size} for k in (1, 2)],
        "annotations": [
            {"id": 1, "image_id": 1, **box, "segmentation": [POLYGON]},
            {"id": 2, "image_id": 2, **box, "segmentation": RLE},
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }


def coco_file(folder: Path, content: Any) -> CocoFile:
    path = folder / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return CocoFile(str(path), str(folder / "images"))


def set_in(*place: Any, **values: Any) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        entry: Any = content
        for key in place:
            entry = entry[key]
        entry.update(values)

    return change


def of_image(**values: Any) -> Callable[[Content], None]:
    return set_in("images", 0, **values)


def of_object(**values: Any) -> Callable[[Content], None]:
    return set_in("annotations", 0, **values)


TYPE = "value of a wrong type"
LOST = "object without a polygon"
# Each row has a change, the kind of issue, fatal, and True if dropping the image avoids it.
FILES: dict[str, tuple[Callable[[Content], Any], str, bool, bool]] = {
    "no categories": (lambda c: c.pop("categories"), "missing list", True, False),
    "no images": (lambda c: c.update(images=[], annotations=[]), "missing list", True, False),
    "no annotations": (lambda c: c.pop("annotations"), "missing list", False, False),
    "null": (lambda c: c.update(annotations=None), TYPE, True, False),
    "number for an image": (lambda c: c["images"].append(3), TYPE, True, False),
    "image id twice": (of_image(id=2), "duplicate id in images", True, False),
    "annotation id twice": (of_object(id=2), "duplicate id in annotations", True, False),
    "category id twice": (
        *(lambda c: c["categories"].append({"id": 1, "name": "x"}),),
        *("duplicate id in categories", True, False),
    ),
    "ids of two types": (of_image(id="x"), TYPE, True, False),
    "id true": (of_image(id=True), TYPE, True, False),
    "no name": (lambda c: c["categories"][0].pop("name"), "missing key", True, False),
    "no height": (lambda c: c["images"][0].pop("height"), "missing key", True, False),
    "no category": (lambda c: c["annotations"][0].pop("category_id"), "missing key", True, False),
    "height 0": (of_image(height=0), "image without a size", True, True),
    "height null": (of_image(height=None, width=None), "image without a size", True, True),
    "path outside": (of_image(file_name="../../a.jpg"), "path out of the folder", True, True),
    "path absolute": (of_image(file_name="/a.jpg"), "path out of the folder", True, True),
    "path a number": (of_image(file_name=3), TYPE, True, False),
    "unknown image": (of_object(image_id=9), "unknown image", False, False),
    "unknown category": (of_object(category_id=9), "unknown category", True, False),
    "list for an id": (of_object(image_id=[1]), TYPE, True, False),
    "no box": (lambda c: c["annotations"][0].pop("bbox"), "no box", True, True),
    "box outside": (of_object(bbox=[15, 0, 9, 9]), "box outside its image", True, True),
    "box without area": (of_object(bbox=[5, 5, 0, 3]), "box without area", False, True),
    "a point": (of_object(segmentation=[[1, 1]]), LOST, True, True),
    "a point of a crowd": (of_object(segmentation=[[1, 1]], iscrowd=1), LOST, False, True),
    "one point more": (
        *(of_object(segmentation=[POLYGON, [1, 1]]),),
        *("polygon of fewer than 3 points", False, True),
    ),
    "broken mask": (*(of_object(segmentation={**RLE, "counts": "5"}), "broken mask", True, True),),
    "mask without runs": (of_object(segmentation={"size": [3, 3]}), TYPE, True, False),
    "ignore": (of_object(ignore=1), TYPE, True, False),
    "keypoints": (of_object(keypoints=["x", 1, 2]), TYPE, True, False),
}


def reads(file: CocoFile) -> bool:
    """Return True if detectron2 reads the file, and its mapper every image, with all objects."""
    MetadataCatalog.get("swept")
    MetadataCatalog.remove("swept")
    try:
        images = load_coco_json(file.path, file.image_root, "swept")
        objects = sum(len(x["annotations"]) for x in images)
        mapper = DatasetMapper(tiny_cfg("mask", "INPUT.MASK_FORMAT", "bitmask"), is_train=True)
        mapped = [mapper(image) for image in images]
    except Exception:
        return False
    return bool(mapped) and objects == len(file.content["annotations"])


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, tmp_path: Path) -> None:
    change, *expected = FILES[case]
    content = coco(tmp_path)
    change(content)
    issues = list(coco_file(tmp_path, content).issues())
    assert tuple(expected) in found(issues), issues
    assert not any(x.fatal and x.kind != expected[0] for x in issues), issues
    assert all(str(tmp_path) in x.where or x.where.startswith("/") for x in issues)


def evaluates(file: CocoFile) -> bool:
    """Return True if COCO's own evaluation of boxes and masks accepts the file as ground truth."""
    annotation = coco(Path(file.image_root).parent)["annotations"][0]
    truth = COCO(file.path)
    detections = truth.loadRes([{**annotation, "score": 0.5}])
    try:
        for kind in ("bbox", "segm"):
            COCOeval(truth, detections, kind).evaluate()
    except Exception:
        return False
    return True


EVALUATION: dict[str, tuple[Callable[[Content], Any], bool]] = {
    "valid": (of_object(), True),
    "no area": (lambda x: x["annotations"][0].pop("area"), False),
    "area of another type": (of_object(area="8"), False),
    "no iscrowd": (lambda x: x["annotations"][0].pop("iscrowd"), False),
    "no answer to iscrowd": (of_object(iscrowd=None), False),
    "no mask": (lambda x: x["annotations"][0].pop("segmentation"), False),
    "no polygon": (of_object(segmentation=[]), False),
    "a point as polygon": (of_object(segmentation=[[1, 2]]), False),
    "a line as polygon": (of_object(segmentation=[[1, 2, 3, 4]]), False),
    "one polygon, then a line": (of_object(segmentation=[POLYGON, [1, 2, 3, 4]]), True),
    "box outside": (of_object(bbox=[-5, 0, 5, 5]), True),
    "box of 3 numbers": (of_object(bbox=[1, 2, 3]), False),
    "texts as ids": (lambda x: [a.update(id=f"a{a['id']}") for a in x["annotations"]], False),
}


def test_an_object_that_the_evaluation_never_finds(tmp_path: Path) -> None:
    content = coco(tmp_path)
    content["annotations"][0]["id"] = 0
    file = coco_file(tmp_path, content)
    (issue,) = [x for x in file.evaluation_issues(masks=False) if x.kind == NOT_EVALUABLE]
    assert issue.fatal and "number them from 1" in issue.detail and "0)" in issue.where


@pytest.mark.parametrize("case", EVALUATION)
def test_a_test_set_that_cannot_be_evaluated_is_an_error(case: str, tmp_path: Path) -> None:
    """The error is raised before the training."""
    change, good = EVALUATION[case]
    content = coco(tmp_path)
    change(content)
    file = coco_file(tmp_path, content)
    assert evaluates(file) == good
    register_coco_instances("own_python", {}, file.path, file.image_root)
    cfg = tiny_cfg("mask", "DATASETS.TEST", ("own_python",), "MODEL.ROI_HEADS.NUM_CLASSES", 1)
    issues = [x for x in find_issues(cfg, "own_python")[0] if x.kind == NOT_EVALUABLE]
    assert bool(issues) == (not good)
    if good:
        check_test_set(cfg, "own_python")
    else:
        with pytest.raises(DataError):
            check_test_set(cfg, "own_python")


def test_a_valid_file_has_no_issues(tmp_path: Path) -> None:
    file = coco_file(tmp_path, coco(tmp_path))
    assert not list(file.issues()) and reads(file)
    assert [Path(x["file_name"]).name for x in file.images()] == ["1.png", "2.png"]


TEXTS = {
    "": "not valid JSON",
    '{"images": [': "not valid JSON",
    "[]": "JSON list",
    "3": "JSON int",
    "[" * 100_000: "not valid JSON",
    "\ufeff{}": "not valid JSON",
}


@pytest.mark.parametrize("text", TEXTS, ids=["empty", "cut", "list", "int", "deep", "mark"])
def test_files_that_are_no_coco(text: str, tmp_path: Path) -> None:
    file = coco_file(tmp_path, text)
    (issue,) = file.issues()
    assert issue.kind == "unreadable annotation file" and issue.where == file.path
    assert TEXTS[text] in issue.detail and issue.fatal and not file.images()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00{")
    for name, word in (("nowhere.json", "no such file"), ("a.json", "not valid"), (".", "no such")):
        (issue,) = CocoFile(str(tmp_path / name), str(tmp_path)).issues()
        assert word in issue.detail and issue.fatal


LEFT_OUT = ("unknown image", "missing list")  # detectron2 reads the rest


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside nested lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*place, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*place, key))


@pytest.mark.parametrize("spoilt", [None, "x", -1, 1e400, [], {}, math.nan, True], ids=repr)
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_every_value_replaced(spoilt: Any, tmp_path: Path) -> None:
    """No error is raised, and files without a fatal issue can be read and mapped."""
    valid = coco(tmp_path)
    for place in places(valid):
        content = copy.deepcopy(valid)
        inside: Any = content
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = spoilt
        file = coco_file(tmp_path, content)
        issues = list(file.issues())
        file.images()
        copes = not any(x.fatal or x.kind in LEFT_OUT for x in issues)
        if copes and all(Path(x["file_name"]).is_file() for x in file.images()):
            assert reads(file), (place, issues)
        assert all("\n" not in x.detail for x in issues)


# --------------------------------------------------------------------------------- training sets


@pytest.fixture
def spoil(shapes: Shapes, tmp_path: Path) -> Callable[..., CfgNode]:
    """Return a function that builds a config with a changed copy of the shapes."""

    def build(change: Callable[[Content], Any], *opts: Any) -> CfgNode:
        content = json.loads(Path(shapes[1]).read_text())
        change(content)
        path = tmp_path / "spoilt.json"
        path.write_text(json.dumps(content))
        triple = (f"own_{tmp_path.name}", str(path), shapes[2])
        return trainable_cfg("mask", triple, tmp_path, *opts)

    return build


def first_two(content: Content) -> None:
    """Move a box out of the first image, and remove a polygon from the second."""
    of_object(bbox=[60, 60, 60, 60])(content)
    second = next(x for x in content["annotations"] if x["image_id"] == 2)
    second["segmentation"] = [[1, 1, 2, 2]]


DROP = ("DATALOADER.ON_BAD_IMAGE", "drop")


def test_stop_counts_and_names_the_first(spoil: Callable[..., CfgNode]) -> None:
    with pytest.raises(DataError) as stopped:
        load_training_set(spoil(first_two))
    message = str(stopped.value)
    assert "000000000000.jpg (annotation 1): the box [60, 60, 60, 60] is outside" in message
    assert "first of 2 issues; `distill check-data --config-file F` shows all" in message
    assert "ON_BAD_IMAGE drop" in message and "\n" not in message


def test_drop_leaves_the_images_out(
    spoil: Callable[..., CfgNode], caplog: pytest.LogCaptureFixture
) -> None:
    cfg = spoil(first_two, *DROP)
    with caplog.at_level(logging.WARNING, "distill"):
        dicts = load_training_set(cfg)
    assert [Path(x["file_name"]).stem[-1] for x in dicts] == ["2", "3", "4", "5"]
    (record,) = [r.getMessage() for r in caplog.records if r.name.startswith("distill")]
    assert "dropped 2 of 6 images" in record
    assert "box outside its image: 1" in record and "object without a polygon: 1" in record


@pytest.mark.parametrize("mode", ["stop", "drop"])
def test_issues_of_no_single_image_stop_in_both_modes(
    mode: str, spoil: Callable[..., CfgNode]
) -> None:
    option = ("DATALOADER.ON_BAD_IMAGE", mode)
    for change in (of_object(category_id=77), of_object(id=2), of_image(id=2)):
        with pytest.raises(DataError) as stopped:
            load_training_set(spoil(change, *option))
        assert "ON_BAD_IMAGE" not in str(stopped.value)
    with pytest.raises(DataError, match="NUM_CLASSES"):
        load_training_set(spoil(first_two, *option, "MODEL.ROI_HEADS.NUM_CLASSES", 1))


def test_all_images_dropped(spoil: Callable[..., CfgNode]) -> None:
    def every(content: Content) -> None:
        for x in content["annotations"]:
            x["bbox"] = [0, 0, -1, -1]

    with pytest.raises(DataError, match=r"leaves no image .* negative size"):
        load_training_set(spoil(every, *DROP))


def test_remarks_do_not_stop(spoil: Callable[..., CfgNode]) -> None:
    assert len(load_training_set(spoil(of_object(bbox=[5, 5, 0, 9])))) == 6
    assert len(load_training_set(spoil(of_object(image_id=99)))) == 6


def test_a_wrong_folder_is_found_in_both_modes(spoil: Callable[..., CfgNode]) -> None:
    gone = of_image(file_name="gone.jpg")
    with pytest.raises(DataError, match=r"no image .*gone\.jpg"):
        load_training_set(spoil(gone))
    assert len(load_training_set(spoil(gone, *DROP))) == 6  # the loader drops it

    def all_gone(content: Content) -> None:
        for x in content["images"]:
            x["file_name"] = "gone.jpg"

    with pytest.raises(DataError, match="correct the image folder"):
        load_training_set(spoil(all_gone, *DROP))


def register_coco_in_python(folder: Path, change: Callable[[Content], Any]) -> CfgNode:
    """Register a data set like detectron2's own, whose raw file is not checked in training."""
    content = coco(folder)
    change(content)
    file = coco_file(folder, content)
    register_coco_instances("own_python", {}, file.path, file.image_root)
    return tiny_cfg("mask", "DATASETS.TRAIN", ("own_python",), "INPUT.MASK_FORMAT", "bitmask")


@pytest.mark.parametrize("case", ["box outside", "broken mask", "path outside", "height 0"])
def test_sets_registered_in_python_are_checked_as_read(case: str, tmp_path: Path) -> None:
    cfg = register_coco_in_python(tmp_path, FILES[case][0])
    with pytest.raises(DataError, match=r"1\.png|a\.jpg"):
        load_training_set(cfg)
    cfg.merge_from_list(list(DROP))
    (kept,) = load_training_set(cfg)
    assert kept["file_name"].endswith("2.png")
    assert isinstance(GuardedMapper(DatasetMapper(cfg, is_train=True))(kept), dict)


@pytest.mark.parametrize("case", ["annotation id twice", "unknown category", "ignore"])
def test_sets_that_detectron2_cannot_read(case: str, tmp_path: Path) -> None:
    cfg = register_coco_in_python(tmp_path, FILES[case][0])
    detail = next(x.detail for x in find_issues(cfg, "own_python")[0] if x.fatal)
    with pytest.raises(DataError) as stopped:
        load_training_set(cfg)
    assert detail in str(stopped.value)


def test_dataset_dicts_of_a_user(tmp_path: Path) -> None:
    """Unknown classes and paths outside the metadata's folders are errors for any data set."""
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    images = [{**entry(), "file_name": str(tmp_path / "a.png")}]
    DatasetCatalog.register("own_dicts", lambda: copy.deepcopy(images))
    metadata = MetadataCatalog.get("own_dicts").set(thing_classes=["a", "b"])
    cfg = tiny_cfg("faster", "DATASETS.TRAIN", ("own_dicts",))
    assert len(load_training_set(cfg)) == 1
    images[0]["annotations"][0]["category_id"] = 2
    with pytest.raises(DataError, match="2 is not an index"):
        load_training_set(cfg)
    images[0]["annotations"][0]["category_id"] = 1
    metadata.image_root = str(tmp_path / "images")
    with pytest.raises(DataError, match="leads out of the folder"):
        load_training_set(cfg)


@pytest.mark.parametrize("name", ["../../secret", "/etc/secret"])
def test_ids_of_voc_cannot_lead_out(name: str, tmp_path: Path) -> None:
    """They are checked before the reader, which would open these annotations."""
    root = tmp_path / "VOC2007"
    LAYOUTS["voc"](root, "train", 3, 0, SceneConfig(height=64, width=64))
    register_pascal_voc("own_voc", str(root), "train", 2007)
    MetadataCatalog.get("own_voc").evaluator_type = "pascal_voc"
    cfg = tiny_cfg("faster", "DATASETS.TRAIN", ("own_voc",), "MODEL.ROI_HEADS.NUM_CLASSES", 20)
    assert len(load_training_set(cfg)) == 3
    check_test_set(cfg, "own_voc")
    listed = root / "ImageSets" / "Main" / "train.txt"
    listed.write_text(f"{listed.read_text()}{name}\n")
    for check in (lambda: load_training_set(cfg), lambda: check_test_set(cfg, "own_voc")):
        with pytest.raises(DataError, match=r"train\.txt \(id .*secret\).*leads out"):
            check()
    assert found(find_issues(cfg, "own_voc")[0]) == [("path out of the folder", True, False)]


@pytest.mark.parametrize(
    "text", ["<annotation>", "<annotation/>", ""], ids=["cut", "bare", "empty"]
)
def test_broken_annotations_of_voc(text: str, tmp_path: Path) -> None:
    root = tmp_path / "VOC2007"
    LAYOUTS["voc"](root, "train", 2, 0, SceneConfig(height=64, width=64))
    register_pascal_voc("own_voc", str(root), "train", 2007)
    next((root / "Annotations").iterdir()).write_text(text)
    with pytest.raises(DataError, match="'own_voc' cannot be read"):
        load_training_set(tiny_cfg("faster", "DATASETS.TRAIN", ("own_voc",)))


def test_test_sets_stay_inside_too(tmp_path: Path) -> None:
    cfg = register_coco_in_python(tmp_path, lambda content: None)
    with pytest.raises(DataError, match=rf"{KEY} is 3, but the data set has 1 classes"):
        check_test_set(cfg, "own_python")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    check_test_set(cfg, "own_python")
    DatasetCatalog.remove("own_python")
    MetadataCatalog.remove("own_python")
    register_coco_in_python(tmp_path, of_image(file_name="../../etc/passwd"))
    with pytest.raises(DataError, match="passwd: the path leads out") as stopped:
        check_test_set(cfg, "own_python")
    assert "drop" not in str(stopped.value)


def test_an_issue_is_plain() -> None:
    issue = Issue("kind", "where", "detail", True)
    assert json.loads(json.dumps(issue._asdict())) == {
        **{"kind": "kind", "where": "where", "detail": "detail"},
        **{"fatal": True, "image": ""},
    }

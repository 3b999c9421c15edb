"""Test annotation files in the form that annotation tools export, for every reader of them."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO

from distill import cli
from distill.analysis.visualize import find_image
from distill.data.checks import images as image_checks
from distill.data.datasets import (
    class_names,
    find_issues,
    load_training_sets,
)
from distill.data.normalise import in_place_of_files
from distill.data.registration import register_own_sets
from distill.engine.evaluators import build_evaluators, check_test_sets
from distill.engine.trainer import train_mapper
from distill.errors import DataError
from distill.evaluation.coco_format import load_truth
from distill.launch.main import main
from tests.support.networks import tiny_cfg, write_config
from tests.support.trainings import trainable_cfg

WIDTH, HEIGHT = 64, 48
CLASSES = ("circle", "square", "star")
KEY = "MODEL.ROI_HEADS.NUM_CLASSES"
# Image, class, box; the last one is 3 pixels outside its image.
OBJECTS = (
    (0, "square", [10, 10, 20, 16]),
    (0, "star", [40, 4, 12, 12]),
    (1, "star", [20, 20, 30, 20]),
    (1, "circle", [2, 2, 9, 9]),
    (2, "circle", [-3, 20, 23, 20]),
)
Content = dict[str, Any]


pytestmark = pytest.mark.usefixtures("catalogues")


# ---------------------------------------------------------------------------------------- exports


def content(
    classes: tuple[str, ...] = CLASSES, objects: Any = OBJECTS, first_id: int = 1, **keys: Any
) -> Content:
    """Return COCO's instances; ``keys`` are added to all annotations."""
    size = {"width": WIDTH, "height": HEIGHT}
    return {
        "info": {"year": "2024"},
        "licenses": [],
        "images": [{"id": first_id + k, "file_name": f"{k}.png", **size} for k in range(3)],
        "annotations": [
            {
                "id": first_id + k,
                "image_id": first_id + image,
                "category_id": first_id + classes.index(name),
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                **keys,
            }
            for k, (image, name, box) in enumerate(objects)
        ],
        "categories": [{"id": first_id + k, "name": x} for k, x in enumerate(classes)],
    }


def roboflow() -> Content:
    """All ids begin at 0, and category 0 is a group of the others without objects."""
    names = ("shapes-x3kq", *CLASSES)
    export = content(names, first_id=0, segmentation=[])
    for k, category in enumerate(export["categories"]):
        category["supercategory"] = "shapes-x3kq" if k else "none"
    return export


def cvat() -> Content:
    """Masks are run lengths, and one of them is a crowd."""
    export = content(attributes={"occluded": False})
    export["annotations"].append(crowd(6, 1, [4, 30, 8, 8]))
    for annotation in export["annotations"]:
        annotation["segmentation"] = run_lengths(annotation["bbox"])
    for category in export["categories"]:
        category["supercategory"] = ""
    return export


def crowd(id: int, image: int, box: list[int]) -> Content:
    return {
        **{"id": id, "image_id": image, "category_id": 2},
        **{"bbox": box, "area": box[2] * box[3], "iscrowd": 1},
    }


def run_lengths(box: list[int]) -> Content:
    """Return COCO's uncompressed run lengths of a box, cut at its image."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    x, y, w, h = box
    mask[y : y + h, max(x, 0) : x + w] = 1
    pixels = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(pixels, prepend=0))
    return {
        "size": [HEIGHT, WIDTH],
        "counts": np.diff(edges, prepend=0, append=pixels.size).tolist(),
    }


def label_studio() -> Content:
    """File names are those of Windows, below folders of the tool; classes are in its own order."""
    export = content(("star", "circle", "square"), first_id=0, segmentation=[], ignore=0)
    for image in export["images"]:
        image["file_name"] = f"..\\media\\upload\\1\\{image['file_name']}"
    return export


def labelme() -> Content:
    """The lists have nothing that a training does not need; each class is its own supercategory."""
    export = content()
    for annotation in export["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        del annotation["area"], annotation["iscrowd"]
    for category in export["categories"]:
        category["supercategory"] = category["name"]
    return {k: export[k] for k in ("images", "annotations", "categories")}


EXPORTS: dict[str, tuple[Callable[[], Content], tuple[str, ...]]] = {
    "plain": (content, ()),
    "Roboflow": (roboflow, ("annotation with id 0", "group categories")),
    "CVAT": (cvat, ("crowds",)),
    "Label Studio": (label_studio, ("file names with backslashes", "annotation with id 0")),
    "labelme": (labelme, ("annotations without area or iscrowd",)),
}
CLIPPED = "boxes partly outside their image"


class Sets:
    """Data sets in a folder, which a config names."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.triples: list[tuple[str, str, str]] = []

    def add(self, name: str, export: Content) -> str:
        """Write a data set with its images, and return the name under which it is registered."""
        images = self.folder / name
        images.mkdir()
        for image in export["images"]:
            last = image["file_name"].replace("\\", "/").rpartition("/")[2]
            Image.new("RGB", (WIDTH, HEIGHT), (90, 80, 70)).save(images / last)
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(export))
        name = f"{self.folder.name}_{name}"
        self.triples.append((name, str(path), str(images)))
        return name

    def config(self, train: Any = (), test: Any = (), *opts: Any, classes: int = 3) -> CfgNode:
        sets = ("DATASETS.TRAIN", tuple(train), "DATASETS.TEST", tuple(test))
        cfg = tiny_cfg("faster", *sets, KEY, classes, *opts)
        cfg.DATASETS.COCO_FORMAT = tuple(self.triples)
        register_own_sets(cfg, None if train else cfg.DATASETS.TEST)
        return cfg


@pytest.fixture
def sets(tmp_path: Path) -> Sets:
    return Sets(tmp_path)


def ap(cfg: CfgNode, name: str, classes: tuple[str, ...] = CLASSES) -> dict[str, float]:
    """Return AP of a model that finds every object, whose outputs have the order of ``classes``."""
    (evaluator,) = build_evaluators(cfg, name, cfg.OUTPUT_DIR)
    evaluator.reset()
    for image, entry in enumerate(DatasetCatalog.get(name)):
        own = [(classes.index(x), box) for i, x, box in OBJECTS if i == image and x in classes]
        found = Instances((HEIGHT, WIDTH))
        xywh = torch.tensor([box for _, box in own]).float().reshape(-1, 4)
        corners = torch.cat([xywh[:, :2].clamp(min=0), xywh[:, :2] + xywh[:, 2:]], 1)
        found.pred_boxes, found.scores = Boxes(corners), torch.full((len(own),), 0.9)
        found.pred_classes = torch.tensor([k for k, _ in own], dtype=torch.long)
        evaluator.process([entry], [{"instances": found}])
    return {k: float(v) for k, v in evaluator.evaluate()["bbox"].items()}


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.name.startswith("distill"))


@pytest.mark.parametrize("tool", EXPORTS)
def test_exports_train_and_evaluate(
    tool: str, sets: Sets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model with the classes of a plain file finds all in the export of a tool, and reversed."""
    export, remarks = EXPORTS[tool]
    plain, own = sets.add("plain", content()), sets.add("own", export())
    cfg = sets.config([plain], [own], "OUTPUT_DIR", str(tmp_path))
    load_training_sets(cfg)
    check_test_sets(cfg)
    results = ap(cfg, own)
    assert results["AP"] == pytest.approx(100) == results["AP-star"]

    issues, images = find_issues(cfg, own)
    kinds = {x.kind: x.fatal for x in issues}
    order = ("classes in another order",) * (tool == "Label Studio")
    assert kinds == dict.fromkeys((*remarks, CLIPPED, *order), False)
    assert all(x.detail in messages(caplog) for x in issues)
    assert all(Path(x["file_name"]).is_file() for x in images)
    assert len(load_truth(cfg, own).anns) == 5 + (tool == "CVAT")

    cfg = sets.config([own], [plain], "OUTPUT_DIR", str(tmp_path))
    ((_, dicts),) = load_training_sets(cfg)
    check_test_sets(cfg)
    classes = tuple(MetadataCatalog.get(own).thing_classes)
    assert sorted(classes) == sorted(CLASSES)
    assert ap(cfg, plain, classes)["AP"] == pytest.approx(100)
    assert sum(not x.get("iscrowd") for image in dicts for x in image["annotations"]) == 5


def test_other_files_are_read_from_the_disk(sets: Sets) -> None:
    """A content in place of a file is forgotten after an error, too."""
    sets.add("own", content())
    with pytest.raises(ZeroDivisionError), in_place_of_files({"images": []}):
        assert not COCO("nowhere.json").imgs and not COCO().dataset
        raise ZeroDivisionError
    assert len(COCO(sets.triples[0][1]).imgs) == 3


@pytest.mark.slow
@pytest.mark.e2e
def test_one_export_trains_and_another_evaluates(
    sets: Sets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Detections have the same names in training, in an evaluation, and for a plain test set."""
    exports = {"train": roboflow(), "test": label_studio(), "plain": content()}
    names = {name: sets.add(name, export) for name, export in exports.items()}
    cfg = trainable_cfg("faster", sets.triples[0], tmp_path / "out", KEY, 3)
    cfg.DATASETS.COCO_FORMAT, cfg.DATASETS.TEST = tuple(sets.triples), (names["test"],)
    cfg.SOLVER.MAX_ITER, cfg.INPUT.MIN_SIZE_TRAIN = 4, (HEIGHT,)
    config = str(write_config(cfg, tmp_path / "config.yaml"))

    def detections(export: str, *options: str) -> list[Any]:
        """Return the class, image and box of all detections."""
        test = ("DATASETS.TEST", f"('{names[export]}',)")
        assert main(["--config-file", config, *options, *test]) == 0
        files, classes = (
            {x["id"]: x[key].rpartition("\\")[2] for x in exports[export][entries]}
            for entries, key in (("images", "file_name"), ("categories", "name"))
        )
        path = tmp_path / "out" / "inference" / "coco_instances_results.json"
        found = json.loads(path.read_text())
        return sorted((classes[x["category_id"]], files[x["image_id"]], x["bbox"]) for x in found)

    trained = detections("test")
    weights = ("MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth"))
    assert {name for name, *_ in trained} == {*CLASSES}
    assert trained == detections("test", "--eval-only", *weights)
    assert trained == detections("plain", "--eval-only", *weights)
    capsys.readouterr()
    assert cli.main(["check-data", "--config-file", config, "--workers", "0"]) == 0
    assert "0 fatal issues, 7 remarks" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- classes


def test_classes_in_another_order_train_alike(sets: Sets, caplog: pytest.LogCaptureFixture) -> None:
    """The order of the first training set holds for the others."""
    names = [sets.add("a", content()), sets.add("b", content(("star", "square", "circle")))]
    (_, first), (_, second) = load_training_sets(sets.config(names))
    labels = [
        [x["category_id"] for e in part for x in e["annotations"]] for part in (first, second)
    ]
    assert labels[0] == labels[1] == [1, 2, 2, 0, 0]
    assert "have another order than those of" in messages(caplog)


@pytest.mark.parametrize(
    "classes, words",
    [
        (("circle", "square", "stars"), ["lacks 'star' and also has 'stars'"]),
        (("circle", "square"), ["lacks 'star'"]),
        ((*CLASSES, "moon"), ["also has 'moon'"]),
        ((*CLASSES, "star"), ["repeats a name"]),
    ],
)
def test_training_sets_with_other_classes(
    classes: tuple[str, ...], words: list[str], sets: Sets
) -> None:
    first = [x for x in OBJECTS if x[1] != "star"]
    names = [sets.add("a", content()), sets.add("b", content(classes, first))]
    with pytest.raises(DataError) as stopped:
        load_training_sets(sets.config(names, classes=4))
    assert all(word in str(stopped.value) for word in (*words, *names, "DATASETS.TRAIN"))


def test_several_test_sets_of_one_model(
    sets: Sets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each test set has its own order, and may lack classes or have others."""
    without_circle = [x for x in OBJECTS if x[1] != "circle"]
    renamed = [(i, "moon" if x == "star" else x, box) for i, x, box in OBJECTS]
    train = sets.add("train", content())
    tests = [
        sets.add("turned", content(CLASSES[::-1])),
        sets.add("part", content(("star", "square"), without_circle)),
        sets.add("more", content(("moon", *CLASSES[:2]), renamed)),
    ]
    cfg = sets.config([train], tests, "OUTPUT_DIR", str(tmp_path))
    load_training_sets(cfg)
    check_test_sets(cfg)
    said = messages(caplog)
    assert "another order" in said and "lacks the classes 'circle' of DATASETS.TRAIN" in said
    assert "DATASETS.TRAIN lacks its classes 'moon'" in said
    assert [round(ap(cfg, name)["AP"]) for name in tests] == [100, 100, 67]
    assert math.isclose(ap(cfg, tests[2])["AP-moon"], 0)
    predictions = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {x["category_id"] for x in predictions} == {2, 3}  # ids of the file; star has none


def test_an_evaluation_reads_the_names_of_the_training_set(sets: Sets, tmp_path: Path) -> None:
    """If its file is gone, or the config has a training set of others, the order is taken as is."""
    train = sets.add("train", content())
    test = sets.add("test", content(CLASSES[::-1]))
    cfg = sets.config([], [test], "OUTPUT_DIR", str(tmp_path))
    cfg.DATASETS.TRAIN = (train,)
    check_test_sets(cfg)
    assert ap(cfg, test)["AP"] == pytest.approx(100)
    for other in ((), ("coco_2017_train",)):
        cfg.DATASETS.TRAIN = other
        check_test_sets(cfg)
        assert ap(cfg, test)["AP"] < 50
    cfg.DATASETS.TRAIN = (train,)
    Path(sets.triples[0][1]).unlink()
    check_test_sets(cfg)
    assert ap(cfg, test)["AP"] < 50


def test_no_advice_about_classes_is_circular(sets: Sets) -> None:
    only_star = [x for x in OBJECTS if x[1] == "star"]
    train, test = sets.add("train", content()), sets.add("test", content(("star",), only_star))
    other = sets.add("other", content(("a", "b", "c"), [(0, "a", [1, 1, 9, 9])]))
    cases = [
        (
            sets.config([train], [test], classes=5),
            f"{KEY} is 5, but DATASETS.TRAIN has 3 classes; set it to 3",
        ),
        (sets.config([], [test]), "list all classes of the training there"),
        (
            sets.config([train], [other]),
            "none of the classes of DATASETS.TRAIN, 'circle', 'square'",
        ),
    ]
    for cfg, message in cases:
        with pytest.raises(DataError, match=message):
            check_test_sets(cfg)
        assert any(x.fatal for x in find_issues(cfg, cfg.DATASETS.TEST[0])[0])
    check_test_sets(sets.config([train], [test]))


@pytest.mark.parametrize("place", ["train", "test"])
def test_visualized_objects_have_the_names_of_the_model(place: str, sets: Sets) -> None:
    first, other = sets.add("a", content()), sets.add("b", content(("star", "circle", "square")))
    train, test = ([first, other], []) if place == "train" else ([first], [other])
    cfg = sets.config(train, test)
    entry = find_image(cfg, str(Path(sets.triples[1][2], "0.png")))
    assert [class_names(cfg)[x["category_id"]] for x in entry["annotations"]] == ["square", "star"]


# ------------------------------------------------------------------------- categories and crowds


def test_group_categories_can_be_kept(sets: Sets) -> None:
    name = sets.add("own", roboflow())
    with pytest.raises(
        DataError, match=rf"{KEY} is 4, .* set it to 3, or DATASETS.KEEP_GROUP_CATEGORIES True"
    ):
        load_training_sets(sets.config([name], classes=4))
    load_training_sets(sets.config([name], [], "DATASETS.KEEP_GROUP_CATEGORIES", True, classes=4))
    assert MetadataCatalog.get(name).thing_classes == ["shapes-x3kq", *CLASSES]


@pytest.mark.parametrize(
    "parents, kept",
    [
        ({"star": "circle"}, ["square", "star"]),  # a group without objects
        ({"circle": "circle"}, [*CLASSES]),  # its own supercategory
        ({"circle": "star"}, [*CLASSES]),  # only of itself without objects
        ({}, [*CLASSES]),  # an ordinary class without objects
    ],
)
def test_ordinary_classes_without_objects_stay(
    parents: dict[str, str], kept: list[str], sets: Sets
) -> None:
    export = content(objects=[x for x in OBJECTS if x[1] != "circle"])
    for category in export["categories"]:
        category["supercategory"] = parents.get(category["name"], "shape")
    name = sets.add("own", export)
    ((_, dicts),) = load_training_sets(sets.config([name], classes=len(kept)))
    assert MetadataCatalog.get(name).thing_classes == kept
    labels = [kept[x["category_id"]] for image in dicts for x in image["annotations"]]
    assert labels == ["square", "star", "star"]


@pytest.mark.parametrize("empty", [False, True])
def test_a_set_of_crowds_is_refused_with_the_reason(empty: bool, sets: Sets) -> None:
    name = sets.add("own", content(iscrowd=1))
    cfg = sets.config([name], [], "DATALOADER.FILTER_EMPTY_ANNOTATIONS", not empty)
    with pytest.raises(DataError, match=r"all 5 objects are crowds .* set iscrowd to 0"):
        load_training_sets(cfg)
    assert "no object but crowds" in {x.kind for x in find_issues(cfg, name)[0] if x.fatal}


def test_crowds_are_painted_where_no_object_is(sets: Sets) -> None:
    """A crowd with a mask is painted there, and one without a mask in its box."""
    objects = [(0, "square", [10, 10, 20, 16]), (1, "star", [20, 20, 30, 20])]
    export = content(objects=objects)
    export["annotations"] += [crowd(6, 1, [0, 0, 40, 30]), crowd(7, 2, [40, 20, 20, 9])]
    export["annotations"][2]["segmentation"] = run_lengths([4, 8, 16, 30])
    cfg = sets.config([sets.add("own", export)], [], "INPUT.MIN_SIZE_TRAIN", (HEIGHT,))
    cfg.INPUT.RANDOM_FLIP = "none"
    ((_, dicts),) = load_training_sets(cfg)
    mapper = train_mapper(cfg)
    painted = [mapper(x)["image"] for x in dicts]
    colour = mapper.pixel_mean.round().to(torch.uint8)
    expected = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    expected[0, 8:38, 4:20] = True
    expected[0, 10:26, 10:30] = False
    expected[1, 20:29, 40:60] = True
    expected[1, 20:40, 20:50] = False
    for image, mask in zip(painted, expected):
        assert torch.equal((image == colour[:, None, None]).all(0), mask)


def test_masks_of_crowds_that_cannot_be_read_paint_their_box(sets: Sets) -> None:
    export = content(objects=[(0, "square", [1, 1, 4, 4])])
    export["annotations"].append(crowd(6, 1, [30, 10, 20, 20]))
    for broken in ({"size": [9, 9], "counts": [41, 40]}, {"size": [HEIGHT, WIDTH], "counts": "0"}):
        export["annotations"][1]["segmentation"] = broken
        cfg = sets.config([sets.add(f"own{len(sets.triples)}", export)])
        ((_, (entry,)),) = load_training_sets(cfg)
        assert len(train_mapper(cfg)(entry)["instances"]) == 1


def test_polygons_of_crowds_follow_the_transforms(sets: Sets) -> None:
    export = content(objects=[(0, "square", [1, 1, 4, 4])])
    triangle = {"segmentation": [[10, 10, 50, 10, 10, 40]]}
    export["annotations"].append({**crowd(6, 1, [10, 10, 40, 30]), **triangle})
    cfg = sets.config([sets.add("own", export)], [], "INPUT.MIN_SIZE_TRAIN", (2 * HEIGHT,))
    cfg.INPUT.RANDOM_FLIP = "none"
    mapper = train_mapper(cfg)
    ((_, (entry,)),) = load_training_sets(cfg)
    painted = (mapper(entry)["image"] == mapper.pixel_mean.round()[:, None, None]).all(0)
    points = [np.array(triangle["segmentation"][0]) * 2.0]
    mask = mask_util.decode(mask_util.frPyObjects(points, 2 * HEIGHT, 2 * WIDTH))[..., 0]
    assert torch.equal(painted, torch.from_numpy(mask).bool())


# ---------------------------------------------------------------------------------- boxes, images


def test_boxes_outside_are_clipped_or_refused(sets: Sets) -> None:
    name = sets.add("own", content())
    ((_, dicts),) = load_training_sets(sets.config([name]))
    assert dicts[2]["annotations"][0]["bbox"] == [0, 20, 20, 20]
    assert [x["annotations"][0]["bbox"] for x in dicts[:2]] == [OBJECTS[0][2], OBJECTS[2][2]]
    with pytest.raises(DataError, match=r"2\.png \(annotation 5\): the box .* is outside"):
        load_training_sets(sets.config([name], [], "DATALOADER.CLIP_BOXES", False))
    for outside in ([60, 20, 20, 20], [-20, 0, 10, 10], [70, 50, 9, 9]):
        wrong = sets.add(f"own{len(sets.triples)}", content(objects=[(0, "star", outside)]))
        with pytest.raises(DataError, match="is outside its image"):
            load_training_sets(sets.config([wrong]))


def test_boxes_in_fractions_are_refused(sets: Sets) -> None:
    objects = [(i, x, [max(a, 0) / 64, b / 48, c / 64, d / 48]) for i, x, (a, b, c, d) in OBJECTS]
    name, good = sets.add("own", content(objects=objects)), sets.add("good", content())
    message = r"all boxes are within one pixel, such as \[0\.15625, .* multiply fractions"
    with pytest.raises(DataError, match=message):
        load_training_sets(sets.config([name]))
    with pytest.raises(DataError, match=message):
        check_test_sets(sets.config([good], [name]))


def test_backslashes_are_only_replaced_where_all_files_exist(sets: Sets) -> None:
    """Two images must not become the same file."""
    export = content()
    for k, image in enumerate(export["images"]):
        image["file_name"] = f"{'ab'[k % 2]}\\{k // 2}.png"
    name = sets.add("own", export)
    with pytest.raises(DataError, match=r"There is no image .*a\\0\.png, .*backslashes"):
        load_training_sets(sets.config([name]))
    folder = Path(sets.triples[0][2])
    for image in export["images"]:
        path = folder / image["file_name"].replace("\\", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((folder / "0.png").read_bytes())
    ((_, dicts),) = load_training_sets(sets.config([name]))
    found = [Path(x["file_name"]).relative_to(folder).as_posix() for x in dicts]
    assert found == ["a/0.png", "b/0.png", "a/1.png"]


def unlink(path: Path) -> None:
    path.unlink()


def resize(path: Path) -> None:
    Image.new("RGB", (HEIGHT, WIDTH)).save(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:10])


def rotate(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(path, "JPEG", exif=exif)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (unlink, "there is no such file"),
        (resize, "it has 48 x 64 pixels, but is annotated as 64 x 48"),
        (cut, "Pillow does not know its format"),
        (rotate, "EXIF orientation 6 rotates it"),
    ],
)
def test_images_of_test_sets_are_checked(
    spoil: Callable[[Path], None], reason: str, sets: Sets
) -> None:
    train, test = sets.add("train", content()), sets.add("test", content())
    path = Path(sets.triples[1][2], "2.png")
    spoil(path)
    with pytest.raises(DataError) as stopped:
        check_test_sets(sets.config([train], [test]))
    message = str(stopped.value)
    assert reason in message and str(path) in message and "DATASETS.TEST" in message
    assert "issues" not in message and "\n" not in message


def test_each_image_is_opened_once(sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = sets.add("train", content()), sets.add("test", content())
    opened, stock = [], Image.open

    def count(file: Any) -> Any:
        opened.append(Path(file.name))
        return stock(file)

    monkeypatch.setattr(image_checks.Image, "open", count)
    check_test_sets(sets.config([train], [test]))
    assert sorted(opened) == [Path(sets.triples[1][2], f"{k}.png") for k in range(3)]


def test_more_objects_than_detections(sets: Sets, caplog: pytest.LogCaptureFixture) -> None:
    train, test = sets.add("train", content()), sets.add("test", cvat())
    caplog.set_level(logging.WARNING, "distill")
    check_test_sets(sets.config([train], [test], "TEST.DETECTIONS_PER_IMAGE", 1))
    assert "TEST.DETECTIONS_PER_IMAGE, which is 1: 2; set it to 2 or more" in messages(caplog)
    caplog.clear()
    check_test_sets(sets.config([train], [test], "TEST.DETECTIONS_PER_IMAGE", 2))
    assert "DETECTIONS_PER_IMAGE" not in messages(caplog)

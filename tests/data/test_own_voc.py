"""Test data sets of a user's own classes in PASCAL VOC's layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_voc_instances, register_pascal_voc
from detectron2.structures import Boxes, Instances
from PIL import Image

from distill import cli
from distill.config.resume import changed_values, training_values
from distill.data.datasets import class_names, find_issues, load_training_sets
from distill.data.registration import own_files, register_own_sets
from distill.engine.evaluators import build_evaluators, check_test_sets
from distill.errors import DataError
from distill.launch.main import main
from tests.support.networks import tiny_cfg, write_config
from tests.support.trainings import trainable_cfg

CLASSES = ("widget", "a/b", "big gear")
KEY = "MODEL.ROI_HEADS.NUM_CLASSES"
WIDTH, HEIGHT = 64, 48
# Class and corners of the objects by image; pixels are counted from 1.
OBJECTS: dict[str, list[tuple[str, list[Any]]]] = {
    "a": [("widget", [11, 11, 30, 30]), ("big gear", [5, 20, 60, 45])],
    "img 2": [("big gear", ["1.0", "2.5", 20, 30])],
}


def element(name: str, corners: list[Any], more: str = "") -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), corners)
    box = "".join(f"<{tag}>{x}</{tag}>" for tag, x in tags)
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def write(folder: Path, objects: Any = OBJECTS, more: str = "") -> Path:
    """Write a data set as tools do: no `difficult`, PNG files, and a blank line at the end."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    for id, found in objects.items():
        Image.new("RGB", (WIDTH, HEIGHT), (90, 80, 70)).save(folder / "JPEGImages" / f"{id}.png")
        elements = "".join(element(*x, more) for x in found)
        path = folder / "Annotations" / f"{id}.xml"
        path.write_text(f"<annotation>{size}{elements}</annotation>")
    (folder / "ImageSets" / "Main" / "all.txt").write_text("\n".join([*objects, "\n"]))
    return folder


def entry(folder: Path, kind: str = "train", classes: Any = CLASSES) -> tuple[Any, ...]:
    return f"{folder.name}_{kind}", str(folder / kind), "all", classes


def config(*entries: Any, test: Any = (), **options: Any) -> CfgNode:
    cfg = tiny_cfg("faster", KEY, options.get("classes", len(CLASSES)))
    cfg.DATASETS.VOC_FORMAT = (*entries, *test)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ([x[0] for x in y] for y in (entries, test))
    register_own_sets(cfg)
    return cfg


def ap(cfg: CfgNode, name: str, classes: tuple[str, ...] = CLASSES) -> dict[str, float]:
    """Return AP of a model that finds every object, whose outputs have the order of ``classes``."""
    (evaluator,) = build_evaluators(cfg, name, "")
    evaluator.reset()
    for image in DatasetCatalog.get(name):
        found = Instances((HEIGHT, WIDTH))
        boxes = [[float(x) for x in box] for _, box in OBJECTS[image["image_id"]]]
        found.pred_boxes = Boxes(torch.tensor(boxes) - torch.tensor([1, 1, 0, 0]))
        labels = [classes.index(x) for x, _ in OBJECTS[image["image_id"]]]
        found.scores, found.pred_classes = torch.full((len(labels),), 0.9), torch.tensor(labels)
        evaluator.process([image], [{"instances": found}])
    return {k: float(v) for k, v in evaluator.evaluate()["bbox"].items()}


def test_own_classes_train_and_evaluate(tmp_path: Path) -> None:
    """A class without objects in the test set does not count."""
    write(tmp_path / "train"), write(tmp_path / "test")
    names = CLASSES[::-1]
    cfg = config(entry(tmp_path), test=[entry(tmp_path, "test", names)])
    ((name, dicts),) = load_training_sets(cfg)
    check_test_sets(cfg)
    assert class_names(cfg) == CLASSES == tuple(MetadataCatalog.get(name).thing_classes)
    assert [x["category_id"] for image in dicts for x in image["annotations"]] == [0, 2, 2]
    assert dicts[1]["annotations"][0]["bbox"] == [0, 1.5, 20, 30]
    assert [Path(x["file_name"]).name for x in dicts] == ["a.png", "img 2.png"]
    assert ap(cfg, cfg.DATASETS.TEST[0]) == {"AP": 100, "AP50": 100, "AP75": 100}
    assert ap(cfg, cfg.DATASETS.TEST[0], names)["AP"] < 100
    issues, images = find_issues(cfg, name)
    assert not issues and len(images) == 2


def test_the_dicts_are_those_of_detectron2(tmp_path: Path) -> None:
    root = write(tmp_path / "train", dict.fromkeys(("a", "b"), OBJECTS["a"]))
    expected = load_voc_instances(str(root), "all", CLASSES)
    for x in expected:
        x["file_name"] = x["file_name"].replace(".jpg", ".png")
    files = own_files(config(entry(tmp_path)).DATASETS.TRAIN[0])
    assert files is not None and files.dataset_dicts("") == expected


def test_difficult_objects_do_not_count(tmp_path: Path) -> None:
    write(tmp_path / "train"), write(tmp_path / "test", more="<difficult>1</difficult>")
    cfg = config(entry(tmp_path), test=[entry(tmp_path, "test")])
    with pytest.raises(DataError, match="no image has an object that is not difficult"):
        check_test_sets(cfg)


def test_the_sets_of_detectron2_name_the_key(tmp_path: Path) -> None:
    root = write(tmp_path / "train")
    register_pascal_voc(f"plain_{tmp_path.name}", str(root), "all", 2007)
    cfg = tiny_cfg("faster", "DATASETS.TRAIN", (f"plain_{tmp_path.name}",))
    with pytest.raises(DataError) as stopped:
        load_training_sets(cfg)
    words = (str(root / "Annotations" / "a.xml"), "'widget'", "of the 20", "DATASETS.VOC_FORMAT")
    assert all(word in str(stopped.value) for word in words)


@pytest.mark.parametrize(
    "file, text, words",
    [
        ("ImageSets/Main/all.txt", None, "all.txt: it cannot be opened"),
        ("ImageSets/Main/all.txt", "../../a\n", "leads out of the folder"),
        ("Annotations/a.xml", None, "a.xml: it cannot be read"),
        ("Annotations/a.xml", "<annotation>", "a.xml: it cannot be read"),
        ("Annotations/a.xml", "<annotation/>", "<annotation> has no <size/width>"),
        (
            "Annotations/a.xml",
            element("gear", [1, 2, 3, 4]),
            "class 'gear' is not one of the 3",
        ),
        ("Annotations/a.xml", element("widget", [1, 2, 3]), "<object> has no <bndbox/ymax>"),
        ("Annotations/a.xml", element("widget", [1, 2, "x", 4]), "could not convert"),
        ("Annotations/a.xml", element("widget", [1, 2, 99, 4]), "outside its image of 64 x 48"),
    ],
)
def test_wrong_files(file: str, text: str | None, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "train") / file
    path.unlink()
    if text is not None:
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
        path.write_text(text.replace("<object>", f"<annotation>{size}<object>", 1))
        if "<object>" in text:
            path.write_text(f"{path.read_text()}</annotation>")
    cfg = config(entry(tmp_path))
    with pytest.raises(DataError) as stopped:
        load_training_sets(cfg)
    assert words in str(stopped.value) and "\n" not in str(stopped.value)
    issues, _ = find_issues(cfg, cfg.DATASETS.TRAIN[0])
    assert any(words in f"{x.where}: {x.detail}" and x.fatal for x in issues)
    cfg = config(test=[entry(tmp_path)])
    if "outside" not in words:  # an evaluation takes any box
        with pytest.raises(DataError):
            check_test_sets(cfg)


def test_images_with_broken_annotations_can_be_dropped(tmp_path: Path) -> None:
    root = write(tmp_path / "train")
    (root / "Annotations" / "a.xml").write_text("<annotation>")
    cfg = config(entry(tmp_path))
    cfg.DATALOADER.ON_BAD_IMAGE = "drop"
    ((_, dicts),) = load_training_sets(cfg)
    assert [x["image_id"] for x in dicts] == ["img 2"]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (("a", "b", "c"), "is not a (name, folder, split, class names) entry"),
        (("a", "b", "c", ()), "is not a (name, folder, split, class names) entry"),
        (("a", "b", "c", ("x", 1)), "is not a (name, folder, split, class names) entry"),
        (("a", "b", "c", ("x", "x")), "'a' names the class 'x' twice"),
        (("a", "b", "c", ("x",)), "'a': there is no folder 'b/Annotations'"),
    ],
)
def test_wrong_entries(wrong: Any, words: str) -> None:
    cfg = tiny_cfg("faster")
    cfg.DATASETS.VOC_FORMAT = (wrong,)
    with pytest.raises(DataError) as stopped:
        register_own_sets(cfg)
    assert "DATASETS.VOC_FORMAT" in str(stopped.value) and words in str(stopped.value)


def test_a_resume_compares_classes_and_no_places(tmp_path: Path) -> None:
    write(tmp_path / "train")
    cfg = config(entry(tmp_path))
    before = training_values(cfg)
    shutil.move(tmp_path / "train", tmp_path / "moved")
    cfg.DATASETS.VOC_FORMAT = ((cfg.DATASETS.TRAIN[0], str(tmp_path / "moved"), "all", CLASSES),)
    assert not changed_values(before, training_values(cfg))
    cfg.DATASETS.VOC_FORMAT = ((*cfg.DATASETS.VOC_FORMAT[0][:3], CLASSES[::-1]),)
    assert [*changed_values(before, training_values(cfg))] == [
        f"DATASETS.VOC_FORMAT '{cfg.DATASETS.TRAIN[0]}'"
    ]


@pytest.mark.slow
@pytest.mark.e2e
def test_a_training_and_its_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train"), write(tmp_path / "test")
    entries = entry(tmp_path), entry(tmp_path, "test", CLASSES[::2])
    opts = ["DATASETS.VOC_FORMAT", entries, "DATASETS.TRAIN", (entries[0][0],)]
    opts += ["DATASETS.TEST", (entries[1][0],), "SOLVER.MAX_ITER", 2, KEY, 3]
    opts += ["TEST.BEST_METRIC", "bbox/AP50"]
    cfg = trainable_cfg("faster", ("", "", ""), tmp_path / "out", *opts, "DATASETS.COCO_FORMAT", ())
    path = str(write_config(cfg, tmp_path / "config.yaml"))
    assert cli.main(["check-data", "--config-file", path, "--workers", "0"]) == 0
    assert main(["--config-file", path]) == 0
    rows = [json.loads(x) for x in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert any("bbox/AP50" in row for row in rows)
    weights = ["MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth")]
    assert main(["--eval-only", "--config-file", path, *weights]) == 0

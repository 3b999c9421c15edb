"""Test data sets of a user in YOLO's format."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from distill import cli
from distill.config.resume import changed_values, takes_effect, training_values
from distill.data.checks.images import read_header
from distill.data.checks.yolo_folder import YOLOFolder, label_path, parse_line
from distill.data.datasets import class_names, find_issues, load_training_sets
from distill.data.normalise import Rules
from distill.data.registration import label_digests, own_files, register_own_sets
from distill.engine.evaluators import build_evaluators, check_test_sets
from distill.errors import DataError
from distill.evaluation.coco_format import load_truth
from distill.launch.main import main
from tests.support.networks import tiny_cfg, write_config
from tests.support.trainings import trainable_cfg

WIDTH, HEIGHT = 64, 48
CLASSES = ("widget", "gear", "bolt")
KEY = "MODEL.ROI_HEADS.NUM_CLASSES"
BOX, OTHER, TRIANGLE = "2 0.5 0.5 0.25 0.5", "0 0.25 0.75 0.5 0.25", "1 0.25 0.25 0.75 0.25 0.5 1"
LABELS = {"a.png": f"{BOX}\n{TRIANGLE}\n", "b c.png": OTHER, "empty.png": "", "new.png": None}
BOXES = {  # class and corners in pixels
    "a.png": [(2, [24, 12, 40, 36]), (1, [16, 12, 48, 48])],
    "b c.png": [(0, [0, 30, 32, 42])],
}
YAML = {"train": "images", "val": "images", "nc": 3, "names": [*CLASSES]}

pytestmark = pytest.mark.usefixtures("catalogues")


def write(
    folder: Path, labels: Any = LABELS, content: Any = YAML, images: str = "images", **keys: Any
) -> str:
    """Write a data set, and return the path of its data.yaml."""
    for name, text in labels.items():
        image = folder / images / name
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (90, 80, 70)).save(image)
        if text is not None:
            path = Path(label_path(str(image)))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    path = folder / "data.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content | keys))
    return str(path)


def config(path: str, *opts: Any, split: str = "train") -> CfgNode:
    """Return a config that trains and tests on a data set."""
    name = f"own_{Path(path).parent.name}"
    sets = ("DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,))
    cfg = tiny_cfg("faster", KEY, 3, *sets, *opts)
    cfg.DATASETS.YOLO_FORMAT = ((name, path, split),)
    register_own_sets(cfg)
    return cfg


def names_of(images: list[dict[str, Any]]) -> list[str]:
    return [Path(x["file_name"]).name for x in images]


def refusals(path: str, **keys: Any) -> list[str]:
    """Return the messages of a training, an evaluation and the check, which all refuse a set."""
    cfg = config(path, **keys)
    with pytest.raises(DataError) as trained:
        load_training_sets(cfg)
    with pytest.raises(DataError) as evaluated:
        check_test_sets(cfg)
    issues, _ = find_issues(cfg, cfg.DATASETS.TRAIN[0])
    listed = "; ".join(f"{x.where}: {x.detail}" for x in issues if x.fatal)
    return [str(trained.value), str(evaluated.value), listed]


# --------------------------------------------------------------------------------------- the format


@pytest.mark.parametrize(
    "line, values, expected",
    [
        ("1 0.5 0.25 0.5 0.5", 0, (1, [0.5, 0.25, 0.5, 0.5])),
        (" 2.0\t0 1 1e-1 .5 ", 0, (2, [0, 1, 0.1, 0.5])),
        ("0 1.01 0 0 -0.01", 0, (0, [1.01, 0, 0, -0.01])),  # rounded
        ("0 0 0 1 0 1 1", 0, (0, [0, 0, 1, 0, 1, 1])),
        ("0 0.5 0.5 0.1 0.1 9 9 2", 3, (0, [0.5, 0.5, 0.1, 0.1])),
        ("3 0.5 0.5 0.1 0.1", 0, "class 3 is not an index of the 3 'names'"),
        ("-1 0.5 0.5 0.1 0.1", 0, "class -1 is not an index"),
        ("0.5 0.5 0.5 0.1 0.1", 0, "class 0.5 is not an index"),
        ("nan 0.5 0.5 0.1 0.1", 0, "class nan is not an index"),
        ("0 32 24 16 24", 0, "32 is not in [0, 1]; divide x and widths by the width"),
        ("0 0.5 nan 0.1 0.1", 0, "nan is not in [0, 1]"),
        ("0 0.5 -0.02 0.1 0.1", 0, "-0.02 is not in [0, 1]"),
        ("0 0.5 0.5 0.1 0.1 0.9", 0, "it has 6 values, which are not class, centre x"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", 0, "it has 8 values"),
        ("0 0.5 0.5 0.1", 0, "it has 4 values"),
        ("0", 0, "it has 1 values"),
        ("0 0.5 0.5 0.1 0.1", 6, "it has 5 values; with this kpt_shape there are 11"),
        ("widget 0.5 0.5 0.1 0.1", 0, "it has a value that is not a number"),
        ("0,0.5,0.5,0.1,0.1", 0, "it has a value that is not a number"),
    ],
)
def test_lines(line: str, values: int, expected: Any) -> None:
    parsed = parse_line(line, 3, values)
    if isinstance(expected, str):
        assert isinstance(parsed, tuple) and expected in parsed[1]
    else:
        assert parsed == expected


def test_labels_are_beside_the_last_folder_named_images() -> None:
    assert label_path("/x/images/y/images/z/a.b.jpg") == "/x/images/y/labels/z/a.b.txt"
    assert label_path("/x/images.old/a.jpg") == "/x/images.old/a.txt"


def test_the_content_is_that_of_coco(tmp_path: Path) -> None:
    files = YOLOFolder(write(tmp_path), "train", Rules())
    assert [x["name"] for x in files.content["categories"]] == [*CLASSES]
    boxes, polygon, other = (x["bbox"] for x in files.content["annotations"])
    assert (boxes, polygon, other) == ([24, 12, 16, 24], [16, 12, 32, 36], [0, 30, 32, 12])
    assert [x["area"] for x in files.content["annotations"]] == [384, 576, 384]
    assert files.content["annotations"][1]["segmentation"] == [[16, 12, 48, 12, 32, 48]]
    assert names_of(files.content["images"]) == [*LABELS]
    (remark,) = files.issues()
    assert "1 of 4 (that of" in remark.detail and str(tmp_path / "labels/new.txt") in remark.detail


def test_a_turned_image_has_the_size_that_detectron2_reads(tmp_path: Path) -> None:
    path = write(tmp_path, {"a.jpg": BOX})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / "a.jpg", exif=exif)
    (image,) = YOLOFolder(path, "train").content["images"]
    assert (image["width"], image["height"]) == (HEIGHT, WIDTH)


def test_a_header_is_read_again_when_the_image_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert read_header(str(path))[0] is None
    for size in ((8, 9), (10, 11)):
        Image.new("RGB", size).save(path)
        assert read_header(str(path)) == (size, None)


@pytest.mark.parametrize(
    "images, keys",
    [
        ("images/train", {"path": ".", "train": "images/train"}),
        ("images/train", {"train": "images"}),  # folders below it are read, too
        ("train/images", {"train": "../train/images"}),  # Roboflow
        ("train/images", {"train": "..\\train\\images"}),
        ("sub/images", {"path": "sub", "train": ["images"]}),
        ("images", {"train": "list.txt", "list": "images/{}"}),
        ("images/x", {"train": "images/list.txt", "list": "./x/{}"}),
        ("images/x", {"train": "images/list.txt", "list": "images\\x\\{}"}),
        ("images", {"names": dict(enumerate(CLASSES))}),
        ("images", {"names": {str(k): x for k, x in enumerate(CLASSES)}, "test": None}),
    ],
)
def test_layouts(images: str, keys: dict[str, Any], tmp_path: Path) -> None:
    line = keys.pop("list", None)
    path = write(tmp_path, images=images, **keys)
    if line:
        list_path = tmp_path / keys["train"]
        list_path.write_text("".join(f"{line.format(x)}\n\n" for x in LABELS))
    ((_, dicts),) = load_training_sets(config(path, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False))
    assert names_of(dicts) == [*LABELS]
    assert [len(x["annotations"]) for x in dicts] == [2, 1, 0, 0]


def test_remarks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is downloaded, and the same line twice is one object."""
    labels = {"a.png": f"{OTHER} 9 9\n{OTHER} 9 9\n"}
    keys = {"kpt_shape": [1, 2], "download": "raise SystemExit", "train": "../images"}
    cfg = config(write(tmp_path, labels, **keys))
    ((_, dicts),) = load_training_sets(cfg)
    assert len(dicts[0]["annotations"]) == 1
    words = ["'download' is ignored", "keypoints are not read", "so '", "labels/a.txt (line 2)"]
    assert all(x in caplog.text for x in words)


# ---------------------------------------------------------------------------- training, evaluation


def test_a_set_trains_and_evaluates(tmp_path: Path) -> None:
    """A model that finds every object has AP 100, and the truth of an analysis is the same."""
    cfg = config(write(tmp_path), "OUTPUT_DIR", str(tmp_path), split="val")
    (name,) = cfg.DATASETS.TRAIN
    ((_, dicts),) = load_training_sets(cfg)
    check_test_sets(cfg)
    assert class_names(cfg) == CLASSES == tuple(MetadataCatalog.get(name).thing_classes)
    assert names_of(dicts) == [*BOXES]  # images without objects are filtered
    (evaluator,) = build_evaluators(cfg, name, str(tmp_path))
    evaluator.reset()
    for image in DatasetCatalog.get(name):
        found = Instances((HEIGHT, WIDTH))
        objects = BOXES.get(Path(image["file_name"]).name, [])
        found.pred_boxes = Boxes(torch.tensor([x for _, x in objects]).float().reshape(-1, 4))
        found.pred_classes = torch.tensor([k for k, _ in objects], dtype=torch.long)
        found.scores = torch.full((len(objects),), 0.9)
        evaluator.process([image], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
    truth = load_truth(cfg, name)
    assert sorted(x["bbox"] for x in truth.dataset["annotations"]) == sorted(
        [x1, y1, x2 - x1, y2 - y1] for y in BOXES.values() for _, (x1, y1, x2, y2) in y
    )


def test_a_set_that_is_not_registered_has_class_names(tmp_path: Path) -> None:
    """It may be that of a teacher, or of an earlier training."""
    cfg = tiny_cfg("faster", KEY, 3, "DATASETS.TRAIN", ("nowhere",))
    cfg.DATASETS.YOLO_FORMAT = (("nowhere", write(tmp_path), "train"),)
    assert class_names(cfg) == CLASSES
    Path(cfg.DATASETS.YOLO_FORMAT[0][1]).unlink()
    assert class_names(cfg) is None


def test_masks(tmp_path: Path) -> None:
    """Polygons are masks; a box alone is not."""
    masks = ("MODEL.MASK_ON", True)
    (tmp_path / "x").mkdir()
    ((_, dicts),) = load_training_sets(config(write(tmp_path, {"a.png": TRIANGLE}), *masks))
    assert dicts[0]["annotations"][0]["segmentation"] == [[16, 12, 48, 12, 32, 48]]
    with pytest.raises(DataError, match="no segmentation; set MODEL"):
        load_training_sets(config(write(tmp_path / "x"), *masks))


def test_boxes_partly_outside(tmp_path: Path) -> None:
    path = write(tmp_path, {"a.png": "0 0.1 0.5 0.4 0.5"})
    ((_, dicts),) = load_training_sets(config(path))
    assert dicts[0]["annotations"][0]["bbox"] == pytest.approx([0, 12, 19.2, 24])
    with pytest.raises(DataError, match=r"labels/a.txt \(line 1\): the box .* outside its image"):
        load_training_sets(config(path, "DATALOADER.CLIP_BOXES", False))


# ------------------------------------------------------------------------------------- wrong files


@pytest.mark.parametrize(
    "text, words",
    [
        (f"{BOX}\n\n0 0.5 0.5", "labels/a.txt (line 3): it has 3 values"),
        ("0 0.5 0.5 x 1", "labels/a.txt (line 1): it has a value that is not a number"),
        ("7 0.5 0.5 0.1 0.1", "class 7 is not an index of the 3 'names'"),
        ("0 10 10 20 20", "10 is not in [0, 1]"),
        ("\0\1\2", "not a number"),
    ],
)
def test_wrong_labels(text: str, words: str, tmp_path: Path) -> None:
    """An evaluation refuses them too, because it would miss an object."""
    path = write(tmp_path, LABELS | {"a.png": text})
    assert all(words in x and "\n" not in x for x in refusals(path))
    cfg = config(path, "DATALOADER.ON_BAD_IMAGE", "drop")
    if text.startswith("7"):
        with pytest.raises(DataError):
            load_training_sets(cfg)
    else:
        ((_, dicts),) = load_training_sets(cfg)
        assert names_of(dicts) == ["b c.png"]
    with pytest.raises(DataError, match=r"a\.txt \(line \d\): "):
        load_truth(cfg, cfg.DATASETS.TRAIN[0])


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"train": "nowhere"}, "its 'train' names '{}/nowhere', which is no folder"),
        (
            {"train": "data.yaml"},
            "its 'train' names '{}/data.yaml', which is no folder or .txt file",
        ),
        ({"train": None}, "its 'train' is None, not a folder of images"),
        ({"train": [1]}, "its 'train' is [1], not a folder of images"),
        ({"train": "labels"}, "there are no images in '{}/labels'"),
        ({"path": "nowhere"}, "its 'path' is 'nowhere', but there is no such folder"),
        ({"path": 3}, "its 'path' is 3, but there is no such folder"),
        ({"nc": 4}, "its 'nc' is 4, but 'names' has 3 classes"),
        ({"names": None}, "its 'names' are None, not a list"),
        ({"names": {0: "a", 2: "b"}}, "the keys of 'names' are not the indices 0 to 1"),
        ({"names": ["a", "b", False]}, "'names' has False, which is not a text"),
        ({"kpt_shape": [17]}, "its 'kpt_shape' is [17]"),
    ],
)
def test_wrong_keys(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write(tmp_path, **keys)
    assert all(f"{path}: {words.format(tmp_path)}" in x for x in refusals(path))


@pytest.mark.parametrize(
    "text, words",
    [
        pytest.param("[" * 400, "it is not valid YAML", id="deep"),
        ("a: [", "it is not valid YAML"),
        ("!!python/object/apply:os.system [exit]", "it is not valid YAML"),
        ("3", "it is 3, not a mapping"),
        ("", "it is None, not a mapping"),
    ],
)
def test_wrong_files(text: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, content=text)
    assert all(f"{path}: {words}" in x for x in refusals(path))


@pytest.mark.parametrize("line", ["../../x.jpg", "/etc/passwd", "images/../../../x.jpg", "a\0b"])
def test_a_list_that_leads_out(line: str, tmp_path: Path) -> None:
    """The file outside is not opened."""
    path = write(tmp_path, train="list.txt", val="list.txt")
    (tmp_path / "list.txt").write_text(f"images/a.png\n{line}\n")
    refused = refusals(path)
    assert all("list.txt (line 2): the path leads out of the folder" in x for x in refused)
    content = YOLOFolder(path, "train").content
    assert names_of(content["images"]) == ["a.png"]


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "images" / "a.png").write_text("no image")
    assert all("images/a.png: Pillow does not know its format" in x for x in refusals(path))
    ((_, dicts),) = load_training_sets(config(path, "DATALOADER.ON_BAD_IMAGE", "drop"))
    assert names_of(dicts) == ["b c.png"]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (("a", "b"), "is not a (name, data.yaml, split) triple"),
        (("a", "b", 3), "is not a (name, data.yaml, split) triple"),
        (("a", "nowhere.yaml", "train"), "'a': there is no file 'nowhere.yaml'"),
        (("a", __file__, "valid"), "'a': the split is 'valid'; it must be one of: val, "),
    ],
)
def test_wrong_entries(wrong: Any, words: str) -> None:
    cfg = tiny_cfg("faster")
    cfg.DATASETS.YOLO_FORMAT = (wrong,)
    with pytest.raises(DataError) as stopped:
        register_own_sets(cfg)
    assert "DATASETS.YOLO_FORMAT" in str(stopped.value) and words in str(stopped.value)


def test_a_resume_compares_labels_and_no_places(tmp_path: Path) -> None:
    """Classes and labels count; the folder, and the place of ``data.yaml``, do not."""
    root = tmp_path / "data"
    cfg = config(write(root))
    key = f"DATASETS.YOLO_FORMAT '{cfg.DATASETS.TRAIN[0]}'"

    def values(folder: Path) -> dict[str, Any]:
        (name,) = cfg.DATASETS.TRAIN
        DatasetCatalog.remove(name), MetadataCatalog.remove(name)
        cfg.DATASETS.YOLO_FORMAT = ((name, str(folder / "data.yaml"), "train"),)
        register_own_sets(cfg)
        return training_values(cfg, {}, label_digests(cfg))

    before = values(root)
    assert len(before[key]) == 16 and not takes_effect(key)
    shutil.move(root, tmp_path / "moved")
    assert not changed_values(before, values(tmp_path / "moved"))
    for path, text in (
        (tmp_path / "moved" / "labels" / "a.txt", OTHER),
        (tmp_path / "moved" / "data.yaml", "names: [a, b, c]\ntrain: images\n"),
    ):
        old = path.read_text()
        path.write_text(text)
        assert [*changed_values(before, values(tmp_path / "moved"))] == [key]
        path.write_text(old)


@pytest.mark.slow
@pytest.mark.e2e
def test_a_training_and_its_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also ``check-data``, and an analysis of the trained model."""
    path = write(tmp_path / "data")
    entries = (("own_train", path, "train"), ("own_val", path, "val"))
    opts = ["DATASETS.YOLO_FORMAT", entries, "DATASETS.TRAIN", ("own_train",), KEY, 3]
    opts += ["DATASETS.TEST", ("own_val",), "SOLVER.MAX_ITER", 2, "DATASETS.COCO_FORMAT", ()]
    cfg = trainable_cfg("faster", ("", "", ""), tmp_path / "out", *opts)
    file = str(write_config(cfg, tmp_path / "config.yaml"))
    assert cli.main(["check-data", "--config-file", file, "--workers", "0"]) == 0
    assert "0 fatal issues, 2 remarks" in capsys.readouterr().out
    assert main(["--config-file", file]) == 0
    rows = [json.loads(x) for x in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert any("bbox/AP" in row for row in rows)
    report = ["--out", str(tmp_path / "report.html"), "--model", "own", str(tmp_path / "out")]
    data = ["--annotations", path, "--split", "val"]
    assert cli.main(["analyze", *data, *report]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["models"]
    files = own_files("own_train")
    assert isinstance(files, YOLOFolder)
    (tmp_path / "data" / "labels" / "a.txt").write_text(OTHER)
    assert main(["--config-file", file, "--resume", "SOLVER.MAX_ITER", "3"]) == 2
    assert "DATASETS.YOLO_FORMAT 'own_train' is" in capsys.readouterr().err

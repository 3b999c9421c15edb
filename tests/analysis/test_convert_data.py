"""Test the conversion of data sets to YOLO's and COCO's format, and back."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode, polygons_to_bitmask
from PIL import Image

from distill import cli
from distill.analysis.convert_data import join_polygons, label_lines
from distill.config import load_config
from distill.data.checks.yolo_folder import signed_area
from distill.data.datasets import load_training_sets
from distill.data.registration import register_own_sets
from distill.data.shapes import LAYOUTS, VOC_NAMES, SceneConfig

SCENE = SceneConfig(height=48, width=64, min_size=0.25)
SQUARE, MIRRORED = [2, 2, 12, 2, 12, 12, 2, 12], [20, 20, 20, 30, 40, 30, 40, 20]
Boxes = dict[str, list[tuple[str, list[float]]]]

pytestmark = pytest.mark.usefixtures("catalogues")


class Folder:
    """Data sets in a folder, and the command on them."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self.capsys = folder, capsys

    def config(self, name: str, **datasets: Any) -> str:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"DATASETS": datasets}))
        return str(path)

    def convert(self, config: str, to: str, *options: str) -> str:
        """Convert, and return the path of the config that the command prints."""
        out = self.folder / f"{Path(config).stem}_{to}"
        argv = ["convert-data", "--config-file", config, "--to", to, "--out", str(out)]
        assert cli.main([*argv, *options]) == 0
        self.printed = self.capsys.readouterr().out
        path = self.folder / f"{out.name}.yaml"
        path.write_text(self.printed[self.printed.index("DATASETS:") :])
        return str(path)

    def refused(self, config: str, *options: str, to: str = "yolo") -> str:
        out = str(self.folder / "refused")
        argv = ["convert-data", "--config-file", config, "--to", to, "--out", out, *options]
        assert cli.main(argv) == 2
        (line,) = self.capsys.readouterr().err.splitlines()[-1:]
        return line


@pytest.fixture
def data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Folder:
    return Folder(tmp_path, capsys)


def coco_set(folder: Path, name: str, objects: Any = (), **keys: Any) -> tuple[str, str, str]:
    """Write an image for each list of annotations, and return the entry of ``COCO_FORMAT``."""
    content: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
    (folder / name / "sub").mkdir(parents=True)
    for k, found in enumerate(objects):
        file = f"sub/{k}.png" if k else f"{k}.png"
        Image.new("RGB", (64, 48), (k, 0, 0)).save(folder / name / file)
        content["images"].append({"id": k, "file_name": file, "width": 64, "height": 48})
        for x in found:
            number = len(content["annotations"]) + 1
            content["annotations"].append({"id": number, "image_id": k, **x})
    names = keys.get("classes", ("b", "a"))
    content["categories"] = [{"id": 5 + k, "name": x} for k, x in enumerate(names)]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return name, str(path), str(folder / name)


def thing(category: int, box: list[float], **keys: Any) -> dict[str, Any]:
    return {"category_id": category, "bbox": box, "iscrowd": 0, "area": 9, **keys}


def read(path: str) -> tuple[CfgNode, Boxes]:
    """Return a config, and classes and corners of its training sets' boxes, by file name."""
    for name in [x for x in DatasetCatalog.list() if MetadataCatalog.get(x).get("own_files")]:
        DatasetCatalog.remove(name), MetadataCatalog.remove(name)
    cfg = load_config(path, ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", False])
    register_own_sets(cfg)
    found: Boxes = {}
    for name, dicts in load_training_sets(cfg):
        classes = MetadataCatalog.get(name).thing_classes
        for image in dicts:
            assert Path(image["file_name"]).is_file()
            found[Path(image["file_name"]).name] = [
                (
                    classes[x["category_id"]],
                    BoxMode.convert(list(x["bbox"]), x["bbox_mode"], BoxMode.XYXY_ABS),
                )
                for x in image["annotations"]
            ]
    return cfg, found


def bitmask(polygons: Any) -> Any:
    return polygons_to_bitmask([np.array(x) for x in polygons], 48, 64)


def assert_same(found: Boxes, expected: Boxes, tolerance: float = 0.01) -> None:
    assert list(found) == list(expected)
    for name, objects in expected.items():
        assert [x for x, _ in found[name]] == [x for x, _ in objects]
        for (_, box), (_, other) in zip(found[name], objects):
            assert box == pytest.approx(other, abs=tolerance)


def test_there_and_back(data: Folder) -> None:
    """COCO to YOLO to COCO has the same boxes, classes in the same order, and the same images."""
    images = [
        [thing(6, [10.25, 4.5, 20.125, 16]), thing(5, [0, 0, 64, 48])],
        [],
        [thing(5, [33.3, 7.77, 1.01, 40.23])],
    ]
    first = data.config(
        "first",
        COCO_FORMAT=[coco_set(data.folder, "own", images), coco_set(data.folder, "val", images)],
        TRAIN=["own"],
        TEST=["val"],
    )
    _, expected = read(first)
    yolo = data.convert(first, "yolo")
    assert "left out" not in data.printed and "6 images, 6 objects" in data.printed
    cfg, found = read(yolo)
    assert_same(found, expected)
    assert list(cfg.DATASETS.TRAIN) == ["first_yolo_train"]
    assert MetadataCatalog.get("first_yolo_train").thing_classes == ["b", "a"]
    assert (data.folder / "first_yolo" / "images" / "own" / "0.png").is_symlink()
    assert (data.folder / "first_yolo" / "labels" / "own" / "sub" / "1.txt").read_text() == ""
    back = data.convert(yolo, "coco", "--images", "copy")
    cfg, found = read(back)
    assert_same(found, expected)
    assert MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes == ["b", "a"]
    copied, _ = (data.folder / "first_yolo_coco").rglob("0.png")
    assert copied.is_file() and not copied.is_symlink()


def test_voc_to_both(data: Folder) -> None:
    """Any format that has boxes can be converted."""
    LAYOUTS["voc"](data.folder / "voc", "train", 3, config=SCENE)
    entry = ["own", str(data.folder / "voc"), "train", list(VOC_NAMES)]
    first = data.config("first", VOC_FORMAT=[entry], TRAIN=["own"])
    _, expected = read(first)
    for to in ("yolo", "coco"):
        assert_same(read(data.convert(first, to))[1], expected)


def test_masks_stay(data: Folder) -> None:
    LAYOUTS["coco"](data.folder / "shapes", "train", 3, config=SCENE)
    entry = ["own"] + [
        str(data.folder / "shapes" / x)
        for x in ("annotations/instances_train.json", "images/train")
    ]
    first = data.config("first", COCO_FORMAT=[entry], TRAIN=["own"])

    def masks(path: str) -> list[Any]:
        cfg, _ = read(path)
        dicts = [x for _, part in load_training_sets(cfg) for x in part]
        objects = [x for image in dicts for x in image["annotations"]]
        return [bitmask(x["segmentation"]) for x in objects]

    expected = masks(first)
    for to in ("yolo", "coco"):
        found = masks(data.convert(first, to))
        assert len(found) == len(expected) > 3
        assert max(np.mean(a != b) for a, b in zip(found, expected)) < 0.002


def test_polygons_are_joined_without_area() -> None:
    joined = join_polygons([SQUARE, MIRRORED, [50, 5, 60, 5, 55, 15]])
    assert signed_area(joined) == pytest.approx(100 + 200 + 50)
    apart = bitmask([SQUARE, MIRRORED, [50, 5, 60, 5, 55, 15]])
    assert (bitmask([joined.ravel()]) != apart).sum() <= 2
    assert join_polygons([MIRRORED]).ravel().tolist() == MIRRORED


def test_the_format_lacks_crowds_run_lengths_and_keypoints() -> None:
    """An image whose objects do not all have polygons has boxes only."""
    mode = {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    outlined = {"bbox": [2, 2, 10, 10], **mode, "segmentation": [SQUARE]}
    others = [
        {"bbox": [-3, 0, 9, 9], **mode, "segmentation": {"size": [48, 64], "counts": "x"}},
        {"bbox": [0, 0, 9, 9], **mode, "keypoints": [1, 1, 2]},
        {"bbox": [0, 0, 9, 9], **mode, "iscrowd": 1, "segmentation": [SQUARE]},
    ]
    entry = {"width": 64, "height": 48, "annotations": [outlined]}
    left_out: Counter[str] = Counter()
    (line,) = label_lines(entry, left_out)
    assert line.split()[:3] == ["1", "0.031250", "0.041667"] and len(line.split()) == 9
    assert not left_out.total()
    lines = list(label_lines({**entry, "annotations": [outlined, *others]}, left_out))
    assert [len(x.split()) for x in lines] == [5, 5, 5]
    assert lines[1].split()[1:] == ["0.046875", "0.093750", "0.093750", "0.187500"]  # clipped
    assert left_out == {"crowds": 1, "masks": 2, "keypoints of objects": 1}


def test_numbers_of_what_is_left_out(data: Folder) -> None:
    """The classes are those of the first set, so other classes of a test set are left out."""
    box = [4, 4, 9, 9]
    train = coco_set(data.folder, "own", [[thing(5, box), thing(6, box, iscrowd=1)]])
    classes = ("a", "c", "b")
    test = coco_set(
        data.folder, "val", [[thing(5, box), thing(6, box), thing(7, box)]], classes=classes
    )
    config = data.config("first", COCO_FORMAT=[train, test], TRAIN=["own"], TEST=["own", "val"])
    data.convert(config, "yolo")
    printed = [x for x in data.printed.splitlines() if "left out" in x]
    assert printed == ["left out crowds: 1", "left out objects of classes that 'own' lacks: 1"]
    out = data.folder / "first_yolo"
    content = yaml.safe_load((out / "data.yaml").read_text())
    assert content["val"] == ["images/own", "images/val"] and content["train"] == ["images/own"]
    labels = (out / "labels" / "val" / "0.txt").read_text().splitlines()
    assert [x.split()[0] for x in labels] == ["1", "0"]


def test_refusals(data: Folder) -> None:
    box = [4, 4, 9, 9]
    good = coco_set(data.folder, "own", [[thing(5, box)]])
    sets = {"COCO_FORMAT": [good], "TRAIN": ["own"]}
    config = data.config("first", **sets)
    (data.folder / "refused").mkdir()
    (data.folder / "refused" / "x").touch()
    assert "is not empty; name a new folder" in data.refused(config)
    (data.folder / "refused" / "x").unlink()
    (data.folder / "own" / "0.png").unlink()
    assert "0.png: there is no such file; `distill check-data`" in data.refused(config)
    Image.new("RGB", (64, 48)).save(data.folder / "own" / "0.png")
    outside = coco_set(data.folder, "bad", [[thing(5, [60, 4, 40, 9])]])
    wrong = data.config("second", COCO_FORMAT=[outside], TRAIN=["bad"])
    assert "outside its image" in data.refused(wrong)
    twins = json.loads(Path(good[1]).read_text())
    twins["images"].append({**twins["images"][0], "id": 9, "file_name": "0.jpg"})
    Image.new("RGB", (64, 48)).save(data.folder / "own" / "0.jpg")
    Path(good[1]).write_text(json.dumps(twins))
    assert "would have the same file of labels; rename one" in data.refused(config)
    slash = data.config("third", COCO_FORMAT=[["a/b", *good[1:]]], TRAIN=["a/b"])
    assert "The data set 'a/b' would be no folder" in data.refused(slash)
    semantic = [["own", str(data.folder / "own"), str(data.folder / "own"), ["road"]]]
    labels = data.config("fourth", SEM_SEG_FORMAT=semantic, TRAIN=["own"])
    assert data.refused(labels).startswith("error: ")

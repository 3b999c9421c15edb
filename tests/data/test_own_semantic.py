"""Test semantic labels of a user's own, in folders that a config names."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from PIL import Image

from distill import cli
from distill.config.resume import changed_values, training_values
from distill.data.checks import images as image_checks
from distill.data.datasets import check_labels, class_names, find_issues, load_training_sets
from distill.data.registration import register_own_sets
from distill.engine.evaluators import check_test_sets
from distill.errors import DataError
from distill.launch.main import main
from tests.support.networks import distill_opts, tiny_cfg, write_config
from tests.support.trainings import trainable_cfg, write_teacher

CLASSES = ("road", "wall", "sky", "tree")
KEY = "MODEL.SEM_SEG_HEAD.NUM_CLASSES"
WIDTH, HEIGHT = 80, 64


def labels(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Return a column of each class, and one to ignore."""
    columns = np.arange(width) * (len(CLASSES) + 1) // width
    return np.tile(np.where(columns < len(CLASSES), columns, 255).astype(np.uint8), (height, 1))


def write(folder: Path, number: int = 3) -> Path:
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for k in range(number):
        image = np.stack([labels() * 50, np.full_like(labels(), 20 * k), labels()], -1)
        Image.fromarray(image).save(folder / "images" / f"{k}.{'jpg' if k else 'png'}")
        Image.fromarray(labels()).save(folder / "labels" / f"{k}.png")
    return folder


def entry(folder: Path, kind: str = "train", classes: Any = CLASSES) -> tuple[Any, ...]:
    root = folder / kind
    return f"{folder.name}_{kind}", str(root / "images"), str(root / "labels"), classes


def config(*train: Any, test: Any = (), family: str = "semantic", classes: int = 4) -> CfgNode:
    cfg = tiny_cfg(family, KEY, classes)
    cfg.DATASETS.SEM_SEG_FORMAT = (*train, *test)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ([x[0] for x in y] for y in (train, test))
    register_own_sets(cfg)
    return cfg


def check(cfg: CfgNode) -> None:
    """Check a training and its evaluation, as a trainer does."""
    sets = load_training_sets(cfg) if cfg.DATASETS.TRAIN else []
    check_labels(cfg, [x for _, dicts in sets for x in dicts])
    check_test_sets(cfg)


def test_folders_are_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is opened once, and the labels of the first few are decoded."""
    opened: Counter[str] = Counter()
    stock = Image.open

    def count(file: Any) -> Any:
        opened[Path(file.name).relative_to(tmp_path).as_posix()] += 1
        return stock(file)

    monkeypatch.setattr(image_checks.Image, "open", count)
    write(tmp_path / "train", 10), write(tmp_path / "test")
    cfg = config(entry(tmp_path), test=[entry(tmp_path, "test")])
    check(cfg)
    assert len(opened) == 26 and {*opened.values()} == {1}
    assert class_names(cfg, semantic=True) == CLASSES and class_names(cfg) is None
    issues, dicts = find_issues(cfg, cfg.DATASETS.TRAIN[0])
    assert not issues and len(dicts) == 10
    pairs = [(Path(x["file_name"]), Path(x["sem_seg_file_name"])) for x in dicts]
    assert all(image.stem == label.stem and label.is_file() for image, label in pairs)


def resize(path: Path) -> None:
    Image.fromarray(labels(HEIGHT, WIDTH)).save(path)


def colour(path: Path) -> None:
    Image.fromarray(np.stack([labels()] * 3, -1)).save(path)


def bilevel(path: Path) -> None:
    Image.new("1", (WIDTH, HEIGHT)).save(path)


def spoil(path: Path) -> None:
    wrong = labels()
    wrong[3, 3], wrong[5, 5] = 7, 200
    Image.fromarray(wrong).save(path)


@pytest.mark.parametrize("place", ["train", "test"])
@pytest.mark.parametrize(
    "change, words",
    [
        (Path.unlink, "there is no such file"),
        (resize, "it has 64 x 80 pixels, but its image has 80 x 64"),
        (colour, "its labels are of mode RGB; store class indices as 8-bit greyscale"),
        (bilevel, "its labels are of mode 1"),
        (spoil, "the value 7 is not one of the 4 class indices from 0, nor MODEL.SEM_SEG_HEAD"),
    ],
)
def test_wrong_labels(place: str, change: Any, words: str, tmp_path: Path) -> None:
    write(tmp_path / "train"), write(tmp_path / "test")
    path = tmp_path / place / "labels" / "1.png"
    change(path)
    cfg = config(entry(tmp_path), test=[entry(tmp_path, "test")])
    with pytest.raises(DataError) as stopped:
        check(cfg)
    message = str(stopped.value)
    assert words in message and str(path) in message and "\n" not in message
    if place == "train":
        cfg.DATALOADER.ON_BAD_IMAGE = "drop"
        ((_, dicts),) = load_training_sets(cfg)
        assert len(dicts) == 2


def test_another_value_to_ignore(tmp_path: Path) -> None:
    write(tmp_path / "train")
    cfg = config(entry(tmp_path))
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 9
    register_own_sets(cfg)
    with pytest.raises(DataError, match=r"the value 255 is not .*IGNORE_VALUE, which is 9"):
        check(cfg)


def test_wrong_folders(tmp_path: Path) -> None:
    root = write(tmp_path / "train")
    cfg = config(entry(tmp_path))
    (root / "images" / "1.png").write_bytes((root / "images" / "1.jpg").read_bytes())
    with pytest.raises(DataError, match=r"'1\.jpg' and '1\.png' have the same labels; rename one"):
        check(cfg)
    for path in (root / "images").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="it has no images"):
        check(cfg)
    assert "labels without an image" in {x.kind for x in find_issues(cfg, cfg.DATASETS.TRAIN[0])[0]}
    shutil.rmtree(root / "labels")
    with pytest.raises(DataError, match=r"DATASETS\.SEM_SEG_FORMAT .*: there is no folder '"):
        config(entry(tmp_path))


def test_wrong_classes(tmp_path: Path) -> None:
    write(tmp_path / "train"), write(tmp_path / "test")
    train, test = entry(tmp_path), entry(tmp_path, "test")
    turned = entry(tmp_path, "test", CLASSES[::-1])
    cases = [
        (config(train, classes=5), r"4 semantic classes; set MODEL.* which is 5, to their number"),
        (config(test=[test], classes=3), r"4 semantic classes; set MODEL.* which is 3"),
        (
            config(train, test=[turned]),
            r"'tree', .* DATASETS.TRAIN '.*' are 'road'.*the order must",
        ),
        (config(train, turned), r"'tree', .* DATASETS.TRAIN '.*' are 'road'.*the order must"),
        (config(train, family="faster"), r"without objects"),
        (config(train, family="panoptic"), r"without objects"),
        (config(test=[test], family="faster"), r"which GeneralizedRCNN does not predict"),
    ]
    for cfg, message in cases:
        register_own_sets(cfg)
        with pytest.raises(DataError, match=message):
            check(cfg)


def test_a_resume_compares_classes_and_no_places(tmp_path: Path) -> None:
    write(tmp_path / "train")
    cfg = config(entry(tmp_path))
    before, name = training_values(cfg), cfg.DATASETS.TRAIN[0]
    cfg.DATASETS.SEM_SEG_FORMAT = ((name, "elsewhere", "moved", CLASSES),)
    assert not changed_values(before, training_values(cfg))
    cfg.DATASETS.SEM_SEG_FORMAT = ((name, "elsewhere", "moved", CLASSES[::-1]),)
    key = f"DATASETS.SEM_SEG_FORMAT '{name}'"
    assert [*changed_values(before, training_values(cfg))] == [key]


@pytest.mark.slow
@pytest.mark.e2e
def test_a_student_trains_and_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train"), write(tmp_path / "test")
    entries = entry(tmp_path), entry(tmp_path, "test")
    opts = ["DATASETS.SEM_SEG_FORMAT", entries, "DATASETS.TRAIN", (entries[0][0],)]
    opts += ["DATASETS.TEST", (entries[1][0],), "DATASETS.COCO_FORMAT", (), KEY, 4]
    opts += ["TEST.BEST_METRIC", "sem_seg/IoU-sky", "SOLVER.MAX_ITER", 3]
    opts += [*distill_opts("semantic", ["CWDLogits"]), *write_teacher(tmp_path, "semantic", KEY, 4)]
    cfg = trainable_cfg("semantic", ("", "", ""), tmp_path / "out", *opts)
    path = str(write_config(cfg, tmp_path / "config.yaml"))
    assert main(["--config-file", path]) == 0
    rows = [json.loads(x) for x in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert any("sem_seg/mIoU" in row for row in rows)
    weights = ["MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth")]
    assert main(["--eval-only", "--config-file", path, *weights]) == 0
    assert cli.main(["check-data", "--config-file", path, "--workers", "0"]) == 0
    spoil(tmp_path / "train" / "labels" / "2.png")
    capsys.readouterr()
    assert cli.main(["check-data", "--config-file", path, "--workers", "0"]) == 1
    assert "the value 7 is not one of the 4 class indices" in capsys.readouterr().out

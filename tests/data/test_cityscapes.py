"""Test the dataset dicts, labels and checks of Cityscapes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.labels import labels
from cityscapesscripts.preparation.json2labelImg import json2labelImg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import cityscapes as stock

from distill.data.checks.images import file_issues
from distill.data.cityscapes import (
    IGNORED,
    LABEL_IDS,
    TRAIN_IDS,
    SemanticMapper,
    check_ground_truth,
    label_id_table,
    load_cityscapes_instances,
    load_cityscapes_semantic,
    semantic_augmentations,
    train_id_table,
)
from distill.data.datasets import check_labels, check_test_set, find_issues, load_training_set
from distill.data.shapes import SceneConfig, write_cityscapes
from distill.errors import DataError
from distill.structures import Batch
from tests.support.networks import NUM_CLASSES, distilled, image_dict, kd_losses, tiny_cfg

Folders = tuple[str, str]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cityscapes")
    write_cityscapes(root, "train", 4, config=SceneConfig(height=96, width=128))
    return root


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    """Copy the files, which a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "cityscapes"))


def folders(root: Path) -> Folders:
    return str(root / "leftImg8bit" / "train"), str(root / "gtFine" / "train")


def register(root: Path, evaluator_type: str) -> str:
    loaders: dict[str, Callable[[str, str], Any]] = {
        "cityscapes_instance": load_cityscapes_instances,
        "cityscapes_sem_seg": load_cityscapes_semantic,
    }
    image_dir, gt_dir = folders(root)
    name = f"{evaluator_type}_{root}"
    DatasetCatalog.register(name, lambda: loaders[evaluator_type](image_dir, gt_dir))
    classes = MetadataCatalog.get("cityscapes_fine_sem_seg_train")
    MetadataCatalog.get(name).set(
        image_dir=image_dir,
        gt_dir=gt_dir,
        evaluator_type=evaluator_type,
        thing_classes=classes.thing_classes,
        stuff_classes=classes.stuff_classes,
    )
    return name


def by_file(dicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(dicts, key=lambda x: x["file_name"])


# -------------------------------------------------------------------------------------- loaders


def test_semantic_dicts_are_those_of_detectron2(sound: Path) -> None:
    dicts = load_cityscapes_semantic(*folders(sound))
    assert dicts == by_file(stock.load_cityscapes_semantic(*folders(sound)))
    assert len(dicts) == 4


@pytest.mark.e2e
def test_instance_dicts_are_those_of_detectron2(sound: Path) -> None:
    dicts = load_cityscapes_instances(*folders(sound))
    assert dicts == by_file(stock.load_cityscapes_instances(*folders(sound)))
    assert sum(len(x["annotations"]) for x in dicts) > 4


@pytest.mark.e2e
def test_the_rarer_polygons_are_those_of_detectron2(root: Path) -> None:
    """These are groups, deleted and negative labels, and hidden, split and crossing objects."""
    square = [[10, 10], [40, 10], [40, 40], [10, 40]]
    bar = [[0, 20], [90, 20], [90, 30], [0, 30]]
    cross = [[50, 50], [80, 80], [80, 50], [50, 80]]
    objects = [
        {"label": "person", "polygon": [[12, 12], [14, 12], [14, 14]]},  # hidden by the car
        {"label": "car", "polygon": square},
        {"label": "bus", "polygon": bar, "deleted": 1},
        {"label": "license plate", "polygon": bar},
        {"label": "bicyclegroup", "polygon": cross},
        {"label": "pole", "polygon": bar},  # splits the car
        {"label": "caravan", "polygon": [[60, 0], [70, 0], [70, 9]]},  # not evaluated
    ]
    for path in (root / "gtFine").rglob("*_polygons.json"):
        path.write_text(json.dumps({"imgHeight": 96, "imgWidth": 128, "objects": objects}))
    dicts = load_cityscapes_instances(*folders(root))
    assert dicts == by_file(stock.load_cityscapes_instances(*folders(root)))
    crowd, car = dicts[0]["annotations"]
    assert crowd["iscrowd"] and not car["iscrowd"] and len(car["segmentation"]) == 2


def test_the_registered_sets_are_ours() -> None:
    for task, module in (
        ("instance", load_cityscapes_instances),
        ("sem", load_cityscapes_semantic),
    ):
        for split in ("train", "val", "test"):
            loader = DatasetCatalog[f"cityscapes_fine_{task}_seg_{split}"]
            assert loader.func is module
            assert loader.args[0].endswith(f"cityscapes/leftImg8bit/{split}/")


@pytest.mark.e2e
def test_many_images_are_read_by_processes(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = load_cityscapes_instances(*folders(sound))
    monkeypatch.setattr("distill.data.cityscapes._POOLED", 2)
    assert load_cityscapes_instances(*folders(sound)) == alone


def test_label_ids_stand_in_for_missing_train_ids(root: Path) -> None:
    first, *others = sorted((root / "gtFine").rglob(f"*{TRAIN_IDS}"))
    first.unlink()
    dicts = load_cityscapes_semantic(*folders(root))
    assert dicts[0]["sem_seg_file_name"].endswith(LABEL_IDS)
    assert [x["sem_seg_file_name"] for x in dicts[1:]] == [str(x) for x in others]


@pytest.mark.parametrize("load", [load_cityscapes_semantic, load_cityscapes_instances])
@pytest.mark.parametrize(
    "gone, word",
    [
        ("leftImg8bit", "DETECTRON2_DATASETS"),
        ("gtFine", "ground truth"),
        ("leftImg8bit/train/train/*", "No city"),
        ("gtFine/train/train/*", "gtFine_trainvaltest.zip"),
    ],
)
def test_missing_files(load: Any, gone: str, word: str, root: Path) -> None:
    for path in list(root.glob(gone)):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(DataError, match=word) as error:
        load(*folders(root))
    assert str(root) in str(error.value)


@pytest.mark.parametrize(
    "text, word",
    [
        ("", "JSONDecodeError"),
        ("{}", "imgHeight"),
        ('{"imgHeight": 1, "imgWidth": 1, "objects": [{"label": "ufo"}]}', "'ufo'"),
        (
            '{"imgHeight": 1, "imgWidth": 1, "objects": [{"label": "car", "polygon": [[0, 0]]}]}',
            "ValueError",
        ),
    ],
)
def test_broken_polygons_name_their_file(text: str, word: str, root: Path) -> None:
    path = sorted((root / "gtFine").rglob("*_polygons.json"))[1]
    path.write_text(text)
    with pytest.raises(DataError, match=word) as error:
        load_cityscapes_instances(*folders(root))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------- labels


def test_tables() -> None:
    """The tables are compared with that of cityscapesscripts, row by row."""
    for label in labels:
        if label.id < 0:
            continue
        assert train_id_table()[label.id] == label.trainId
        if not label.ignoreInEval:
            assert label_id_table()[label.trainId] == label.id
    assert (train_id_table()[34:] == IGNORED).all()
    assert not label_id_table()[19:].any()


def test_mapped_labels_are_those_of_cityscapesscripts(root: Path) -> None:
    """createTrainIdLabelImgs draws the train ids of our table."""
    for path in (root / "gtFine").rglob("*_polygons.json"):
        names = [label.name for label in labels if label.id >= 0]
        content = json.loads(path.read_text())
        for place, thing in enumerate(content["objects"]):
            thing["label"] = names[(7 * place) % len(names)]
        path.write_text(json.dumps(content))
        stem = str(path).removesuffix("_gtFine_polygons.json")
        json2labelImg(str(path), stem + LABEL_IDS, "ids")
        json2labelImg(str(path), stem + TRAIN_IDS, "trainIds")
        ids, train_ids = (cv2.imread(stem + kind, -1) for kind in (LABEL_IDS, TRAIN_IDS))
        assert len(np.unique(ids)) > 4
        assert (train_id_table()[ids] == train_ids).all()


def cropping_cfg(*opts: Any) -> Any:
    return tiny_cfg(
        "semantic",
        *("INPUT.MIN_SIZE_TRAIN", (150, 200), "INPUT.MAX_SIZE_TRAIN", 400),
        *("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [64, 128]),
        *opts,
    )


def test_label_ids_and_train_ids_give_the_same_batches(root: Path) -> None:
    void = sorted((root / "gtFine").rglob(f"*{LABEL_IDS}"))[0]
    for kind, value in ((LABEL_IDS, 3), (TRAIN_IDS, IGNORED)):  # 3: out of roi
        path = Path(str(void).replace(LABEL_IDS, kind))
        image = cv2.imread(str(path), -1)
        image[:, :40] = value
        cv2.imwrite(str(path), image)
    mapper = SemanticMapper(cropping_cfg("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 0.6))
    made = load_cityscapes_semantic(*folders(root))
    for path in (root / "gtFine").rglob(f"*{TRAIN_IDS}"):
        path.rename(path.with_suffix(".kept"))
    raw = load_cityscapes_semantic(*folders(root))
    for path in (root / "gtFine").rglob("*.kept"):
        path.rename(path.with_suffix(".png"))
    for seed, (one, other) in enumerate(zip(made, raw)):
        assert one != other
        np.random.seed(seed)
        expected = mapper(one)
        np.random.seed(seed)
        got = mapper(other)
        assert torch.equal(got["image"], expected["image"])
        assert torch.equal(got["sem_seg"], expected["sem_seg"])
        assert got["image"].shape[1:] == got["sem_seg"].shape == (64, 128)
        assert set(got["sem_seg"].unique().tolist()) <= {*range(19), IGNORED}


def test_resized_images_are_cropped() -> None:
    _, resize, crop, flip = semantic_augmentations(cropping_cfg())
    names = [type(x).__name__ for x in (resize, crop, flip)]
    assert names == ["ResizeShortestEdge", "RandomCrop_CategoryAreaConstraint", "RandomFlip"]


def test_crops_with_one_class_are_avoided() -> None:
    """One quarter of the image has two classes; ignored pixels do not count."""
    cfg = cropping_cfg("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 0.9)
    crop = semantic_augmentations(cfg)[2]
    sem_seg = np.zeros((128, 256), np.uint8)
    sem_seg[:64, :128:2] = 1
    sem_seg[:, 1::4] = 255
    np.random.seed(0)
    shares = []
    for _ in range(20):
        found = crop.get_transform(sem_seg, sem_seg).apply_segmentation(sem_seg)
        counts = np.bincount(found[found != 255], minlength=2)
        shares.append(counts.max() / counts.sum())
    assert np.mean(np.array(shares) < 0.9) > 0.8


def test_padding_of_labels_is_ignored() -> None:
    """This holds for the labels of heads in a larger batch, and for detectron2's own losses."""
    sizes = ((8, 16), (16, 8))
    padded = Batch([{"sem_seg": torch.zeros(size).long()} for size in sizes], (16, 16)).sem_seg
    assert padded.shape == (2, 16, 16)
    assert (padded[0, 8:] == -1).all() and (padded[1, :, 8:] == -1).all()
    assert int((padded == 0).sum()) == 2 * 8 * 16
    assert tiny_cfg("semantic").MODEL.SEM_SEG_HEAD.IGNORE_VALUE == IGNORED


def test_heads_ignore_ignored_labels() -> None:
    def loss(label: int) -> Any:
        images = [image_dict(seed, semantic=True) for seed in range(2)]
        images[1]["sem_seg"][:, 20:] = label
        model = distilled("semantic", ["IMA"])
        model.student.sem_seg_head.ignore_value = label
        return kd_losses(model, images)

    assert loss(IGNORED) == loss(-1) == loss(NUM_CLASSES + 1)
    assert loss(IGNORED) != loss(0)


# --------------------------------------------------------------------------------------- checks


def test_unknown_label_values(root: Path) -> None:
    name = register(root, "cityscapes_sem_seg")
    cfg = tiny_cfg("semantic", "DATASETS.TRAIN", (name,), "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 19)
    issues, entries = find_issues(cfg, name)
    assert not issues and not [x for entry in entries for x in file_issues(entry)]
    first, second, third, _ = entries
    image = cv2.imread(first["sem_seg_file_name"], -1)
    image[0, 0] = 19
    cv2.imwrite(first["sem_seg_file_name"], image)
    cv2.imwrite(second["sem_seg_file_name"], image[1:])
    Path(third["sem_seg_file_name"]).unlink()
    found = [(x.kind, x.where) for entry in entries for x in file_issues(entry)]
    assert found == [
        ("unknown label", first["sem_seg_file_name"]),
        ("size not as annotated", second["sem_seg_file_name"]),
        ("missing file", third["sem_seg_file_name"]),
    ]


def test_unknown_label_ids(root: Path) -> None:
    for path in (root / "gtFine").rglob(f"*{TRAIN_IDS}"):
        path.unlink()
    first, *_ = load_cityscapes_semantic(*folders(root))
    assert not list(file_issues(first))
    cv2.imwrite(first["sem_seg_file_name"], np.full((96, 128), 34, np.uint8))
    (issue,) = file_issues(first)
    assert "34 is not a label id" in issue.detail


def test_too_few_classes(sound: Path) -> None:
    name = register(sound, "cityscapes_sem_seg")
    cfg = tiny_cfg("semantic", "DATASETS.TRAIN", (name,))
    with pytest.raises(DataError, match=r"19 semantic classes.*NUM_CLASSES"):
        check_labels(cfg, load_training_set(cfg))


@pytest.mark.parametrize(
    "kind, end",
    [
        ("cityscapes_sem_seg", "labelIds.png"),
        ("cityscapes_sem_seg", "instanceIds.png"),
        ("cityscapes_instance", "instanceIds.png"),
        ("cityscapes_instance", "polygons.json"),
    ],
)
def test_incomplete_test_sets(kind: str, end: str, root: Path) -> None:
    name = register(root, kind)
    check_ground_truth(name)
    gone = sorted((root / "gtFine").rglob(f"*_gtFine_{end}"))[2]
    gone.unlink()
    with pytest.raises(DataError, match=str(gone)):
        check_ground_truth(name)


def test_boxes_alone_cannot_be_evaluated(sound: Path) -> None:
    name = register(sound, "cityscapes_instance")
    with pytest.raises(DataError, match=r"MODEL\.MASK_ON True"):
        check_test_set(tiny_cfg("faster"), name)
    check_test_set(tiny_cfg("mask"), name)

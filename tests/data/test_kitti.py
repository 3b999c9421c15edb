"""Test KITTI's labels, splits and ignored regions, and mistakes in its files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from distill.data.datasets import load_training_set
from distill.data.ignored_regions import IgnoredRegionsMapper
from distill.data.kitti import (
    KITTI_CLASSES,
    load_kitti,
    register_kitti,
    split_ids,
)
from distill.data.shapes import SceneConfig
from distill.data.shapes import kitti as shapes_kitti
from distill.engine import Trainer
from distill.engine.evaluators import check_test_sets
from distill.errors import DataError
from tests.support.networks import tiny_cfg

HEIGHT, WIDTH = 40, 60
MEAN = (103.53, 116.28, 123.675)
PAINT = torch.tensor([104, 116, 124], dtype=torch.uint8)


def line(kind: str, box: tuple[float, ...], truncation: float = 0, occlusion: int = 0) -> str:
    numbers = " ".join(str(x) for x in box)
    return f"{kind} {truncation} {occlusion} -10 {numbers} -1 -1 -1 -1000 -1000 -1000 -10"


def write_image(root: Path, name: str, lines: list[str]) -> None:
    for folder in ("image_2", "label_2"):
        (root / "training" / folder).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(int(name)).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[(pixels == PAINT.numpy()[::-1]).all(axis=2)] = 0  # whatever has that colour was painted
    Image.fromarray(pixels).save(root / "training" / "image_2" / f"{name}.png")
    (root / "training" / "label_2" / f"{name}.txt").write_text("".join(f"{x}\n" for x in lines))


@pytest.fixture(scope="module")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kitti")
    for split in ("train", "val"):
        shapes_kitti.write_kitti(root, split, 9, config=SceneConfig(height=96, width=128))
    return root


pytestmark = pytest.mark.usefixtures("catalogues")


# ------------------------------------------------------------------------------- labels, splits


@pytest.mark.parametrize("split", ["train", "val"])
def test_loads_what_the_files_say(shapes_root: Path, split: str) -> None:
    dicts = load_kitti(shapes_root, split)
    ids = (shapes_root / "ImageSets" / f"{split}.txt").read_text().split()
    assert [x["image_id"] for x in dicts] == [int(i) for i in ids]
    ignored = 0
    for name, entry in zip(ids, dicts):
        assert Image.open(entry["file_name"]).size == (128, 96)
        assert (entry["width"], entry["height"]) == (128, 96)
        rows = [x.split() for x in Path(entry["label_file"]).read_text().splitlines()]
        assert Path(entry["label_file"]).stem == Path(entry["file_name"]).stem == name
        objects = [x for x in entry["annotations"] if not x["iscrowd"]]
        expected = [r for r in rows if r[0] != "DontCare"]
        assert [KITTI_CLASSES[x["category_id"]] for x in objects] == [r[0] for r in expected]
        assert [x["bbox"] for x in objects] == [[float(v) for v in r[4:8]] for r in expected]
        ignored += sum(x["iscrowd"] for x in entry["annotations"])
    assert ignored > 0  # the shapes have DontCare regions


def test_the_shapes_have_the_same_classes() -> None:
    assert shapes_kitti.KITTI_CLASSES == KITTI_CLASSES


def test_types(tmp_path: Path) -> None:
    kinds = ["Van", "Cyclist", "Truck", "Person_sitting", "Tram", "DontCare", "Misc", "Pedestrian"]
    lines = [line(kind, (i, 2, i + 10.5, 30)) for i, kind in enumerate([*kinds, "Car"])]
    write_image(tmp_path, "000007", lines)
    (entry,) = load_kitti(tmp_path, "train")
    found = [
        (x["category_id"], x["iscrowd"], x.get("ignored", False), x["bbox"][0])
        for x in entry["annotations"]
    ]
    dont_care = [(c, 1, True, 5.0) for c in range(3)]
    neighbours = [(0, 1, True, 0.0), (1, 1, True, 3.0)]
    objects = [(2, 0, False, 1.0), (1, 0, False, 7.0), (0, 0, False, 8.0)]
    assert sorted(found) == sorted(dont_care + neighbours + objects)
    assert all(x["bbox_mode"] == BoxMode.XYXY_ABS for x in entry["annotations"])


def test_boxes_are_clipped(tmp_path: Path) -> None:
    lines = [line("Car", (-2.5, 3, WIDTH + 1, HEIGHT + 4)), line("DontCare", (WIDTH, 1, 99, 9))]
    write_image(tmp_path, "000001", lines)
    (entry,) = load_kitti(tmp_path, "train")
    assert [x["bbox"] for x in entry["annotations"]] == [[0, 3, WIDTH, HEIGHT]]


def test_without_lists_the_split_is_drawn(tmp_path: Path) -> None:
    names = [f"{i:06d}" for i in range(31)]
    for name in names:
        write_image(tmp_path, name, [line("Car", (1, 1, 9, 9))])
    train, val = split_ids(tmp_path, "train"), split_ids(tmp_path, "val")
    assert (len(train), len(val)) == (16, 15)
    assert sorted(train + val) == names
    assert train != names[:16] and train != names[::2]
    assert train == split_ids(tmp_path, "train")
    # The split must never change, so that results stay comparable.
    assert val[:6] == ["000000", "000001", "000006", "000010", "000013", "000014"]

    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets" / "train.txt").write_text("000030\n000004\n")
    assert split_ids(tmp_path, "train") == ["000030", "000004"]
    with pytest.raises(DataError, match=r"split 'val' needs the file .*ImageSets.val\.txt"):
        split_ids(tmp_path, "val")  # a random split could have images of train


def test_benchmark_is_registered() -> None:
    for name in ("kitti_train", "kitti_val"):
        assert name in DatasetCatalog.list()
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == ["Car", "Pedestrian", "Cyclist"]
        assert metadata.evaluator_type == "kitti"


# ------------------------------------------------------------------------------ ignored regions

REGIONS = {
    "DontCare": (3.5, 4, 30, 20.25),
    "Van": (40, 10.75, 58.5, 30),
    "Person_sitting": (1, 30, 9, 39),
}
CAR = (20.5, 8, 46, 26.25)  # overlaps the DontCare region and the Van
TRUCK = (10, 28, 30, 38)


def scene(root: Path) -> dict[str, Any]:
    labels = [line(kind, box) for kind, box in REGIONS.items()]
    write_image(root, "000003", [*labels, line("Car", CAR), line("Truck", TRUCK)])
    return load_kitti(root, "train")[0]


def expected_mask() -> torch.Tensor:
    """Return the pixels to be painted, computed one by one."""
    mask = torch.zeros((HEIGHT, WIDTH), dtype=torch.bool)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            boxes = (CAR, *REGIONS.values())
            in_car, *ignored = (a < x + 1 and x < c and b < y + 1 and y < d for a, b, c, d in boxes)
            mask[y, x] = any(ignored) and not in_car
    return mask


def mappers(*augmentations: Any) -> tuple[IgnoredRegionsMapper, DatasetMapper]:
    options: dict[str, Any] = {"augmentations": list(augmentations), "image_format": "BGR"}
    ours = IgnoredRegionsMapper(True, pixel_mean=MEAN, **options)
    return ours, DatasetMapper(True, **options)


@pytest.mark.parametrize("flip", [False, True])
def test_ignored_regions_are_painted(tmp_path: Path, flip: bool) -> None:
    ours, stock = mappers(*[T.RandomFlip(prob=1.0)] * flip)
    entry = scene(tmp_path)
    painted, plain = ours(entry), stock(entry)
    mask = expected_mask()
    mask = mask.flip(1) if flip else mask
    assert 200 < mask.sum() < 1100
    assert (painted["image"][:, mask] == PAINT[:, None]).all()
    assert torch.equal(painted["image"][:, ~mask], plain["image"][:, ~mask])
    for found in (painted["instances"], plain["instances"]):  # neither trains on crowds
        assert found.gt_classes.tolist() == [0]
    boxes = [x["instances"].gt_boxes.tensor for x in (painted, plain)]
    assert torch.equal(*boxes)


def test_painted_after_a_resize(tmp_path: Path) -> None:
    ours, stock = mappers(T.Resize((100, 90)))
    entry = scene(tmp_path)
    painted, plain = ours(entry)["image"], stock(entry)["image"]
    scale_x, scale_y = 90 / WIDTH, 100 / HEIGHT
    around_car = (CAR[0] - 1, CAR[1] - 1, CAR[2] + 1, CAR[3] + 1)  # its box touches pixels there
    for y in range(100):
        for x in range(90):
            u, v = (x + 0.5) / scale_x, (y + 0.5) / scale_y
            boxes = (CAR, around_car, *REGIONS.values())
            in_car, near_car, *ignored = (a < u < c and b < v < d for a, b, c, d in boxes)
            if in_car:
                assert torch.equal(painted[:, y, x], plain[:, y, x])
            elif any(ignored) and not near_car:
                assert torch.equal(painted[:, y, x], PAINT)


def test_images_of_other_sets_are_not_changed(tmp_path: Path) -> None:
    ours, stock = mappers()
    entry = scene(tmp_path)
    for annotation in entry["annotations"]:
        annotation.pop("ignored", None)  # crowds of COCO do not have the key
    assert torch.equal(ours(entry)["image"], stock(entry)["image"])


def test_nothing_is_painted_in_inference(tmp_path: Path) -> None:
    cfg = tiny_cfg("faster", "INPUT.MIN_SIZE_TEST", 0)
    entry = scene(tmp_path)
    found = IgnoredRegionsMapper(cfg, is_train=False)(entry)
    assert torch.equal(found["image"], DatasetMapper(cfg, is_train=False)(entry)["image"])


def training_cfg(output: Path, names: tuple[str, ...]) -> CfgNode:
    cfg = tiny_cfg("faster", norm="BN")
    cfg.DATASETS.TRAIN = names
    cfg.INPUT.MIN_SIZE_TRAIN = (HEIGHT,)
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.MODEL.PIXEL_MEAN = list(MEAN)
    cfg.OUTPUT_DIR = str(output)
    return cfg


def test_trainer_paints_in_mixed_sets(tmp_path: Path) -> None:
    scene(tmp_path / "kitti")
    register_kitti("own_kitti", tmp_path / "kitti", "train")
    entry = scene(tmp_path / "plain")  # the data set has no ignored regions
    entry["annotations"] = [x for x in entry["annotations"] if not x["iscrowd"]]
    DatasetCatalog.register("own_plain", lambda: [entry])
    MetadataCatalog.get("own_plain").thing_classes = list(KITTI_CLASSES)

    trainer = Trainer(training_cfg(tmp_path / "out", ("own_plain", "own_kitti")))
    seen = {}
    for _, batch in zip(range(8), trainer._trainer._data_loader_iter):
        seen.update({x["file_name"]: x["image"] for x in batch})
    assert len(seen) == 2
    mask = expected_mask()
    for name, image in seen.items():
        painted = (image == PAINT[:, None, None]).all(dim=0)
        assert torch.equal(painted, mask if "kitti" in Path(name).parts else mask & False)


# ------------------------------------------------------------------------------ mistakes

GOOD = line("Car", (1, 1, 9, 9))
LABEL = "000002.txt"
MISTAKES = {
    "a column too few": (GOOD.rsplit(" ", 1)[0], "line 2: 14 columns; KITTI's labels have 15"),
    "with a score": (f"{GOOD} 0.9", "line 2: 16 columns"),
    "empty line": ("", "line 2: 0 columns"),
    "no number": (GOOD.replace(" 9 9", " 9 nine"), "line 2: 'nine' is not a number"),
    "not finite": (GOOD.replace(" 9 9", " 9 inf"), "line 2: 'inf' is not a number"),
    "unknown type": (GOOD.replace("Car", "Cra"), "line 2: unknown type 'Cra'; types: Car,"),
    "corners": (line("Car", (9, 1, 1, 9)), r"line 2: the box \(9.0, 1.0, 1.0, 9.0\) is not left,"),
    "outside": (line("Van", (99, 1, 120, 9)), r"line 2: the box .* no area in its image of 60 x"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_label_is_named(mistake: str, tmp_path: Path) -> None:
    text, message = MISTAKES[mistake]
    write_image(tmp_path, "000002", [GOOD, text, GOOD])
    register_kitti("own_kitti", tmp_path, "train")
    with pytest.raises(DataError, match=f"{LABEL}, {message}") as direct:
        load_kitti(tmp_path, "train")
    assert len(str(direct.value).splitlines()) == 1
    with pytest.raises(DataError) as training:
        load_training_set(training_cfg(tmp_path, ("own_kitti",)))
    assert str(training.value) == str(direct.value)


def spoil_nothing_there(root: Path) -> None:
    pass


def spoil_label(root: Path) -> None:
    write_image(root, "000002", [GOOD])
    (root / "training" / "label_2" / LABEL).unlink()


def spoil_image(root: Path) -> None:
    write_image(root, "000002", [GOOD])
    (root / "training" / "image_2" / "000002.png").write_text("not an image")


def spoil_list(root: Path, content: str = "") -> None:
    write_image(root, "000002", [GOOD])
    (root / "ImageSets").mkdir()
    (root / "ImageSets" / "train.txt").write_text(content)


FILES = {
    "no folder": (spoil_nothing_there, "no folder .*image_2.* DETECTRON2_DATASETS"),
    "no label": (spoil_label, "label file .*000002.txt cannot be read: No such file"),
    "broken image": (spoil_image, "image .*000002.png is missing or unreadable"),
    "empty list": (spoil_list, "split 'train' below .* has no images"),
    "listed, not there": (lambda r: spoil_list(r, "000009"), "image .*000009.png is missing"),
    "odd id": (lambda r: spoil_list(r, "a1"), "'a1' is not a number"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_is_named(case: str, tmp_path: Path) -> None:
    spoil, message = FILES[case]
    spoil(tmp_path)
    register_kitti("own_kitti", tmp_path, "train")
    with pytest.raises(DataError, match=message):
        load_kitti(tmp_path, "train")
    with pytest.raises(DataError, match=message):  # it is raised before the training
        check_test_sets(tiny_cfg("faster", "DATASETS.TEST", ("own_kitti",)))

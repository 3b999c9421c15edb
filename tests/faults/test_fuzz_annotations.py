"""Test annotation files of any content: they can be trained on, or an error says why not."""

import json
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from hypothesis import given
from hypothesis import strategies as st

from distill.analysis.convert_data import read_sources, write_yolo
from distill.data.checks.images import inspect_images
from distill.data.datasets import (
    check_labels,
    check_test_set,
    find_issues,
    load_training_set,
)
from distill.data.guarded_mapper import BadImage, GuardedMapper
from distill.data.kitti import register_kitti
from distill.data.registration import register_own_sets
from distill.data.shapes import LAYOUTS, VOC_NAMES, SceneConfig
from distill.engine.trainer import train_mapper
from distill.errors import DataError
from tests.support.networks import tiny_cfg
from tests.support.trainings import Run

from .fuzzing import SCALARS, check_data, command_works, encoded, fuzz, garbled, spoilt, works

SCENE = SceneConfig(height=48, width=48, min_size=0.25)


Shapes = tuple[str, str, str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shapes: Shapes) -> Run:
    return Run(tmp_path_factory.mktemp("run"), shapes, None)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    LAYOUTS["coco"](root, "train", 3, config=SCENE)
    return root


def config(*opts: Any) -> CfgNode:
    cfg = tiny_cfg("mask", "MODEL.ROI_HEADS.NUM_CLASSES", 8, "DATASETS.TRAIN", ("fuzzed",), *opts)
    cfg.DATASETS.TEST = ("fuzzed",)
    cfg.INPUT.MIN_SIZE_TRAIN = (48,)
    return cfg


def use(cfg: CfgNode) -> None:
    """Check a data set as a training does before its first step, and map all its images."""
    check_test_set(cfg, "fuzzed")
    mapper = GuardedMapper(train_mapper(cfg))
    dicts = load_training_set(cfg)
    check_labels(cfg, dicts)
    for entry in dicts:
        mapped = mapper(entry)
        if isinstance(mapped, BadImage) and cfg.DATALOADER.ON_BAD_IMAGE == "stop":
            raise DataError(mapped.reason)  # as the loader does


def documents(good: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Return annotation files with some wrong values or bytes."""
    text = json.dumps(good)
    names = st.sampled_from(["ignore", "keypoints", "iscrowd", "minival", "supercategory"])
    contents = spoilt(good, names)
    return st.one_of(
        contents.map(lambda x: json.dumps(x).encode()),
        contents.map(lambda x: json.dumps(x, ensure_ascii=False).encode(errors="surrogatepass")),
        contents.map(lambda x: json.dumps(x).encode()),
        garbled(text.encode()),
        encoded(text),
        st.binary(max_size=20),
        st.sampled_from([b"[" * 100_000, b'{"images":' * 9999]),
    )


@pytest.fixture(scope="module")
def good(coco: Path) -> dict[str, Any]:
    """Return a valid file with few objects, so that each part of it is changed often."""
    content = json.loads((coco / "annotations" / "instances_train.json").read_text())
    return {**content, "annotations": content["annotations"][:4]}


def with_keypoints(good: dict[str, Any]) -> dict[str, Any]:
    """Return the content with two keypoints, which the last annotation lacks."""
    names = {"keypoints": ["left", "right"], "skeleton": [[1, 2]]}
    points = {"keypoints": [9, 9, 2, 20, 20, 1], "num_keypoints": 2}
    *most, last = good["annotations"]
    return {
        **good,
        "annotations": [*({**x, **points} for x in most), last],
        "categories": [{**x, **names} for x in good["categories"]],
    }


@pytest.mark.parametrize("mode", ["stop", "drop", "keypoints"])
def test_coco(mode: str, coco: Path, good: dict[str, Any]) -> None:
    path = coco / f"{mode}.json"
    cfg = config("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    if mode == "keypoints":
        good = with_keypoints(good)
        cfg.MODEL.KEYPOINT_ON, node = True, cfg.MODEL.ROI_KEYPOINT_HEAD
        node.NUM_KEYPOINTS, node.MIN_KEYPOINTS_PER_IMAGE = 2, 0
    else:
        cfg.DATALOADER.ON_BAD_IMAGE = mode
    cfg.DATASETS.COCO_FORMAT = (("fuzzed", str(path), str(coco / "images" / "train")),)

    @fuzz(250)
    @given(documents(good))
    def check(content: bytes) -> None:
        path.write_bytes(content)

        def run() -> None:
            register_own_sets(cfg)
            use(cfg)

        trains = works("annotations", run)

        def look() -> None:
            register_own_sets(cfg)
            issues, dicts = find_issues(cfg, "fuzzed")
            for more in inspect_images(dicts, workers=0):
                issues += more
            assert trains or any(x.fatal for x in issues)  # `distill check-data` shows the reason

        works("annotations", look)

    check()


@fuzz(40)
@given(data=st.data())
def test_commands(
    data: st.DataObject, coco: Path, good: dict[str, Any], run: Run, shapes: Shapes
) -> None:
    """Data sets that pass the checks can be trained on and evaluated."""
    path = coco / "commands.json"
    path.write_bytes(data.draw(documents(good)))
    spoilt = ("fuzzed", str(path), str(coco / "images" / "train"))
    train, test = data.draw(st.sampled_from([(shapes, spoilt), (spoilt, shapes), (spoilt, spoilt)]))
    opts = [
        *("DATASETS.COCO_FORMAT", str((shapes, spoilt)), "DATASETS.TRAIN", str((train[0],))),
        *("DATASETS.TEST", str((test[0],)), "INPUT.MAX_SIZE_TEST", "64"),
        *("DATALOADER.ON_BAD_IMAGE", data.draw(st.sampled_from(["stop", "drop"]))),
    ]
    argv = ["--config-file", str(run.config)]
    if command_works("annotations", [*argv, *opts]):
        assert command_works("annotations", [*argv, "--workers", "0", *opts], check_data)


@st.composite
def mutated_text(draw: st.DrawFn, text: str) -> str:
    """Replace, drop or repeat some words of a text, and sometimes cut its end off."""
    words = text.split(" ")
    for _ in range(draw(st.integers(1, 3))):
        index = draw(st.integers(0, len(words) - 1))
        new = draw(SCALARS.map(str) | st.sampled_from(["../../x", "<", "&x;", "\n", "nan"]))
        words[index] = draw(st.sampled_from([new, words[index] * 2, "", f"{words[index]} {new}"]))
    joined = " ".join(words)
    return joined[: draw(st.sampled_from([len(joined), len(joined) // 2]))]


def spoil_files(root: Path, files: list[Path], cfg: CfgNode, register: Any) -> None:
    """Fuzz the files of a layout, one at a time."""
    good = {file: file.read_text() for file in files}

    @fuzz(110)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(files))
        spoilt = data.draw(mutated_text(good[file]))
        file.write_text(spoilt, encoding="utf-8", errors="replace")

        def run() -> None:
            register()
            use(cfg)

        try:
            works("annotations", run)
        finally:
            file.write_text(good[file])

    check()


def test_voc(tmp_path: Path) -> None:
    LAYOUTS["voc"](tmp_path, "train", 3, config=SCENE)
    root = tmp_path
    files = [*root.rglob("train.txt"), *(root / "Annotations").glob("*.xml")]
    cfg = config("MODEL.MASK_ON", False)

    def register() -> None:
        register_pascal_voc("fuzzed", str(root), "train", 2007, class_names=VOC_NAMES)

    spoil_files(root, files, cfg, register)


def test_own_voc(tmp_path: Path) -> None:
    LAYOUTS["voc"](tmp_path, "train", 3, config=SCENE)
    files = [*tmp_path.rglob("train.txt"), *(tmp_path / "Annotations").glob("*.xml")]
    cfg = config("MODEL.MASK_ON", False)
    cfg.DATASETS.VOC_FORMAT = (("fuzzed", str(tmp_path), "train", VOC_NAMES),)
    spoil_files(tmp_path, files, cfg, lambda: register_own_sets(cfg))


@pytest.mark.parametrize("masks", [False, True])
def test_yolo(masks: bool, coco: Path, tmp_path: Path) -> None:
    """Labels, ``data.yaml`` and a list of images; boxes, or polygons of masks."""
    annotations, images = coco / "annotations" / "instances_train.json", coco / "images" / "train"
    source = tiny_cfg("mask", "DATASETS.TRAIN", ("source",))
    source.DATASETS.COCO_FORMAT = (("source", str(annotations), str(images)),)
    register_own_sets(source)
    sources = read_sources(source)
    DatasetCatalog.remove("source"), MetadataCatalog.remove("source")
    if not masks:
        for x in (x for entry in sources[0].dicts for x in entry["annotations"]):
            del x["segmentation"]
    write_yolo(sources, tmp_path, copy=True)
    path, listed = tmp_path / "data.yaml", tmp_path / "list.txt"
    listed.write_text("".join(f"./images/source/{x.name} \n" for x in sorted(images.iterdir())))
    path.write_text(path.read_text().replace("- images/source", "- list.txt"))
    cfg = config("MODEL.MASK_ON", masks)
    cfg.DATASETS.YOLO_FORMAT = (("fuzzed", str(path), "train"),)
    files = [path, listed, *tmp_path.rglob("labels/**/*.txt")]
    assert len(files) == 5
    spoil_files(tmp_path, files, cfg, lambda: register_own_sets(cfg))


def test_kitti(tmp_path: Path) -> None:
    LAYOUTS["kitti"](tmp_path, "train", 3, config=SCENE)
    root = tmp_path
    files = [*root.rglob("label_2/*.txt"), *root.rglob("ImageSets/*.txt")]
    cfg = config("MODEL.MASK_ON", False)

    def register() -> None:
        register_kitti("fuzzed", str(root), "train")

    spoil_files(root, files, cfg, register)

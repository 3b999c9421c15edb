"""Test `distill anchors`: the recall of anchors by hand, the search, and the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from detectron2.structures import BoxMode

from distill import cli
from distill.analysis.anchors import (
    box_sizes,
    by_level,
    clustered,
    evolved,
    fitness,
    fits,
    recall,
    section_of,
)
from distill.config import get_distill_cfg
from tests.support.cases import for_each
from tests.support.networks import tiny_cfg, write_config
from tests.support.trainings import trainable_cfg

Shapes = tuple[str, str, str]
SIZES = np.array([[10.0, 20], [40, 20], [100, 100]])
GROUPS = np.array([[12.0, 12], [12, 60], [70, 20], [150, 140]])


def boxes(seed: int, number: int = 200) -> np.ndarray:
    """Sizes near those of :data:`GROUPS`."""
    rng = np.random.default_rng(seed)
    return np.repeat(GROUPS, number // 4, 0) * rng.uniform(0.9, 1.1, (number // 4 * 4, 2))


# ---- How well anchors fit


def test_fits_by_hand() -> None:
    """The smallest ratio of the sides, for the best anchor."""
    anchors = np.array([[20.0, 20], [25, 100]])
    np.testing.assert_allclose(fits(SIZES, anchors), [0.5, 0.5, 0.25])
    assert recall(SIZES, anchors, 4) == pytest.approx(2 / 3)  # a factor of 4 does not fit
    assert recall(SIZES, anchors, 4.01) == 1
    assert fitness(SIZES, anchors, 4) == pytest.approx(1 / 3)
    assert fitness(SIZES, anchors, 4.01) == pytest.approx(1.25 / 3)


def test_fits_are_those_of_the_literal_form() -> None:
    sizes, anchors = boxes(0), boxes(1)[::23]
    ratios = sizes[:, None] / anchors
    expected = np.minimum(ratios, 1 / ratios).min(2).max(1)
    np.testing.assert_allclose(fits(sizes, anchors), expected)
    np.testing.assert_allclose(fits(anchors, anchors), 1)


# ---- The search


def test_clusters_are_the_groups() -> None:
    found = clustered(boxes(0), 4, np.random.default_rng(0))
    np.testing.assert_allclose(found[np.argsort(found.prod(1))], GROUPS[[0, 1, 2, 3]], rtol=0.05)


def test_changes_never_fit_worse_and_depend_on_the_seed_only() -> None:
    sizes = boxes(0)
    start = clustered(sizes, 3, np.random.default_rng(0))
    found = [evolved(sizes, start, 4, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert fitness(sizes, found[0], 4) > fitness(sizes, start, 4)
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


@pytest.mark.parametrize("number", [1, 5, 40])
def test_boxes_of_one_size(number: int) -> None:
    sizes = np.full((number, 2), 30.0)
    found = clustered(sizes, 9, np.random.default_rng(0))
    assert found.shape == (9, 2)
    np.testing.assert_allclose(found, 30)


def test_anchors_grow_over_the_levels() -> None:
    anchors = np.array([[90.4, 80.0], [0.2, 5], [30, 12.4], [11, 30]])
    assert by_level(anchors, 2) == [[[1, 5], [11, 30]], [[30, 12], [90, 80]]]


# ---- Boxes of a training


def entry(*annotations: Any, height: int = 100, width: int = 200) -> dict[str, Any]:
    return {"height": height, "width": width, "annotations": annotations}


def annotation(*bbox: float, mode: BoxMode = BoxMode.XYWH_ABS, crowd: int = 0) -> dict[str, Any]:
    return {"bbox": list(bbox), "bbox_mode": mode, "iscrowd": crowd}


def sizes_of(*dicts: dict[str, Any], **keys: Any) -> np.ndarray:
    node = get_distill_cfg()
    for key, value in {"MIN_SIZE_TRAIN": (50,), "MAX_SIZE_TRAIN": 1000, **keys}.items():
        node.INPUT[key] = value
    return box_sizes(node, dicts, np.random.default_rng(0))


def test_boxes_have_the_size_of_training_images() -> None:
    image = entry(annotation(0, 0, 20, 10), annotation(10, 10, 30, 20, mode=BoxMode.XYXY_ABS))
    np.testing.assert_allclose(sizes_of(image), [[10, 5], [10, 5]])
    np.testing.assert_allclose(sizes_of(image, MAX_SIZE_TRAIN=50), [[5, 2.5], [5, 2.5]])
    np.testing.assert_allclose(sizes_of(image, MIN_SIZE_TRAIN=(0,)), [[20, 10], [20, 10]])
    drawn = sizes_of(*[image] * 50, MIN_SIZE_TRAIN=(50, 100))
    assert set(drawn[:, 0]) == {10, 20}
    drawn = sizes_of(*[image] * 50, MIN_SIZE_TRAIN=(50, 100), MIN_SIZE_TRAIN_SAMPLING="range")
    assert len({*drawn[:, 0]}) > 20 and drawn.min() >= 5 and drawn[:, 0].max() <= 20


def test_images_without_boxes_and_crowds() -> None:
    assert sizes_of().shape == sizes_of(entry()).shape == (0, 2)
    assert sizes_of({"height": 9, "width": 9}).shape == (0, 2)
    assert len(sizes_of(entry(annotation(0, 0, 9, 9, crowd=1), annotation(0, 0, 0, 9)))) == 0


# ---- The command


def run(
    folder: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str], *arguments: str, **keys: Any
) -> str:
    """Return stdout of the command on the shapes data."""
    cfg = trainable_cfg("yolov5", shapes, folder, **keys)
    path = write_config(cfg, folder / "config.yaml")
    assert cli.main(["anchors", "--config-file", str(path), *arguments]) == 0
    return capsys.readouterr().out


def test_the_command_prints_yaml(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(tmp_path, shapes, capsys)
    assert "boxes of 6 images" in out
    rows = {line.split()[0]: line.split()[1] for line in out.splitlines() if "%" in line}
    percent = {name: float(share.removesuffix("%")) for name, share in rows.items()}
    assert percent["new"] >= percent["config"] and percent["new"] > 95
    content = yaml.safe_load(out[out.index("MODEL:") :])
    anchors = content["MODEL"]["YOLOV5"]["ANCHORS"]
    assert [len(level) for level in anchors] == [3, 3, 3]
    areas = [w * h for level in anchors for w, h in level]
    assert areas == sorted(areas)
    assert run(tmp_path, shapes, capsys) == out
    assert run(tmp_path, shapes, capsys, "--seed", "1") != out


@for_each("family, expected", [("yolov7", "YOLOV7"), ("yolov5", "YOLOV5"), ("faster", "YOLOV5")])
def test_the_section_of_the_anchors(family: str, expected: str) -> None:
    """It is the student's, and YOLOv5's for a detector without anchors of their own."""
    assert section_of(tiny_cfg(family)) == expected


def test_the_command_names_the_section(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = trainable_cfg("yolov7", shapes, tmp_path)
    path = write_config(cfg, tmp_path / "config.yaml")
    assert cli.main(["anchors", "--config-file", str(path)]) == 0
    out = capsys.readouterr().out
    anchors = yaml.safe_load(out[out.index("MODEL:") :])["MODEL"]["YOLOV7"]["ANCHORS"]
    assert [len(level) for level in anchors] == [3, 3, 3]


def test_anchors_that_fit_are_kept(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(tmp_path, shapes, capsys)
    anchors = yaml.safe_load(out[out.index("MODEL:") :])["MODEL"]["YOLOV5"]["ANCHORS"]
    out = run(tmp_path, shapes, capsys, "MODEL.YOLOV5.ANCHORS", str(anchors))
    assert "fit this data well enough" in out


def test_a_training_set_without_boxes(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(Path(shapes[1]).read_text())
    content["annotations"] = []
    (tmp_path / "a.json").write_text(json.dumps(content))
    cfg = trainable_cfg("yolov5", ("no_boxes", str(tmp_path / "a.json"), shapes[2]), tmp_path)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    path = write_config(cfg, tmp_path / "config.yaml")
    assert cli.main(["anchors", "--config-file", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no boxes of 2 pixels; name a training set" in line

"""Test that `distill check-data` lists all issues at once, for any content of the files."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill import cli
from tests.support.networks import write_config
from tests.support.processes import call, starts_processes
from tests.support.trainings import trainable_cfg

Shapes = tuple[str, str, str]


@pytest.fixture
def config(shapes: Shapes, tmp_path: Path) -> Path:
    """Write a config with one training set: a copy of six images that a test may damage."""
    images = tmp_path / "images"
    images.mkdir()
    for path in Path(shapes[2]).iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (tmp_path / "a.json").write_text(Path(shapes[1]).read_text())
    triple = (f"own_{tmp_path.name}", str(tmp_path / "a.json"), str(images))
    return write_config(trainable_cfg("mask", triple, tmp_path / "out"), tmp_path / "config.yaml")


def spoil_images(folder: Path) -> dict[str, int]:
    """Make an issue in each of the first four of six images, and count the issues by kind."""
    names = sorted(path.name for path in (folder / "images").iterdir())
    (folder / "images" / names[0]).unlink()
    (folder / "images" / names[1]).write_bytes(b"")
    with Image.open(folder / "images" / names[2]) as image:
        image.resize((9, 9)).save(folder / "images" / names[2])
    with Image.open(folder / "images" / names[3]) as image:
        image.convert("CMYK").save(folder / "images" / names[3])
    kinds = ("missing file", "unreadable image", "size not as annotated", "CMYK")
    return dict.fromkeys(kinds, 1)


def spoil_annotations(folder: Path) -> dict[str, int]:
    content = json.loads((folder / "a.json").read_text())
    first, second, third, *_ = content["annotations"]
    first["bbox"] = [0, 0, 999, 999]
    second["segmentation"] = [[1, 1, 2, 2]]
    third["id"] = 1
    (folder / "a.json").write_text(json.dumps(content))
    kinds = ("box outside its image", "object without a polygon", "duplicate id in annotations")
    return dict.fromkeys(kinds, 1)


def run_json(config: Path, capsys: Any, *args: str) -> tuple[int, dict[str, int]]:
    code = cli.main(["check-data", "--config-file", str(config), "--json", "--workers", "0", *args])
    found: dict[str, int] = {}
    for issue in json.loads(capsys.readouterr().out):
        found[issue["kind"]] = found.get(issue["kind"], 0) + 1
    return code, found


@pytest.mark.e2e
def test_a_sound_data_set(config: Path, capsys: Any) -> None:
    assert run_json(config, capsys) == (0, {})
    assert cli.main(["check-data", "--config-file", str(config)]) == 0
    assert "0 fatal issues, 0 remarks" in capsys.readouterr().out


def test_everything_at_once(config: Path, capsys: Any) -> None:
    """Images are opened although detectron2 cannot read the annotations."""
    expected = spoil_images(config.parent) | spoil_annotations(config.parent)
    assert run_json(config, capsys) == (1, expected)


def test_without_opening_images(config: Path, capsys: Any) -> None:
    spoil_images(config.parent)
    assert run_json(config, capsys, "--no-images") == (1, {"missing file": 1})


def test_remarks_are_not_fatal(config: Path, capsys: Any) -> None:
    spoil_images(config.parent)
    kept = {f"{k:012d}.jpg" for k in (3, 4, 5)}
    content = json.loads((config.parent / "a.json").read_text())
    content["images"] = [x for x in content["images"] if x["file_name"] in kept]
    gone = [x for x in content["annotations"] if x["image_id"] <= 3]
    (config.parent / "a.json").write_text(json.dumps(content))
    assert run_json(config, capsys) == (0, {"CMYK": 1, "unknown image": len(gone)})


def test_the_config_has_to_fit(config: Path, capsys: Any) -> None:
    code, found = run_json(config, capsys, "MODEL.ROI_HEADS.NUM_CLASSES", "7")
    assert code == 1 and list(found) == ["class beyond the config's number"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"images": 3, "categories": 1}', "\0"])
def test_annotation_files_of_any_content(text: str, config: Path, capsys: Any) -> None:
    (config.parent / "a.json").write_text(text)
    code, found = run_json(config, capsys)
    assert code == 1 and found


def test_a_path_that_leads_out_is_not_opened(config: Path, capsys: Any) -> None:
    (config.parent / "secret.jpg").write_text("no image")
    content = json.loads((config.parent / "a.json").read_text())
    content["images"][0]["file_name"] = "../secret.jpg"
    content["images"][1]["file_name"] = "\ud800.jpg"  # half of a character
    (config.parent / "a.json").write_text(json.dumps(content))
    expected = {"path out of the folder": 1, "missing file": 1}
    assert run_json(config, capsys) == (1, expected)
    assert cli.main(["check-data", "--config-file", str(config), "--workers", "0"]) == 1
    assert "\\ud800.jpg" in capsys.readouterr().out


@pytest.mark.parametrize(
    "opts, word",
    [
        (["SOLVR.MAX_ITER", "3"], "SOLVR"),
        (["DATASETS.TRAIN", "('nowhere',)"], "DATASETS.TRAIN"),
        (["DATASETS.COCO_FORMAT", "(('a', 'b.json', '.'),)"], "b.json"),
    ],
)
def test_a_wrong_config(opts: list[str], word: str, config: Path, capsys: Any) -> None:
    assert cli.main(["check-data", "--config-file", str(config), *opts]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and word in line


@starts_processes
def test_the_table_in_a_process_of_its_own(config: Path, tmp_path: Path) -> None:
    expected = spoil_images(config.parent) | {"box outside its image": 1}
    content = json.loads((config.parent / "a.json").read_text())
    content["annotations"][0]["bbox"] = [0, 0, 999, 999]
    (config.parent / "a.json").write_text(json.dumps(content))
    argv = ["check-data", "--config-file", str(config), "--workers", "2"]
    done = call(cli.main, argv, folder=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert all(kind in done.stdout for kind in expected)
    assert "4 fatal issues, 1 remarks" in done.stdout
    assert "000000000000.jpg" in done.stdout and "there is no such file" in done.stdout

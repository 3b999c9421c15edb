"""``distill export`` and ``distill predict``, from the folder of a training to predictions."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from distill import cli
from distill.export import predict
from distill.export.predict import (
    Network,
    PredictionFolder,
    class_names,
    folder_images,
    inputs_of,
    load_network,
)
from distill.export.runner import Prediction, Predictor
from distill.utils.progress import Progress
from tests.export.test_runner import HOSTILE, prediction
from tests.support.cases import for_each
from tests.support.exports import confident, exported, parity_of, scene, student_folder
from tests.support.networks import tiny_cfg

ROOT = Path(__file__).parents[2]
LEVELS = ("MODEL.ATSS.IN_FEATURES", ["p4", "p5"])  # fewer levels are exported sooner


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    scene(0, 60, 90).save(folder / "a.png")
    scene(1, 64, 64).save(folder / "more" / "<img src=x onerror=alert(1)>.jpg")
    return folder


def written(out: Path) -> dict[str, Any]:
    return json.loads((out / "predictions.json").read_text())


# ---- Both commands.


@pytest.mark.slow
def test_a_student_is_exported_and_predicts(images: Path, tmp_path: Path) -> None:
    classes = "circle", HOSTILE, "star"
    student, out = student_folder("atss", tmp_path / "student", classes), tmp_path / "out"
    options = ["--format", "torchscript", "--image-folder", str(images), "--images", "5"]
    assert cli.main(["export", str(student), *options]) == 0
    report = json.loads((student / "student.json").read_text())
    assert report["parity"]["images"] == 2 and report["parity"]["detections"] > 10
    assert report["info"]["thing_classes"] == list(classes)
    assert sorted(x.name for x in student.glob("student.*")) == [
        "student.json",
        "student.ts",
        "student.yaml",
    ]
    networks = str(student), str(student / "student.ts")
    for network in networks:
        assert cli.main(["predict", network, str(images), "--out", str(out / network[-2:])]) == 0
    first, second = (written(out / x[-2:]) for x in networks)
    assert len(first["annotations"]) > 10
    for a, b in zip(first["annotations"], second["annotations"], strict=True):
        assert a["category_id"] == b["category_id"]
        assert np.allclose(a["bbox"], b["bbox"], atol=0.01)
    assert second["categories"][1]["name"] == HOSTILE
    page = (out / "ts" / "index.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    drawn = re.findall(r'src="([^"]+)"', page)
    assert drawn == ["000001-a.jpg", "000002-_img_src_x_onerror_alert_1_.jpg"]
    assert all((out / "ts" / x).is_file() for x in drawn)
    found = COCO(str(out / "ts" / "predictions.json"))
    assert len(found.loadImgs(found.getImgIds())) == 2


@pytest.mark.e2e
@pytest.mark.slow
def test_an_onnx_file_predicts_what_its_network_does(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, cfg = confident("atss", *LEVELS), tiny_cfg("atss", *LEVELS)
    cfg.INPUT.MIN_SIZE_TEST = 0
    files = exported(model, cfg, tmp_path, "onnx")
    parity = parity_of(model, files)
    assert not parity.faults and parity.detections > 10
    image = np.zeros((1, 3, 64, 96), np.float32)
    assert (
        set(files[0](image, (64, 96)))
        > set(files[1](image, (64, 96)))
        == {*("boxes", "scores", "classes")}
    )
    assert files[1].info["opset"] == 20
    run_without_torch(tmp_path / "kept.onnx", tmp_path)


def run_without_torch(file: Path, folder: Path) -> None:
    """Run the example of the documentation, which imports three packages only."""
    page = (ROOT / "docs/how-to/export.md").read_text()
    (example,) = re.findall(r"```python title=\"standalone.py\"\n(.*?)```", page, re.S)
    assert len(example.splitlines()) <= 40
    assert set(re.findall(r"^(?:import|from) (\w+)", example, re.M)) <= {
        "json",
        "sys",
        "numpy",
        "onnxruntime",
        "PIL",
    }
    scene(0, 60, 90).save(folder / "image.png")
    predictor = Predictor.from_onnx(str(file))
    expected = predictor(Image.open(folder / "image.png"))
    code = example.replace("import sys\n", "import sys\nsys.modules['torch'] = None\n", 1)
    script = folder / "standalone.py"
    script.write_text(code)
    command = [sys.executable, str(script), str(file), str(folder / "image.png")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(expected.scores) > 5
    assert lines[0].split()[1] == f"{expected.scores[0]:.3f}"


def test_wrong_folders_are_refused(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "text.ts").write_text("no network")
    for command, message in (
        (["export", tmp_path / "empty"], "has no student.yaml; name the OUTPUT_DIR of a training"),
        (["predict", tmp_path / "none.onnx", images], "none.onnx' does not exist"),
        (["predict", tmp_path / "text.ts", images], "was not written by `distill export`"),
        (["predict", tmp_path / "text.ts", tmp_path / "empty"], "has no images"),
        (["predict", tmp_path / "text.ts", tmp_path / "text.txt"], "neither an image"),
        (["predict", tmp_path / "text.ts", tmp_path / "none"], "none' does not exist"),
        (["export", images, "--out", "student.ts"], "--out 'student.ts' must end with .onnx"),
        (["export", images, "--evaluate", "--postprocessing", "outside"], "needs detections"),
        (["export", images, "--size", "64x"], "is not a size such as"),
    ):
        assert cli.main([str(x) for x in command]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


# ---- Files of predictions.


def predictions(out: Path, classes: list[str], found: Any = prediction) -> PredictionFolder:
    network = Network(lambda image: found(image.height, image.width), classes, [])
    return PredictionFolder(network, out, 0.5)


def test_an_unreadable_image_is_reported(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "b.png").write_bytes(b"\x89PNG broken")
    written_to = predictions(tmp_path / "out", ["cat", HOSTILE])
    for path in folder_images(images):
        written_to.add_image(path)
    written_to.close()
    assert "b.png' cannot be read" in capsys.readouterr().err
    assert written_to.failed == 1 and "1 files could not be read" in written_to.summary
    content = written(tmp_path / "out")
    assert [x["id"] for x in content["images"]] == [1, 2]
    assert [x["id"] for x in content["annotations"]] == [1, 2, 3, 4]
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": HOSTILE}]


def test_an_image_without_objects(tmp_path: Path) -> None:
    def nothing(height: int, width: int) -> Prediction:
        return Prediction((height, width), np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))

    scene(0, 30, 40).save(tmp_path / "a.png")
    empty = predictions(tmp_path / "out", [], nothing)
    empty.add_image(tmp_path / "a.png")
    empty.close()
    assert written(tmp_path / "out")["annotations"] == []
    assert (tmp_path / "out" / "000001-a.jpg").is_file()


def test_classes_and_segments_are_png_files(tmp_path: Path) -> None:
    def semantic(height: int, width: int) -> Prediction:
        found = prediction(height, width)
        found.sem_seg = np.zeros((3, height, width))
        found.sem_seg[2, :, 5:] = 1
        return found

    def panoptic(height: int, width: int) -> Prediction:
        found = semantic(height, width)
        found.segments = np.full((height, width), 300)
        found.segments_info = [{"id": 300, "isthing": True, "category_id": 0, "score": 0.5}]
        return found

    scene(0, 30, 40).save(tmp_path / "a.png")
    for kind, found in (("classes", semantic), ("segments", panoptic)):
        files = predictions(tmp_path / kind, ["cat", "dog"], found)
        files.add_image(tmp_path / "a.png")
        pixels = np.asarray(Image.open(tmp_path / kind / f"000001-{kind}.png"))
        assert np.array_equal(np.unique(pixels), [0, 2] if kind == "classes" else [300])
    assert files.images[0]["segments_info"][0]["id"] == 300


def test_a_video_is_predicted_frame_by_frame(tmp_path: Path) -> None:
    codec = cv2.VideoWriter.fourcc(*"MJPG")
    video = cv2.VideoWriter(str(tmp_path / "clip.avi"), codec, 10, (40, 30))
    for k in range(3):
        video.write(np.full((30, 40, 3), 60 * k, np.uint8))
    video.release()
    files = predictions(tmp_path / "out", ["cat", "dog"])
    assert inputs_of([tmp_path / "clip.avi"]) == ([], [tmp_path / "clip.avi"])
    with Progress() as progress:
        files.add_video(tmp_path / "clip.avi", progress)
        (tmp_path / "torn.mp4").write_bytes(b"no video")
        with pytest.raises(predict.DataError, match="has no frame that OpenCV can read"):
            files.add_video(tmp_path / "torn.mp4", progress)
    assert [x["frame"] for x in files.images] == [0, 1, 2]
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "000001-clip.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and drawn.get(cv2.CAP_PROP_FPS) == 10


def test_supervision_draws_if_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[str] = []

    class Annotator:
        def annotate(self, scene: Any, detections: Any, texts: Any = ()) -> Any:
            labels.extend(texts)
            return scene

    fake = types.ModuleType("supervision")
    for name in ("MaskAnnotator", "BoxAnnotator", "LabelAnnotator"):
        setattr(fake, name, Annotator)
    fake.Detections = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "supervision", fake)
    monkeypatch.setattr(predict, "find_spec", lambda name: fake)
    scene(0, 30, 40).save(tmp_path / "a.png")
    predictions(tmp_path / "out", ["cat", "dog"]).add_image(tmp_path / "a.png")
    assert labels == ["dog 0.90"]  # the other one has a smaller score


@for_each("names, expected", [(["a", "b", "c"], ["a", "b", "c"]), (["a"], ["a", "class 1"])])
def test_missing_class_names_are_numbers(names: list[str], expected: list[str]) -> None:
    assert class_names(names, 2) == expected


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(predict.ConfigError, match="needs the package onnxruntime: pip install"):
        load_network(tmp_path / "model.onnx")

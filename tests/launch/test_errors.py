"""A mistake of the user ends before training: exit code 2 and one line that says what to change."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils import comm

from tests.support.trainings import Run

ROOT = Path(__file__).resolve().parents[2]
Shapes = tuple[str, str, str]


@pytest.fixture
def run(tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    yield Run(tmp_path, shapes, capsys)
    for name in ("detectron2", "fvcore", "distill"):  # each run adds handlers on its own stdout
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


@pytest.mark.e2e
def test_the_unspoilt_run_trains(run: Run) -> None:
    assert run() == 0
    assert (run.output / "model_final.pth").is_file()


OVERRIDES: dict[str, tuple[list[str], list[str]]] = {
    "misspelt key": (["SOLVER.MAXITER", "3"], ["'SOLVER.MAXITER'", "command line", "MAX_ITER"]),
    "misspelt section": (["SOLVR.MAX_ITER", "3"], ["'SOLVR.MAX_ITER'", "SOLVER"]),
    "key below a value": (["SEED.X", "3"], ["'SEED.X'", "no key below it"]),
    "no value": (["SOLVER.MAX_ITER"], ["'SOLVER.MAX_ITER' has no value"]),
    "option behind overrides": (["SEED", "1", "--resume"], ["--resume must stand before"]),
    "wrong type": (["SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER many", "int"]),
    "value for a section": (["SOLVER", "3"], ["'SOLVER'", "section", "BASE_LR"]),
    "misspelt head": (["MODEL.DISTILL.HEADS", "('IMAA',)"], ["MODEL.DISTILL.HEADS", "mean IMA?"]),
    "heads as a string": (
        ["MODEL.DISTILL.HEADS", "IMA"],
        ["MODEL.DISTILL.HEADS IMA", "tuple", '("IMA",)'],
    ),
    "a head in small letters": (["MODEL.DISTILL.HEADS", "('ima',)"], ["mean IMA?"]),
    "a section as the head is spelt": (
        *(
            ["MODEL.DISTILL.FitNet.WEIGHT", "1.0"],
            ["'MODEL.DISTILL.FitNet.WEIGHT'", "has: FITNET,"],
        ),
    ),
    "head of another family": (
        ["MODEL.DISTILL.HEADS", "('MaskLogitKD',)"],
        ["HEADS: MaskLogitKD", "FitNet"],
    ),
    "misspelt architecture": (
        *(["MODEL.META_ARCHITECTURE", "DistilRCNN"],),
        *(["MODEL.META_ARCHITECTURE", "mean DistillRCNN?"],),
    ),
    "misspelt student": (
        *(["MODEL.DISTILL.STUDENT_ARCHITECTURE", "GeneralRCNN"],),
        *(["MODEL.DISTILL.STUDENT_ARCHITECTURE", "GeneralizedRCNN?"],),
    ),
    "architecture of another family": (
        *(["MODEL.META_ARCHITECTURE", "DistillRetinaNet", "MODEL.ROI_HEADS.NUM_CLASSES", "80"],),
        *(["MODEL.META_ARCHITECTURE DistillRetinaNet", "MODEL.DISTILL.STUDENT_ARCHITECTURE"],),
    ),
    "misspelt optimizer": (["SOLVER.OPTIMIZER", "ADAM"], ["SOLVER.OPTIMIZER", "ADAMW"]),
    "unknown training set": (
        ["DATASETS.TRAIN", "('coco_2071_train',)"],
        ["DATASETS.TRAIN", "2017"],
    ),
    "unknown test set": (["DATASETS.TEST", "('shape_tiny',)"], ["DATASETS.TEST", "shapes_tiny"]),
    "no training set": (["DATASETS.TRAIN", "()"], ["DATASETS.TRAIN is empty"]),
    "no evaluator": (
        ["DATASETS.TEST", "('cityscapes_fine_panoptic_val',)"],
        ["DATASETS.TEST 'cityscapes_fine_panoptic_val'", "coco"],
    ),
    "data set not there": (
        *(["DATASETS.TRAIN", "('coco_2014_minival',)"],),
        *(["'coco_2014_minival'", "no such file", "DETECTRON2_DATASETS"],),
    ),
    "no images per step": (["SOLVER.IMS_PER_BATCH", "0"], ["SOLVER.IMS_PER_BATCH is 0"]),
    "no steps": (["SOLVER.MAX_ITER", "0"], ["SOLVER.MAX_ITER is 0"]),
    "a head twice": (["MODEL.DISTILL.HEADS", "('IMA', 'IMA')"], ["MODEL.DISTILL.HEADS", "twice"]),
    "negative box weight": (
        ["MODEL.DISTILL.HEADS", "('ROIKD',)", "MODEL.DISTILL.ROIKD.BOX_WEIGHT", "-1.0"],
        ["MODEL.DISTILL.ROIKD.BOX_WEIGHT is -1.0"],
    ),
    "negative weight": (["MODEL.DISTILL.IMA.WEIGHT", "-1.0"], ["MODEL.DISTILL.IMA.WEIGHT is -1.0"]),
    "temperature 0": (
        *(["MODEL.DISTILL.ROIKD.TEMPERATURE", "0.0"],),
        *(["MODEL.DISTILL.ROIKD.TEMPERATURE is 0.0", "above 0"],),
    ),
    "mask ratio 1": (["MODEL.DISTILL.IMA.MASK_RATIO", "1.0"], ["IMA.MASK_RATIO is 1.0", "[0, 1)"]),
    "scale floor 2": (["MODEL.DISTILL.IMA.SCALE_FLOOR", "2.0"], ["IMA.SCALE_FLOOR is 2.0"]),
    "no share of points": (
        ["MODEL.DISTILL.HEADS", "('TID',)", "MODEL.DISTILL.TID.GAMMA", "0.0"],
        ["TID.GAMMA is 0.0", "(0, 1]"],
    ),
    "misspelt area": (
        ["MODEL.DISTILL.HEADS", "('TID',)", "MODEL.DISTILL.TID.AREA", "keys"],
        ["TID.AREA", "did you mean key?"],
    ),
    "negative alpha": (
        ["MODEL.DISTILL.HEADS", "('TID',)", "MODEL.DISTILL.TID.ALPHA_LOW", "-1.0"],
        ["TID.ALPHA_LOW is -1.0"],
    ),
    "half a cell": (
        ["MODEL.DISTILL.HEADS", "('MKD',)", "MODEL.DISTILL.MKD.SCALES", "(0.5,)"],
        ["MKD.SCALES", "whole numbers"],
    ),
    "everything masked": (
        ["MODEL.DISTILL.HEADS", "('MKD',)", "MODEL.DISTILL.MKD.MASK_RATIO", "1.0"],
        ["MKD.MASK_RATIO is 1.0", "[0, 1)"],
    ),
    "a point for a mask": (
        ["MODEL.DISTILL.HEADS", "('MSSD',)", "MODEL.DISTILL.MSSD.SIGMA2", "0.0"],
        ["MSSD.SIGMA2 is 0.0", "above 0"],
    ),
    "a neck without shallow maps": (
        ["MODEL.DISTILL.HEADS", "('MSSD',)"],
        ["MSSD does not work here", "MODEL.BACKBONE.NAME", "pafpn"],
    ),
    "no term left": (
        [
            *("MODEL.DISTILL.HEADS", "('MKD',)", "MODEL.DISTILL.MKD.FEA_WEIGHT", "0.0"),
            *("MODEL.DISTILL.MKD.MULTISCALE_WEIGHT", "0.0", "MODEL.DISTILL.MKD.FDMD_WEIGHT", "0.0"),
            *("MODEL.DISTILL.MKD.FAD_WEIGHT", "0.0"),
        ],
        ["FEA_WEIGHT", "all 0", "WEIGHT 0.0 to switch the head off"],
    ),
    "classes without semantic labels": (
        ["MODEL.DISTILL.IMA.SCOPE", "class"],
        ["IMA.SCOPE is class", "semantic labels"],
    ),
    "misspelt scope": (["MODEL.DISTILL.IMA.SCOPE", "boxes"], ["IMA.SCOPE", "did you mean box?"]),
    "masks without masks": (["MODEL.DISTILL.IMA.SCOPE", "mask"], ["IMA.SCOPE", "MODEL.MASK_ON"]),
    "unknown level of a head": (
        ["MODEL.DISTILL.IMA.IN_FEATURES", "('p9',)"],
        ["IN_FEATURES", "p9"],
    ),
    "unknown level of the RPN": (
        ["MODEL.RPN.IN_FEATURES", "['p9']"],
        ["student", "p9", "in_features"],
    ),
    "unknown backbone": (["MODEL.BACKBONE.NAME", "resnet"], ["student", "resnet", "BACKBONE"]),
    "no teacher": (["MODEL.DISTILL.TEACHER.CONFIG_FILE", ""], ["TEACHER.CONFIG_FILE is empty"]),
    "misspelt teacher": (
        *(["MODEL.DISTILL.TEACHER.CONFIG_FILE", "COCO-Detection/faster_R_101.yaml"],),
        *(["MODEL.DISTILL.TEACHER.CONFIG_FILE", "model zoo"],),
    ),
    "misspelt key of the teacher": (
        *(["MODEL.DISTILL.TEACHER.OPTS", "['MODEL.FPN.OUT', 3]"],),
        *(["'MODEL.FPN.OUT'", "MODEL.DISTILL.TEACHER.OPTS", "OUT_CHANNELS"],),
    ),
    "teacher's backbone": (
        *(["MODEL.DISTILL.TEACHER.OPTS", "['MODEL.RESNETS.DEPTH', 11]"],),
        *(["teacher", "MODEL.RESNETS.DEPTH is 11"],),
    ),
    "teacher's class names": (
        *(["MODEL.DISTILL.TEACHER.CLASSES", "('circle', 'star')"],),
        *(["MODEL.DISTILL.TEACHER.CLASSES lists 2", "8"],),
    ),
    "student's weights not there": (["MODEL.WEIGHTS", "R-18.pkl"], ["MODEL.WEIGHTS", "'R-18.pkl'"]),
    "triple without brackets": (
        ["DATASETS.COCO_FORMAT", "('a', 'b', 'c')"],
        ["COCO_FORMAT", "'a'"],
    ),
    "pair for a triple": (["DATASETS.COCO_FORMAT", "(('a', 'b'),)"], ["COCO_FORMAT", "('a', 'b')"]),
    "numbers in a triple": (["DATASETS.COCO_FORMAT", "(('a', 1, 2),)"], ["COCO_FORMAT", "triple"]),
    "no annotation file": (
        ["DATASETS.COCO_FORMAT", "(('a', 'b.json', '.'),)"],
        ["'a'", "'b.json'"],
    ),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override(name: str, run: Run) -> None:
    opts, words = OVERRIDES[name]
    line = run.fails(*opts)
    assert all(word in line for word in words), line


def test_there_is_no_config_file(run: Run) -> None:
    run.config = run.folder / "misspelt.yaml"
    assert str(run.config) in run.fails()


@pytest.mark.parametrize("base", [False, True], ids=["file", "base"])
@pytest.mark.parametrize(
    "text, words",
    [
        ("SOLVER: {MAXITER: 3}", ["'SOLVER.MAXITER'", "MAX_ITER"]),
        ("SOLVER: {MAX_ITER: many}", ["SOLVER.MAX_ITER", "int"]),
        ("SOLVER: 3", ["'SOLVER'", "is a section"]),
        ("SOLVER: {MAX_ITER: 3", ["yaml", "spoilt.yaml"]),
        ("", ["mapping"]),
        ("- SOLVER", ["mapping"]),
        ("SEED: !!python/object/apply:os.system ['touch executed']", ["safe yaml", "spoilt.yaml"]),
        ("SEED: !!python/name:os.system", ["safe yaml", "spoilt.yaml"]),
        ("_BASE_: nowhere.yaml", ["nowhere.yaml"]),
        ("_BASE_: https://example.org/x.yaml", ["https://example.org/x.yaml", "is no file"]),
        ("_BASE_: spoilt.yaml", ["_BASE_", "leads back to itself"]),
    ],
)
def test_a_config_file(
    text: str, words: list[str], base: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.folder)
    run.config = run.folder / "spoilt.yaml"
    run.config.write_text(text)
    if base:
        run.config = run.folder / "outer.yaml"
        run.config.write_text("_BASE_: spoilt.yaml\nSEED: 1\n")
    line = run.fails()
    assert all(word in line for word in [*words, run.config.name]), line
    assert not (run.folder / "executed").exists()


def test_the_teachers_config_is_read_as_safe_yaml_too(run: Run, tmp_path: Path) -> None:
    text = f"SEED: !!python/object/apply:os.system ['touch {tmp_path}/executed']"
    (run.folder / "teacher.yaml").write_text(text)
    assert "teacher.yaml" in run.fails() and not (tmp_path / "executed").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


TEACHER_FILES: dict[str, tuple[Callable[[Run], Any], str]] = {
    "missing": (lambda run: run.teacher.unlink(), "no file"),
    "truncated": (lambda run: truncate(run.teacher), "truncated"),
    "empty": (lambda run: run.teacher.write_bytes(b""), "truncated"),
    "text": (lambda run: run.teacher.write_text("version https://git-lfs"), "another format"),
    "a tensor": (lambda run: torch.save(torch.ones(3), run.teacher), "another format"),
    "a folder": (lambda run: (run.teacher.unlink(), run.teacher.mkdir()), "no file"),
}


@pytest.mark.parametrize("name", TEACHER_FILES)
def test_a_teacher_file(name: str, run: Run) -> None:
    spoil, reason = TEACHER_FILES[name]
    spoil(run)
    line = run.fails()
    assert "MODEL.DISTILL.TEACHER.WEIGHTS" in line and str(run.teacher) in line and reason in line


@pytest.mark.parametrize(
    "family, opts, reason",
    [
        ("faster", {"fpn": 8}, "backbone.fpn_lateral2.weight has shape (8, 8, 1, 1) where (16,"),
        ("retinanet", {}, "proposal_generator.rpn_head.conv.weight is missing"),
    ],
    ids=["width", "architecture"],
)
def test_a_teacher_file_of_another_network(
    family: str, opts: dict[str, Any], reason: str, run: Run
) -> None:
    config = (run.folder / "teacher.yaml").read_text()
    run.write_teacher(family, **opts)
    (run.folder / "teacher.yaml").write_text(config)
    line = run.fails()
    assert "MODEL.DISTILL.TEACHER.WEIGHTS" in line and "GeneralizedRCNN" in line and reason in line


def test_a_teacher_file_of_other_classes(run: Run) -> None:
    config = (run.folder / "teacher.yaml").read_text()
    run.write_teacher("faster", "MODEL.ROI_HEADS.NUM_CLASSES", 5)
    (run.folder / "teacher.yaml").write_text(config)
    line = run.fails()
    assert "box_predictor.cls_score.weight has shape (6, 16) where (9, 16)" in line


@pytest.mark.e2e
def test_a_teacher_of_other_classes(run: Run) -> None:
    """Its predictions cannot be compared without their names; its features can."""
    run.write_teacher("faster", "MODEL.ROI_HEADS.NUM_CLASSES", 5)
    line = run.fails()
    assert "ROIKD" in line and "MODEL.DISTILL.TEACHER.CLASSES" in line and "IMA" in line
    assert run("MODEL.DISTILL.HEADS", "('IMA',)") == 0


def test_a_teacher_of_other_channels(run: Run) -> None:
    run.write_teacher("faster", "INPUT.FORMAT", "YUV-BT.601")
    line = run.fails()
    assert "INPUT.FORMAT YUV-BT.601" in line and "BGR" in line


def of_first(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Change keys of the first annotation; None removes one."""

    def change(content: dict[str, Any]) -> None:
        annotation = content["annotations"][0]
        annotation.update(values)
        for key in [k for k, v in values.items() if v is None]:
            del annotation[key]

    return change


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.pop(key)


ANNOTATIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str], list[str]]] = {
    "no images": (lambda c: c.update(images=[], annotations=[]), [], ["has no images"]),
    "no annotations": (lambda c: c.update(annotations=[]), [], ["FILTER_EMPTY_ANNOTATIONS False"]),
    "no list of images": (without("images"), [], ["has no images"]),
    "no list of annotations": (without("annotations"), [], ["FILTER_EMPTY_ANNOTATIONS"]),
    "no list of classes": (without("categories"), [], ["COCO's", "categories"]),
    "image without height": (lambda c: c["images"][0].pop("height"), [], ["height"]),
    "image not there": (lambda c: c["images"][0].update(file_name="x.jpg"), [], ["x.jpg"]),
    "box outside": (
        of_first(bbox=[50, 50, 30, 30]),
        [],
        ["outside", ".jpg (annotation 1)", "[50, 50", "DATALOADER.ON_BAD_IMAGE drop"],
    ),
    "box left of the image": (of_first(bbox=[-11, 0, 20, 20]), [], ["outside", ".jpg"]),
    "box of negative size": (of_first(bbox=[20, 20, -9, 9]), [], ["negative size", ".jpg"]),
    "box of infinite size": (of_first(bbox=[2, 2, float("inf"), 9]), [], ["not finite", ".jpg"]),
    "box that is no number": (of_first(bbox=[2, 2, float("nan"), 9]), [], ["not finite", ".jpg"]),
    "no box": (of_first(bbox=None), [], [".jpg (annotation 1)", "no box"]),
    "unknown class": (of_first(category_id=77), [], ["category_id=77"]),
    "class beyond the config": (
        lambda c: [a.update(category_id=8) for a in c["annotations"]],
        ["MODEL.ROI_HEADS.NUM_CLASSES", "7"],
        ["class index 7", ".jpg", "MODEL.ROI_HEADS.NUM_CLASSES", "`distill check-data"],
    ),
    "two annotations of one id": (
        lambda c: c["annotations"][1].update(id=c["annotations"][0]["id"]),
        [],
        ["annotations[1]", "id 1 is already taken"],
    ),
    "two images of one id": (
        lambda c: c["images"][1].update(id=c["images"][0]["id"]),
        [],
        ["images[1]", "id 1 is already taken"],
    ),
    "image outside the folder": (
        lambda c: c["images"][0].update(file_name="../../secret.jpg"),
        [],
        ["secret.jpg", "leads out of the folder"],
    ),
    "an object without a polygon": (
        of_first(segmentation=[[1, 1, 9, 9]]),
        [],
        ["3 points", "trained as background", ".jpg"],
    ),
    "no segmentation": (of_first(segmentation=None), ["MODEL.MASK_ON", "True"], ["MODEL.MASK_ON"]),
}


@pytest.fixture
def spoilt(shapes: Shapes, tmp_path: Path) -> Shapes:
    """The triple of a copy of the annotations under another name."""
    file = tmp_path / "spoilt.json"
    file.write_text(Path(shapes[1]).read_text())
    return (f"spoilt_{tmp_path.name}", str(file), shapes[2])


def sets(triple: Shapes, test: Shapes | None = None) -> list[str]:
    triples = [triple, *([test] if test else [])]
    names = str((test[0],)) if test else "()"
    opts = ["DATASETS.COCO_FORMAT", str(triples), "DATASETS.TRAIN", str((triple[0],))]
    return [*opts, "DATASETS.TEST", names]


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_an_annotation_file(name: str, run: Run, spoilt: Shapes) -> None:
    spoil, opts, words = ANNOTATIONS[name]
    file = Path(spoilt[1])
    content = json.loads(file.read_text())
    spoil(content)
    file.write_text(json.dumps(content))
    line = run.fails(*sets(spoilt), *opts)
    assert all(word in line for word in words), line
    assert spoilt[0] in line or spoilt[1] in line or ".jpg" in line


@pytest.mark.parametrize("test", [False, True], ids=["train", "test"])
@pytest.mark.parametrize(
    "text, reason",
    [("", "not valid JSON"), ('{"images": [', "not valid JSON"), ("[]", "JSON list")],
)
def test_a_file_that_is_not_coco(
    text: str, reason: str, test: bool, run: Run, shapes: Shapes, spoilt: Shapes
) -> None:
    """Also a test set is read before the training."""
    Path(spoilt[1]).write_text(text)
    line = run.fails(*(sets(shapes, spoilt) if test else sets(spoilt)))
    assert spoilt[0] in line and spoilt[1] in line and reason in line


def test_a_test_set_without_images(run: Run, shapes: Shapes, spoilt: Shapes) -> None:
    file = Path(spoilt[1])
    file.write_text(json.dumps({**json.loads(file.read_text()), "images": [], "annotations": []}))
    line = run.fails(*sets(shapes, spoilt))
    assert f"'{spoilt[0]}', {spoilt[1]}: it has no images" in line


def test_the_image_folder_is_missing(run: Run, spoilt: Shapes) -> None:
    line = run.fails(*sets((spoilt[0], spoilt[1], "nowhere")))
    assert "DATASETS.COCO_FORMAT" in line and spoilt[0] in line and "'nowhere'" in line


def test_a_name_for_two_data_sets(run: Run, shapes: Shapes, spoilt: Shapes) -> None:
    assert f"'{shapes[0]}'" in run.fails(*sets((shapes[0], *spoilt[1:])))


def test_training_sets_of_other_classes(run: Run, shapes: Shapes, spoilt: Shapes) -> None:
    file = Path(spoilt[1])
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "hexagon"
    file.write_text(json.dumps(content))
    opts = sets(shapes, spoilt)
    opts[3] = str((shapes[0], spoilt[0]))
    line = run.fails(*opts)
    assert f"DATASETS.TRAIN '{spoilt[0]}' lacks 'circle' and also has 'hexagon'" in line


def test_a_batch_that_the_processes_cannot_share(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    line = run.fails("SOLVER.IMS_PER_BATCH", "3")
    assert "SOLVER.IMS_PER_BATCH is 3" in line and "2 processes" in line


def test_resuming_from_a_truncated_checkpoint(run: Run) -> None:
    run.output.mkdir()
    (run.output / "last_checkpoint").write_text("spoilt.pth")
    (run.output / "spoilt.pth").write_bytes(run.teacher.read_bytes()[:999])
    line = run.fails("--resume")
    assert "--resume" in line and "spoilt.pth" in line


@pytest.mark.parametrize("weights", ["", "nowhere.pth"])
def test_evaluating_without_weights(weights: str, run: Run) -> None:
    assert "MODEL.WEIGHTS" in run.fails("--eval-only", "MODEL.WEIGHTS", weights)


@pytest.mark.e2e
def test_the_tool_prints_nothing_else(run: Run) -> None:
    """In a process of its own, where Python's and torch's warnings would show."""
    run.teacher.unlink()
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file"]
    environment = {**os.environ, "CUDA_HOME": str(run.folder)}  # torch remarks on it without a GPU
    done = subprocess.run(
        [*command, str(run.config)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: MODEL.DISTILL.TEACHER.WEIGHTS") and str(run.teacher) in line

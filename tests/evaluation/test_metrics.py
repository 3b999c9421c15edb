"""Metrics that a config names: they exist, and they are compared with the results."""

import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    COCOPanopticEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.modeling import META_ARCH_REGISTRY

from distill.engine import Trainer
from distill.engine.evaluators import (
    EVALUATOR_REGISTRY,
    check_metric_names,
    check_results,
    metric_names,
)
from distill.errors import ConfigError, ResultsError
from tests.support.networks import tiny_cfg
from tests.support.trainings import Run, Shapes, trainable_cfg

CLASSES = {
    "coco": ("person", "dog"),
    "kitti": (),
    "lvis": (),
    "pascal_voc": (),
    "sem_seg": ("road", "sky"),
    "cityscapes_instance": (),
    "cityscapes_sem_seg": (),
    "coco_panoptic_seg": ("person", "dog"),
}


@pytest.fixture(scope="module")
def sets() -> dict[str, str]:
    """Return the names of a registered set for each type, by type."""
    for kind, classes in CLASSES.items():
        DatasetCatalog.register(f"metrics_{kind}", list)
        own = {"thing_classes": list(classes), "stuff_classes": list(classes)} if classes else {}
        MetadataCatalog.get(f"metrics_{kind}").set(evaluator_type=kind, **own)
    return {kind: f"metrics_{kind}" for kind in CLASSES}


def config(sets: dict[str, str], family: str, *kinds: str, **test: Any) -> CfgNode:
    cfg = tiny_cfg(family, "DATASETS.TEST", tuple(sets[kind] for kind in kinds))
    for key, value in test.items():
        cfg.TEST[key] = value
    return cfg


EXIST = [
    ("faster", ("coco",), "bbox/AP"),
    ("faster", ("coco",), "bbox/AP-person"),
    ("mask", ("coco",), "segm/APs"),
    ("retinanet", ("coco",), "bbox/APl"),
    ("mask", ("coco",), "segm/AR75"),
    ("faster", ("kitti",), "bbox/ARs"),
    ("faster", ("kitti",), "kitti/Car/moderate"),
    ("faster", ("kitti",), "kitti/mAP/hard"),
    ("faster", ("kitti",), "bbox/AP-Cyclist"),
    ("mask", ("lvis",), "segm/APr"),
    ("faster", ("pascal_voc",), "bbox/AP50"),
    ("semantic", ("sem_seg",), "sem_seg/mIoU"),
    ("semantic", ("sem_seg",), "sem_seg/ACC-sky"),
    ("semantic", ("cityscapes_sem_seg",), "sem_seg/mIoU_present"),
    ("semantic", ("cityscapes_sem_seg",), "sem_seg/IoU-traffic light"),
    ("mask", ("cityscapes_instance",), "segm/AP-car"),
    ("panoptic", ("coco_panoptic_seg",), "panoptic_seg/PQ_st"),
    ("faster", ("coco", "kitti"), "metrics_coco/bbox/AP"),
    ("faster", ("coco", "kitti"), "metrics_kitti/kitti/Car/easy"),
]
ABSENT = [
    ("faster", ("coco",), "bbox/AP5", "did you mean bbox/AP75"),
    ("faster", ("coco",), "AP", "Valid: bbox/AP, bbox/AP50, bbox/AP75, "),
    ("faster", ("coco",), "segm/AP", "Valid: bbox/"),
    ("faster", ("coco",), "bbox/AP-persn", "did you mean bbox/AP-person"),
    ("retinanet", ("coco",), "segm/AP", "Valid: bbox/"),
    ("semantic", ("sem_seg",), "sem_seg/IoU", "did you mean sem_seg/mIoU"),
    ("semantic", ("cityscapes_sem_seg",), "sem_seg/mIoU", "Valid: sem_seg/"),
    ("faster", ("coco", "kitti"), "bbox/AP", "metrics_coco/bbox/AP"),
    ("faster", (), "bbox/AP", "DATASETS.TEST is empty; name a test set, or empty this key"),
]


@pytest.mark.parametrize("family, kinds, name", EXIST)
def test_a_metric_that_exists(
    family: str, kinds: tuple[str, ...], name: str, sets: dict[str, str]
) -> None:
    task, _, metric = name.rpartition("/")
    expected = [[task, metric, 40.0, 1.0]]
    check_metric_names(config(sets, family, *kinds, BEST_METRIC=name, EXPECTED_RESULTS=expected))


@pytest.mark.parametrize("family, kinds, name, sentence", ABSENT)
def test_a_metric_that_cannot_exist(
    family: str, kinds: tuple[str, ...], name: str, sentence: str, sets: dict[str, str]
) -> None:
    cfg = config(sets, family, *kinds, BEST_METRIC=name)
    with pytest.raises(ConfigError, match=rf"^TEST\.BEST_METRIC.*{name}") as error:
        check_metric_names(cfg)
    assert sentence in str(error.value) and ("-" in name or "-" not in str(error.value))
    check_metric_names(cfg, training=False)  # which has no best checkpoint


def test_keypoints_have_no_small_objects(sets: dict[str, str]) -> None:
    cfg = config(sets, "faster", "coco")
    cfg.MODEL.KEYPOINT_ON = True
    names = metric_names(cfg) or []
    assert "keypoints/AP" in names and "keypoints/APs" not in names and "bbox/APs" in names
    assert "keypoints/AR" in names and "keypoints/ARs" not in names and "bbox/ARs" in names


def test_augmented_results_can_be_expected(sets: dict[str, str]) -> None:
    cfg = config(sets, "faster", "coco", EXPECTED_RESULTS=[["bbox_TTA", "AP", 40.0, 1.0]])
    with pytest.raises(ConfigError, match=r"EXPECTED_RESULTS: unknown value 'bbox_TTA/AP'"):
        check_metric_names(cfg)
    cfg.TEST.AUG.ENABLED = True
    check_metric_names(cfg)
    cfg.TEST.BEST_METRIC = "bbox_TTA/AP"  # known only at the end
    with pytest.raises(ConfigError, match="BEST_METRIC"):
        check_metric_names(cfg)


def test_metrics_of_a_users_own_evaluator(
    monkeypatch: pytest.MonkeyPatch, sets: dict[str, str]
) -> None:
    monkeypatch.setattr(EVALUATOR_REGISTRY, "_obj_map", {**EVALUATOR_REGISTRY._obj_map})
    MetadataCatalog.get("metrics_counted").evaluator_type = "counted"
    EVALUATOR_REGISTRY._do_register("counted", lambda cfg, name, folder: [])
    cfg = config({**sets, "counted": "metrics_counted"}, "faster", "coco", "counted")
    cfg.TEST.BEST_METRIC = "metrics_counted/boxes/many"
    check_metric_names(cfg)


def test_metrics_of_a_users_own_network(
    monkeypatch: pytest.MonkeyPatch, sets: dict[str, str]
) -> None:
    """Its outputs are unknown, and so are the tasks."""
    monkeypatch.setattr(META_ARCH_REGISTRY, "_obj_map", {**META_ARCH_REGISTRY._obj_map})
    META_ARCH_REGISTRY._do_register("Own", type("Own", (torch.nn.Module,), {}))
    cfg = config(sets, "faster", "coco", BEST_METRIC="segm/AP")
    cfg.MODEL.META_ARCHITECTURE = "Own"
    check_metric_names(cfg)


def test_metrics_of_a_users_own_evaluation(sets: dict[str, str]) -> None:
    class OwnTest(Trainer):
        @classmethod
        def test(cls, cfg: CfgNode, model: Any, evaluators: Any = None) -> Any:
            return {"own": {"metric": 1.0}}

    class OwnHooks(Trainer):
        pass

    cfg = config(sets, "faster", BEST_METRIC="own/metric")
    OwnTest.check_evaluation(cfg)
    with pytest.raises(ConfigError, match="BEST_METRIC"):
        OwnHooks.check_evaluation(cfg)


@pytest.mark.parametrize(
    "evaluator, pattern, kind, task",
    [
        (COCOPanopticEvaluator, r'res\["(\w+)"\] =', "coco_panoptic_seg", "panoptic_seg"),
        (PascalVOCDetectionEvaluator, r'"(AP\d*)":', "pascal_voc", "bbox"),
        (SemSegEvaluator, r'res\["(\w+)"\]', "sem_seg", "sem_seg"),
    ],
)
def test_the_installed_detectron2_has_these_metrics(
    evaluator: type, pattern: str, kind: str, task: str, sets: dict[str, str]
) -> None:
    """The others are compared where they are evaluated."""
    found = {f"{task}/{x}" for x in re.findall(pattern, inspect.getsource(evaluator))}
    names = metric_names(config(sets, "panoptic", kind)) or []
    assert found == {x for x in names if x.startswith(f"{task}/") and "-" not in x}


# ---- Expected results.

RESULTS = {"bbox": {"AP": 39.5, "AP50": 60.0, "APs": math.nan}}
EXPECTED: dict[str, tuple[list[list[Any]], str]] = {
    "met": ([["bbox", "AP", 40.0, 0.5], ["bbox", "AP50", 60.0, 0.0]], ""),
    "missed": ([["bbox", "AP", 40.0, 0.4]], "bbox/AP is 39.5000 instead of 40.0 ± 0.4;"),
    "two missed": (
        [["bbox", "AP", 50.0, 1.0], ["bbox", "AP50", 50.0, 1.0]],
        "bbox/AP is 39.5000 instead of 50.0 ± 1.0, bbox/AP50 is 60.0000 instead of",
    ),
    "no number": ([["bbox", "APs", 10.0, 100.0]], "bbox/APs is nan instead of"),
    "absent": ([["segm", "AP", 10.0, 100.0]], "segm/AP is nan instead of"),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_expected_results(case: str) -> None:
    expected, sentence = EXPECTED[case]
    cfg = tiny_cfg("faster", "TEST.EXPECTED_RESULTS", expected)
    if not sentence:
        return check_results(cfg, RESULTS)
    with pytest.raises(ResultsError) as error:
        check_results(cfg, RESULTS)
    assert str(error.value).startswith(f"TEST.EXPECTED_RESULTS: {sentence}")
    cfg.TEST.EXPECTED_RESULTS = [["a", "bbox/AP", 39.0, 1.0]]
    return check_results(cfg, {"a": RESULTS, "b": {}})


@pytest.mark.e2e
def test_results_of_a_training_and_of_an_evaluation(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, shapes, capsys)
    test = ["DATASETS.TEST", str((shapes[0],)), "TEST.EXPECTED_RESULTS"]
    wrong = [*test, "[['bbox', 'AP', 90.0, 1.0]]"]
    assert run(*wrong) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: TEST.EXPECTED_RESULTS: bbox/AP is ") and "90.0 ± 1.0" in line
    final = run.output / "model_final.pth"
    assert final.is_file()
    for command in (["--resume"], ["--eval-only", "MODEL.WEIGHTS", str(final)]):
        assert run(*command, *wrong) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(line[:40])
    right = [*test, "[['bbox', 'AP50', 0.0, 100.0]]"]
    assert run("--eval-only", "MODEL.WEIGHTS", str(final), *right) == 0
    assert "The results are those of TEST.EXPECTED_RESULTS" in (run.output / "log.txt").read_text()


def test_names_are_checked_before_the_training(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, shapes, capsys)
    test = ["DATASETS.TEST", str((shapes[0],))]
    line = run.fails(*test, "TEST.BEST_METRIC", "bbox/mAP")
    assert "TEST.BEST_METRIC: unknown value 'bbox/mAP'; did you mean bbox/AP?" in line
    line = run.fails(*test, "TEST.EXPECTED_RESULTS", "[['box', 'AP', 40.0, 1.0]]")
    assert "TEST.EXPECTED_RESULTS: unknown value 'box/AP'; did you mean bbox/AP?" in line


def test_augmented_results_are_compared_too(shapes: Shapes, tmp_path: Path) -> None:
    cfg = trainable_cfg("faster", shapes, tmp_path, "TEST.AUG.ENABLED", True)
    trainer = object.__new__(Trainer)
    trainer.cfg, trainer.student, trainer._last_eval_results = cfg, None, {"bbox": {"AP": 1.0}}  # type: ignore[assignment]
    trainer.test_with_TTA = lambda cfg, model: {"bbox_TTA": {"AP": 2.0}}  # type: ignore[method-assign]
    trainer._test_augmented()
    assert [*trainer._last_eval_results] == ["bbox", "bbox_TTA"]

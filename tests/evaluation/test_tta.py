"""Test-time augmentation is detectron2's, at the end of a training and by --eval-only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA

from distill.config import validate_config
from distill.data.cityscapes import load_cityscapes_instances
from distill.data.kitti import register_kitti
from distill.data.shapes import SceneConfig, kitti, write_cityscapes
from distill.engine import Trainer, evaluate
from distill.errors import ConfigError
from distill.experiments.runner import Runner, Stage
from distill.utils.progress import Progress
from tests.support.networks import distill_opts, tiny_cfg
from tests.support.trainings import assert_declared, trainable_cfg, write_teacher

Shapes = tuple[str, str, str]
AUGMENTED = (
    *("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 64), "TEST.AUG.MAX_SIZE", 96),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 10),
)


def own_set(shapes: Shapes, folder: Path) -> str:
    return shapes[0]


def kitti_set(shapes: Shapes, folder: Path) -> str:
    kitti.write_kitti(folder, "val", 2, config=SceneConfig(height=64, width=96))
    name = f"kitti_{folder.parent.name}"
    register_kitti(name, folder, "val")
    return name


def cityscapes_set(shapes: Shapes, folder: Path) -> str:
    write_cityscapes(folder, "val", 2, config=SceneConfig(height=64, width=96))
    folders = {
        "image_dir": str(folder / "leftImg8bit" / "val"),
        "gt_dir": str(folder / "gtFine" / "val"),
    }
    DatasetCatalog.register("tta_cityscapes", lambda: load_cityscapes_instances(*folders.values()))
    classes = MetadataCatalog.get("cityscapes_fine_instance_seg_val").thing_classes
    metadata = MetadataCatalog.get("tta_cityscapes")
    metadata.set(**folders, evaluator_type="cityscapes_instance", thing_classes=classes)
    return "tta_cityscapes"


CASES: dict[str, tuple[str, Callable[[Shapes, Path], str], set[str]]] = {
    "boxes": ("faster", own_set, {"bbox"}),
    "masks": ("mask", own_set, {"bbox", "segm"}),
    "cascade": ("cascade", own_set, {"bbox", "segm"}),
    "KITTI": ("faster", kitti_set, {"bbox", "kitti"}),
    "Cityscapes": ("mask", cityscapes_set, {"segm"}),
}


@pytest.mark.e2e
@pytest.mark.parametrize("case", CASES)
def test_results_of_a_training_and_of_its_student(
    case: str, shapes: Shapes, tmp_path: Path
) -> None:
    """They stand next to the plain ones, and come from the average of a distilled student."""
    family, make_set, tasks = CASES[case]
    name = make_set(shapes, tmp_path / "set")
    teacher = write_teacher(tmp_path / "teacher", family, "MODEL.ROI_HEADS.NUM_CLASSES", 8)
    cfg = trainable_cfg(
        family,
        shapes,
        tmp_path / "out",
        *(*AUGMENTED, *distill_opts(family, ("FitNet",)), *teacher),
        *("DATASETS.TEST", (name,), "SOLVER.MAX_ITER", 1, "SOLVER.EMA.DECAY", 0.9),
        norm="BN",
    )
    validate_config(cfg)
    trainer = Trainer(cfg)
    trainer.train()
    results = evaluate(cfg, str(tmp_path / "out" / "model_final.pth"))
    assert results.keys() == tasks | {f"{task}_TTA" for task in tasks}
    assert_declared(cfg, results)
    logged = {k: v for k, (v, _) in trainer.storage.latest().items()}
    for task, metrics in results.items():
        expected = {k: logged[f"{task}/{k}"] for k in metrics}
        assert metrics == pytest.approx(expected, nan_ok=True)


def test_it_is_detectron2s(shapes: Shapes, tmp_path: Path) -> None:
    cfg = trainable_cfg("mask", shapes, tmp_path / "out", *AUGMENTED, "DATASETS.TEST", (shapes[0],))
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)

    class Stock(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
            return COCOEvaluator(dataset_name, output_dir=str(tmp_path / "stock"))

    Stock.test(cfg, GeneralizedRCNNWithTTA(cfg, model))
    Trainer.test_with_TTA(cfg, model)
    written = "coco_instances_results.json"
    ours, theirs = tmp_path / "out" / "inference_TTA" / written, tmp_path / "stock" / written
    assert len(ours.read_text()) > 1000 and ours.read_text() == theirs.read_text()


def test_several_sets_have_the_suffix_themselves(shapes: Shapes, tmp_path: Path) -> None:
    sets = (shapes[0], kitti_set(shapes, tmp_path / "set"))
    cfg = trainable_cfg("faster", shapes, tmp_path, *AUGMENTED, "DATASETS.TEST", sets)
    weights = tmp_path / "model.pth"
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, weights)
    results = evaluate(cfg, str(weights))
    assert [*results] == [*sets, *(f"{name}_TTA" for name in sets)]
    assert_declared(cfg, results)


def test_comparisons_have_it_too(shapes: Shapes, tmp_path: Path) -> None:
    cfg = trainable_cfg("faster", shapes, tmp_path, *AUGMENTED, "DATASETS.TEST", (shapes[0],))
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).eval()
    expected = {**Trainer.test(cfg, model), **Trainer.test_with_TTA(cfg, model)}
    stage = Stage("student", 0, cfg, tmp_path)
    found = Runner(tmp_path, Progress(json=True)).test(stage, model.eval())[shapes[0]]
    assert found.keys() == expected.keys() == {"bbox", "bbox_TTA"}
    assert all(x == pytest.approx(expected[task], nan_ok=True) for task, x in found.items())


REFUSED: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "dense detector": ("retinanet", (), "only for GeneralizedRCNN; set it to False"),
    "distilled dense detector": (
        *("fcos", tuple(distill_opts("fcos", ())), "only for GeneralizedRCNN; set it to False"),
    ),
    "panoptic": ("panoptic", (), "only for GeneralizedRCNN; set it to False"),
    "semantic": ("semantic", (), "only for GeneralizedRCNN; set it to False"),
    "keypoints": ("faster", ("MODEL.KEYPOINT_ON", True), "has no keypoints; set it or MODEL.KEY"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_detectron2_cannot_augment_is_refused(case: str) -> None:
    family, opts, sentence = REFUSED[case]
    with pytest.raises(ConfigError, match=rf"TEST.AUG.ENABLED is True, but .* {sentence}"):
        validate_config(tiny_cfg(family, *AUGMENTED, *opts), training=False)

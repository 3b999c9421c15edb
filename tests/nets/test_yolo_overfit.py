"""RTMDet, RTMDet-Ins, YOLOX and YOLOv5 learn a few images by heart."""

from pathlib import Path

import pytest
from detectron2.utils.env import seed_all_rng

from distill.config import load_config
from distill.data.shapes import SceneConfig, write_coco
from distill.engine import Trainer
from tests.support.trainings import register_own_sets

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STUDENTS = [
    "Shapes-Detection/rtmdet_PAFPN_32",
    "Shapes-InstanceSegmentation/rtmdet_ins_PAFPN_32",
    "Shapes-Detection/yolox_PAFPN_32",
    "Shapes-Detection/yolov5_PAFPN_32",
]


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("name", STUDENTS)
def test_eight_images_are_learned(name: str, tmp_path: Path, catalogues: None) -> None:
    """Half a minute of a CPU suffices: losses, assignment, decoding and inputs fit together."""
    root = tmp_path / "shapes"
    write_coco(root, "train", 8, config=SceneConfig(height=128, width=128))
    annotations = str(root / "annotations" / "instances_train.json")
    cfg = load_config(str(CONFIGS / f"{name}.yaml"))
    cfg.DATASETS.COCO_FORMAT = (("eight_shapes", annotations, str(root / "images" / "train")),)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("eight_shapes",)
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.SOLVER.MAX_ITER = cfg.SOLVER.CHECKPOINT_PERIOD = 300
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    register_own_sets(cfg)
    seed_all_rng(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    found = Trainer.test(cfg, trainer.student)
    assert found["bbox"]["AP50"] >= 95
    assert not cfg.MODEL.MASK_ON or found["segm"]["AP50"] >= 95

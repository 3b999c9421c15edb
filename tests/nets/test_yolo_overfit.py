"""RTMDet and YOLO learn a few images by heart."""

from pathlib import Path

import pytest
from detectron2.utils.env import seed_all_rng

from distill.config import load_config
from distill.data.shapes import SceneConfig, write_coco
from distill.engine import Trainer
from tests.support.trainings import register_own_sets

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SCHEDULES = {  # iterations and learning rate
    "Shapes-Detection/rtmdet_PAFPN_32": (80, 0.008),
    "Shapes-InstanceSegmentation/rtmdet_ins_PAFPN_32": (90, 0.008),
    "Shapes-Detection/yolox_PAFPN_32": (220, 0.005),
    "Shapes-Detection/yolov3_FPN_32": (220, 0.01),
    "Shapes-Detection/yolov4_PAFPN_32": (260, 0.01),
    "Shapes-Detection/yolov5_PAFPN_32": (220, 0.01),
    "Shapes-Detection/yolov7_PAFPN_32": (220, 0.01),
}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("name", SCHEDULES)
def test_four_images_are_learned(name: str, tmp_path: Path, catalogues: None) -> None:
    """Fifteen seconds of a CPU suffice: losses, assignment, decoding and inputs fit together."""
    root = tmp_path / "shapes"
    write_coco(root, "train", 4, config=SceneConfig(height=96, width=96))
    annotations = str(root / "annotations" / "instances_train.json")
    cfg = load_config(str(CONFIGS / f"{name}.yaml"))
    cfg.DATASETS.COCO_FORMAT = (("four_shapes", annotations, str(root / "images" / "train")),)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("four_shapes",)
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR = SCHEDULES[name]
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.WARMUP_ITERS = cfg.SOLVER.MAX_ITER, 10
    # One block per stage: the time of an iteration is that of its operations, not of its pixels.
    cfg.MODEL.CSPNEXT.DEPTH = cfg.MODEL.CSPDARKNET.DEPTH = 0.1
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    register_own_sets(cfg)
    seed_all_rng(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    found = Trainer.test(cfg, trainer.student)
    assert found["bbox"]["AP50"] >= 95
    assert not cfg.MODEL.MASK_ON or found["segm"]["AP50"] >= 90

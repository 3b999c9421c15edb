"""The command line with detectron2's own loaders and evaluators, on shapes in the real layouts."""

import json
import shutil
from pathlib import Path

import pytest

from distill.data.shapes import LAYOUTS, SceneConfig
from distill.launch.main import main
from tests.support.networks import distill_opts, tiny_cfg, write_config
from tests.support.trainings import write_teacher

# family, layout, folder below ./datasets, splits, test set, a metric, further options
CASES = {
    "cityscapes instances": (
        *("mask", "cityscapes", "cityscapes", ("train", "val")),
        *("cityscapes_fine_instance_seg_{}", "segm/AP", ["MODEL.ROI_HEADS.NUM_CLASSES", 8]),
    ),
    "cityscapes semantic": (
        *("semantic", "cityscapes", "cityscapes", ("train", "val")),
        *("cityscapes_fine_sem_seg_{}", "sem_seg/IoU", ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 19]),
    ),
    "voc": (
        *("faster", "voc", "VOC2007", ("train", "test")),
        *("voc_2007_{}", "bbox/AP50", ["MODEL.ROI_HEADS.NUM_CLASSES", 20]),
    ),
}


DISTILLED = {
    "cityscapes instances": ("IMA", "MKD", "TID", "MaskLogitKD"),
    "cityscapes semantic": ("IMA", "MKD", "CWDLogits", "PixelKD", "CIRKD"),
}


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("case", CASES)
def test_train_and_evaluate(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    family, layout, folder, splits, data, metric, classes = CASES[case]
    for split in splits:
        LAYOUTS[layout](
            tmp_path / "datasets" / folder, split, 3, 0, SceneConfig(height=96, width=96)
        )
    train = "trainval" if layout == "voc" else splits[0]  # VOC lists train and val together too
    opts = [
        *("DATASETS.TRAIN", (data.format(train),), "DATASETS.TEST", (data.format(splits[1]),)),
        *("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 1e-4),
        *("DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(tmp_path / "out")),
        *("INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.MIN_SIZE_TEST", 96, *classes),
    ]
    if case in DISTILLED:
        opts += distill_opts(family, DISTILLED[case])
        opts += write_teacher(tmp_path / "teacher", family, *classes, fpn=24)
    config = write_config(tiny_cfg(family, *opts, norm="BN"), tmp_path / "config.yaml")
    command = ["--config-file", str(config)]
    assert main(command) == 0
    last = json.loads((tmp_path / "out" / "metrics.json").read_text().splitlines()[-1])
    assert metric in last
    for head in DISTILLED.get(case, ()):
        assert sum(v for k, v in last.items() if k.split("/")[0] == f"loss_{head.lower()}") > 0
    if case in DISTILLED:  # without the teacher, from the checkpoint alone
        shutil.rmtree(tmp_path / "teacher")
        weights = ("MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth"))
        shutil.rmtree(tmp_path / "out" / "inference")
        capsys.readouterr()
        assert main([*command, "--eval-only", *weights]) == 0
        assert f"copypaste: {last[metric]:.4f}" in capsys.readouterr().out
        assert (tmp_path / "out" / "inference").is_dir()

"""Trainings with SOLVER.QAT: the student stays a stock checkpoint, with its ranges beside it."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model

from distill.checkpoint.load import load_strictly
from distill.config import student_config
from distill.config.validate import validate_config
from distill.engine import Trainer, evaluate, load_student
from distill.errors import ConfigError, WeightsError
from tests.support.cases import for_each
from tests.support.networks import image_dict
from tests.support.trainings import Shapes, trainable_cfg

QAT = ("SOLVER.QAT.ENABLED", True, "SOLVER.QAT.CALIBRATION_ITERS", 1)


def config(shapes: Shapes, output: Path, *opts: Any) -> CfgNode:
    short = ("SOLVER.MAX_ITER", 3, "DATASETS.TEST", (shapes[0],), "TEST.BEST_METRIC", "bbox/AR")
    short += ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)  # it is sure of nothing
    return trainable_cfg("retinanet", shapes, output, *short, *QAT, *opts, norm="BN")


@pytest.mark.slow
@pytest.mark.e2e
def test_a_quantized_training(
    shapes: Shapes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(shapes, tmp_path)
    with caplog.at_level(logging.INFO, "distill"):
        trainer = Trainer(cfg)
        results = trainer.train()
    assert "layers of the student are quantized from the next one on" in caplog.text
    final, best = (str(tmp_path / f"model_{x}.pth") for x in ("final", "best"))
    saved = torch.load(final, weights_only=True)
    state = saved["quantization"]
    assert state["steps"] == 3 and len(state["ranges"]) == len(trainer.quantization.sites)
    assert torch.load(best, weights_only=True)["quantization"]["steps"] == 3
    stock = build_model(student_config(cfg)).eval()
    load_strictly(stock, final, "it")  # no key is missing or unexpected
    # The evaluation after the training is that of the quantized network.
    again = {weights: flatten_results_dict(evaluate(cfg, weights)) for weights in (final, best)}
    expected = pytest.approx(flatten_results_dict(results), nan_ok=True)
    assert again[final] == expected and again[best] == expected
    network = load_student(cfg, final).eval()
    entry = [image_dict(0)]
    with torch.no_grad():
        a, b = (x.backbone(x.preprocess_image(entry).tensor) for x in (stock, network))
    assert not torch.equal(a["p3"], b["p3"])
    torch.save({"model": saved["model"]}, tmp_path / "plain.pth")
    with pytest.raises(WeightsError, match="is of a training without it"):
        load_student(cfg, str(tmp_path / "plain.pth"))


@for_each(
    "opts, message",
    [
        ((), "MODEL.WEIGHTS is empty; name the checkpoint of a trained student"),
        (("TEST.PRECISE_BN.ENABLED", True), "PRECISE_BN.ENABLED is True, which measures"),
        (("SOLVER.QAT.CALIBRATION_ITERS", 3), "it must be below SOLVER.MAX_ITER 3"),
        (("SOLVER.QAT.CALIBRATION_ITERS", -1), "it must be a whole number from 0"),
    ],
)
def test_wrong_values_are_refused(
    shapes: Shapes, tmp_path: Path, opts: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=r"QAT|PRECISE") as error:
        validate_config(config(shapes, tmp_path, *opts))
    assert message in str(error.value)

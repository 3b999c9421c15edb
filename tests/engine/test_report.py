"""Test that a training writes its report, and that a report never changes or ends a training."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode

from distill.config import get_distill_cfg, validate_config
from distill.engine import evaluate_finished
from distill.engine.report import RunReport
from distill.errors import ConfigError
from distill.report import install, page
from tests.support.networks import distill_opts
from tests.support.runs import write_rows, write_run
from tests.support.trainings import differences, train, trainable_cfg, write_teacher

Shapes = tuple[str, str, str]
EIGHT = ("MODEL.ROI_HEADS.NUM_CLASSES", 8)


def config(shapes: Shapes, folder: Path, name: str, *opts: Any, heads: bool = True) -> CfgNode:
    """Return the config of two iterations with an evaluation after each."""
    taught = [*distill_opts("faster", ["FitNet"]), *write_teacher(folder, "faster", *EIGHT, fpn=24)]
    short = ("SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1, "DATASETS.TEST", (shapes[0],))
    seen = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "REPORT.ENABLED", True, "SEED", 1)
    opts = (*(taught if heads else ()), *short, *seen, *opts)
    return trainable_cfg("faster", shapes, folder / name, *opts, norm="BN")


@pytest.mark.e2e
def test_it_changes_no_bit_of_a_training(tmp_path: Path, shapes: Shapes) -> None:
    pytest.importorskip("plotly")
    base = write_run(tmp_path / "base", shapes)
    plain = train(config(shapes, tmp_path, "plain", "REPORT.ENABLED", False))
    reported = train(config(shapes, tmp_path, "new", "REPORT.BASELINE", str(base)))
    for key in ("model", "distill", "trainer"):
        a, b = (x[key] for x in (plain, reported))
        if key == "trainer":
            a, b = ({k: v for k, v in x.items() if k != "config"} for x in (a, b))
        assert differences(a, b) == []
    assert not (tmp_path / "plain" / "report.html").exists()
    text = (tmp_path / "new" / "report.html").read_text()
    teacher = json.loads((tmp_path / "new" / "report_teacher.json").read_text())
    assert len(teacher["images"]) == 6 and teacher["results"]
    for part in ("new has ", "base: F1 ", "Images where the teacher is wrong", "after 2 of 2"):
        assert part in text


@pytest.mark.e2e
def test_a_report_that_fails_is_a_warning(
    tmp_path: Path,
    shapes: Shapes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: Any, **kw: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write_report", fail)
    monkeypatch.setattr("distill.engine.report.installed", lambda: True)
    cfg = config(shapes, tmp_path, "new", heads=False)
    train(cfg)
    assert (tmp_path / "new" / "model_final.pth").is_file()
    records = [x for x in caplog.records if x.levelno == logging.WARNING]
    found = [x.getMessage() for x in records if "The report" in x.getMessage()]
    text = "The report cannot be written (OSError: [Errno 28] No space left on device)"
    assert found == [f"{text}; the training goes on"] * 2
    # A finished run that is evaluated again writes its report, too.
    monkeypatch.undo()
    if install.installed():
        evaluate_finished(cfg, str(tmp_path / "new" / "model_final.pth"))
        assert "after 2 of 2" in (tmp_path / "new" / "report.html").read_text()


@pytest.mark.e2e
def test_without_plotly_a_training_says_once_what_to_install(
    tmp_path: Path,
    shapes: Shapes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(install, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        train(config(shapes, tmp_path, "new", heads=False))
    (line,) = [x.getMessage() for x in caplog.records if "report" in x.getMessage()]
    assert line.endswith("Install plotly for the report: pip install plotly.")
    assert not (tmp_path / "new" / "report.html").exists()


def test_the_newest_scalars_are_in_the_report(tmp_path: Path, shapes: Shapes) -> None:
    """An evaluation may come before its row of the log, and the detections may be missing."""
    pytest.importorskip("plotly")
    cfg = get_distill_cfg()
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST = str(tmp_path), ("unused",)
    write_rows(tmp_path, [{"iteration": 19, "loss_cls": 1.0}])
    RunReport(cfg).write((24, {"bbox/AP": 12.5, "loss_cls": 0.5}))
    text = (tmp_path / "report.html").read_text()
    assert " has 12.5 box AP after 25 iterations." in text
    assert "The evaluation has written no detections in COCO" in text


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("nowhere", "REPORT.BASELINE is 'nowhere', which has no metrics.json; name the OUTPUT_DIR"),
        ("{folder}/new", "is OUTPUT_DIR itself; name another training, or empty it."),
    ],
)
def test_a_wrong_baseline(tmp_path: Path, shapes: Shapes, baseline: str, message: str) -> None:
    cfg = config(shapes, tmp_path, "new", heads=False)
    cfg.REPORT.BASELINE = baseline.format(folder=tmp_path)
    with pytest.raises(ConfigError) as error:
        validate_config(cfg)
    assert message in str(error.value)
    validate_config(cfg, training=False)
    cfg.REPORT.ENABLED = False
    validate_config(cfg)

"""Ablations: every study's configs and switches exist, runs are paired and reused."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill import cli
from distill.config import get_distill_cfg, merge_from_file, merge_from_list, validate_config
from distill.experiments import ablation, demo, shapes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("study", ablation.STUDIES)
def test_a_variant_is_a_valid_config_that_changes_something(study: str) -> None:
    described = ablation.STUDIES[study]
    full = get_distill_cfg()
    merge_from_file(full, described.distilled)
    for variant in ("full", *described.switches):
        cfg = full.clone()
        merge_from_list(cfg, list(described.switches.get(variant, ())))
        assert (cfg == full) == (variant == "full"), variant
        validate_config_of(cfg)
        assert described.teacher_config == cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE


def validate_config_of(cfg: Any) -> None:
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("coco_2017_val",)  # registered, not opened
    cfg.DATASETS.COCO_FORMAT = ()
    validate_config(cfg)


def test_differences_are_paired_and_runs_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def run(self: Any, stage: Any) -> dict[str, float]:
        trained.append(f"{stage.name} {stage.seed}")
        distilled = bool(stage.cfg.MODEL.DISTILL.HEADS)
        if distilled:
            weights = Path(stage.cfg.MODEL.DISTILL.TEACHER.WEIGHTS)
            assert weights.parent.name.startswith("teacher-0-")
        return {"AP": 10.0 * (stage.seed + 1) + 3.0 * distilled}

    monkeypatch.setattr(demo.Demo, "run", run)
    monkeypatch.setattr(demo.Demo, "render", lambda self: write_nothing(self.data))
    arguments = ["tid", "--seeds", "2", "--variants", "full,key only", "--out", str(tmp_path)]
    assert cli.main(["ablate", *arguments]) == 0
    assert trained == [
        *("teacher 0", "baseline 0", "full 0", "key only 0", "baseline 1", "full 1", "key only 1")
    ]
    content = json.loads(next(tmp_path.glob("tid_*.json")).read_text())
    assert content["AP"]["full"] == [13.0, 23.0] and content["seeds"] == [0, 1]
    assert content["commit"] and content["command"]
    assert "3.0 ± 0.0" in capsys.readouterr().out


def write_nothing(folder: Path) -> None:
    """An empty data set, so that the config's paths exist."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split in shapes.SCENES:
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        (folder / "annotations" / f"instances_{split}.json").write_text("{}")


@pytest.mark.slow
@pytest.mark.e2e
def test_self_distillation_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = demo.Demo.stage

    def stage(self: Any, name: str, seed: int, config: str, *opts: Any) -> Any:
        return describe(
            self, name, seed, config, "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, *opts
        )

    monkeypatch.setattr(demo.Demo, "stage", stage)
    monkeypatch.setattr(shapes, "SCENES", {"train": 4, "val": 2})
    monkeypatch.setattr(demo, "TIMED_IMAGES", 1)
    arguments = ["mssd", "--tune", "--variants", "full", "--out", str(tmp_path)]
    assert cli.main(["ablate", *arguments, "--opts", "MODEL.DISTILL.MSSD.WEIGHT", "0.5"]) == 0
    content = json.loads(next(tmp_path.glob("mssd_tuning_*.json")).read_text())
    assert set(content["AP"]) == {"baseline", "full"} and content["seeds"] == [100]
    config = next((tmp_path / "stages").glob("full-100-*/student.yaml")).read_text()
    assert "build_shallow_resnet_pafpn_backbone" in config


def test_an_unknown_variant_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ablate", "tid", "--variants", "fulll"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--variants of tid: unknown value 'fulll'; did you mean full? Valid: full" in line

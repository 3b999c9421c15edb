"""The demo on a few scenes: every stage runs, results are complete, finished stages are reused."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill import cli
from distill.experiments import demo, runner, shapes
from distill.experiments.summary import mean_std
from distill.utils.progress import Progress


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    describe = demo.Demo.stage
    short = ("SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.CHECKPOINT_PERIOD", 9)

    def stage(self: Any, name: str, seed: int, config: str, *opts: Any) -> Any:
        return describe(self, name, seed, config, *short, *opts)

    monkeypatch.setattr(demo.Demo, "stage", stage)
    monkeypatch.setattr(shapes, "SCENES", {"train": 6, "val": 5})
    monkeypatch.setattr(demo, "TIMED_IMAGES", 2)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.e2e
def test_demo_writes_complete_results_and_reuses_finished_stages(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--control", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    for name in ("teacher", "baseline", "distilled", "control"):
        for key in (*demo.METRICS, *demo.COST):
            assert len(results[name][key]) == 1
    assert results["teacher"]["parameters"][0] > results["distilled"]["parameters"][0]
    assert results["baseline"]["parameters"] == results["distilled"]["parameters"]
    assert results["seeds"] == [0] and results["settings"]["heads"]
    assert (tmp_path / "summary.png").stat().st_size > 10_000
    assert "distilled - baseline" in capsys.readouterr().out

    def train(self: Any, stage: Any) -> None:
        raise AssertionError(f"{stage.name} was trained again")

    monkeypatch.setattr(demo.Demo, "_train", train)
    assert cli.main(["demo", "--control", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["teacher"] == results["teacher"]


@pytest.mark.slow
@pytest.mark.e2e
def test_an_interrupted_stage_resumes(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def interrupt(bar: Any) -> None:
        seen.append(bar.trainer.iter)
        if bar.trainer.iter == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.ProgressHook, "after_step", interrupt)
    with Progress() as progress:
        one = demo.Demo(tmp_path, 8, progress)
        one.render()
        stage = one.stage("baseline", 0, demo.STUDENT, "SOLVER.CHECKPOINT_PERIOD", 2)
        with pytest.raises(KeyboardInterrupt):
            one.run(stage)
        assert not stage.weights.is_file()
        assert one.run(stage)["parameters"] > 0
    assert seen == [0, 1, 2]  # it went on after the checkpoint of iteration 1


def test_a_stage_is_keyed_by_config_and_data(tiny: None, tmp_path: Path) -> None:
    with Progress() as progress:
        one = demo.Demo(tmp_path, 7, progress)  # other scenes have another name
        one.render()
        key = one.stage("baseline", 0, demo.STUDENT).folder
        assert one.stage("baseline", 0, demo.STUDENT).folder == key
        assert one.stage("baseline", 1, demo.STUDENT).folder != key
        other = one.stage("baseline", 0, demo.STUDENT, "SOLVER.BASE_LR", 0.5)
        assert other.folder.name != key.name
        one.code = "changed"
        assert one.stage("baseline", 0, demo.STUDENT).folder != key


def test_mean_and_sample_deviation() -> None:
    assert mean_std([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert mean_std([1.25], 2) == "1.25"
    assert mean_std([1.0, None]) == mean_std([]) == "-"

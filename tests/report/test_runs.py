"""Test the content of a run's folder, and the results of several runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from distill.errors import ConfigError, DataError
from distill.report.log import read_log
from distill.report.results import Results
from distill.report.runs import Metric, main_metric, parsed_metric, read_run, run_names
from tests.support.runs import BAD, rows, write_rows, write_run

Shapes = tuple[str, str, str]


def test_a_run(tmp_path: Path, shapes: Shapes) -> None:
    run = read_run(write_run(tmp_path / "a", shapes, heads=("fitnet",)), "a")
    assert run.series("bbox/AP") == {19: 29, 39: 49} and run.series("bbox/APl") == {}
    assert run.heads == ["fitnet"] and run.losses() == ["loss_cls"]
    assert run.losses("fitnet") == ["loss_fitnet/p2", "loss_fitnet/p3"]
    assert (run.last, run.max_iter) == (39, 40)
    assert run.cost == (0.5, 4.0, 0.1, 100.0)
    assert [x.name for x in run.metrics[:3]] == ["AP", "AP50", "AR"]
    assert run.config["MODEL.DISTILL.HEADS"] == ["fitnet"]


def test_names_of_metrics() -> None:
    assert parsed_metric("bbox/AP-a/b") == Metric("bbox", "AP-a/b")
    assert parsed_metric("bbox/AP-a/b").of_class and not parsed_metric("bbox/AP").of_class
    assert parsed_metric("my_set/segm_TTA/AP") == ("my_set/segm_TTA", "AP")
    assert parsed_metric("my_set/segm/AP").title == "my_set mask AP"
    for other in ("rpn/num_pos_anchors", "lr", "kd_ratio/fitnet/p2", "bbox", "loss_x/bbox"):
        assert parsed_metric(other) is None


def test_rows_of_a_training_that_started_again(tmp_path: Path) -> None:
    """Those after its first iteration are old. The row that is being written is left out."""
    old = [{"iteration": k, "lr": 1.0} for k in (19, 39, 59)]
    write_rows(tmp_path, [*old, {"iteration": 39, "lr": 2.0}, {"iteration": 39, "bbox/AP": 5.0}])
    with (tmp_path / "metrics.json").open("a") as f:
        f.write('{"iteration": 4')
    run = read_run(tmp_path, "a", (41, {"bbox/AP": 7.0, "bbox/AP50": float("inf")}))
    assert run.series("lr") == {19: 1.0, 39: 2.0}
    assert run.series("bbox/AP") == {39: 5.0, 41: 7.0} and run.series("bbox/AP50") == {}


def test_the_results_of_a_compared_method_are_in_their_own_file(tmp_path: Path) -> None:
    write_rows(tmp_path, [{"iteration": 19, "lr": 1.0}])
    (tmp_path / "result.json").write_text(json.dumps({"bbox/AP": 3.0, "bbox/APl": None}))
    run = read_run(tmp_path, "a")
    assert run.series("bbox/AP") == {19: 3.0} and run.config == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", "[1]\n{}\n", "line 1, is no row of metrics"),
        ("result.json", "{", "result.json' cannot be read"),
        ("config.yaml", "a: !!python/object:os.system 1", "config.yaml' cannot be read"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    write_rows(tmp_path, [{"iteration": 19}])
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_run(tmp_path, "a")


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no metrics\.json; name the OUTPUT_DIR"):
        read_run(tmp_path, "a")


def test_the_log(tmp_path: Path, shapes: Shapes) -> None:
    log = read_log(write_run(tmp_path / "a", shapes) / "log.txt")
    assert log.environment == {"sys.platform": "linux", "PyTorch": f"2.11.0 @/some/where {BAD}"}
    dead = f"Iteration 19: fitnet is dead.\ncontinued {BAD}"
    assert log.warnings == {dead: 1, "Twice": 2}
    assert read_log(tmp_path / "none.txt") == ({}, {})


def test_names_tell_runs_apart() -> None:
    assert run_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert run_names([Path("/x/a/c"), Path("/x/b/c")]) == ["a/c", "b/c"]
    assert run_names([Path("/x/a")]) == ["a"]


# ---- Results


def test_the_sentence_on_top(tmp_path: Path, shapes: Shapes) -> None:
    folders = {ap: write_run(tmp_path / str(ap), shapes, ap) for ap in (10, 13, 12)}
    base, best, other = (read_run(folder, f"ap {ap}") for ap, folder in folders.items())

    def verdict(*runs: object) -> str:
        return Results(runs).verdict()

    assert verdict(base) == "ap 10 has 49.0 box AP after 40 of 40 iterations."
    more = "52.0 box AP, 3.0 more than ap 10 (49.0)"
    assert verdict(base, best) == f"ap 13 has {more} after 40 of 40 iterations."
    assert verdict(base, best, other) == f"ap 13 is the best of 3 runs: {more}."
    assert "3.0 less than ap 13 (52.0)" in verdict(best, base)
    assert Results([base, best]).comparable
    elsewhere = replace(base, config={**base.config, "DATASETS.TEST": ["another"]})
    assert not Results([base, elsewhere]).comparable
    assert "49.0 box AP, as much as ap 10 (49.0)" in verdict(base, read_run(folders[10], "same"))


def test_a_running_training_is_compared_at_its_iteration(tmp_path: Path, shapes: Shapes) -> None:
    base = read_run(write_run(tmp_path / "base", shapes, 10), "base")
    write_rows(write_run(tmp_path / "new", shapes), rows(12)[:1])
    run = read_run(tmp_path / "new", "new")
    results = Results([base, run])
    assert "31.0 box AP, 2.0 more than base (29.0) after 20 of 40" in results.verdict()
    assert [x.change for x in results.numbers()] == ["+2.0", "+2.0"]
    assert results.class_table().rows[0] == ["circle", 29, 31, "+2.0"]
    write_rows(tmp_path / "base", rows(10)[1:])
    base = read_run(tmp_path / "base", "base")
    text = "31.0 box AP, 18.0 less than base (49.0 after 40 iterations) after 20 of 40 iterations."
    assert Results([base, run]).verdict() == f"new has {text}"
    assert Results([base, run]).numbers()[0].better is False


def test_runs_without_results(tmp_path: Path, shapes: Shapes) -> None:
    write_rows(write_run(tmp_path / "new", shapes), [{"iteration": 19, "lr": 1.0}])
    empty, full = (
        read_run(tmp_path / "new", "new"),
        read_run(write_run(tmp_path / "b", shapes), "b"),
    )
    assert Results([empty]).verdict() == "new has no result after 20 of 40 iterations."
    assert Results([empty]).class_chart() is None and Results([empty]).tables() == []
    assert Results([empty, full]).verdict() == "b has 49.0 box AP after 40 of 40 iterations."
    assert Results([empty, full]).numbers()[0].change == ""


def test_the_metric_of_a_run(tmp_path: Path) -> None:
    found = {"bbox/AP": 1.0, "segm/AP": 2.0, "bbox/AP50": 3.0, "iteration": 1}
    write_rows(tmp_path, [found])
    assert main_metric([read_run(tmp_path, "a")]).full == "segm/AP"
    (tmp_path / "config.yaml").write_text("TEST: {BEST_METRIC: bbox/AP50}")
    assert main_metric([read_run(tmp_path, "a")]).full == "bbox/AP50"
    write_rows(tmp_path, [{"sem_seg/mIoU": 1.0, "sem_seg/IoU-road": 2.0, "iteration": 1}])
    run = read_run(tmp_path, "a")
    assert main_metric([run]).full == "sem_seg/mIoU"
    assert list(Results([run]).classes()) == ["road"]

"""The proof: its plan, its arms, its verdict, its page, and what interrupts it."""

import json
import math
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill import cli
from distill.config import get_distill_cfg
from distill.errors import ConfigError
from distill.evaluation.coco_errors import coco_evaluation, coco_metrics
from distill.evaluation.coco_format import load_results, load_truth
from distill.experiments import detections, prove, runner, step_times
from distill.experiments.bootstrap import resamples
from distill.experiments.detections import FILE
from distill.experiments.prove_page import gain_text, page
from distill.experiments.runner import Stage
from tests.support.networks import PAFPN
from tests.support.trainings import Shapes, distillation_file

ARMS = ("baseline", "FitNet", "random-teacher", "equal-time")


def run(folder: Path, config: str, *arguments: str) -> int:
    out = ("--out", str(folder / "out"), "--resamples", "100")
    return cli.main(["prove", "--config-file", config, *out, *arguments])


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "prove.json").read_text())
    return found


# ---- With real trainings.


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.e2e
def test_a_proof_with_two_seeds(
    tmp_path: Path,
    shapes: Shapes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(step_times, "TIMED", 4)
    config = distillation_file(tmp_path, shapes)
    assert run(tmp_path, config, "--seeds", "2") == 0
    said, found = capsys.readouterr().out, content(tmp_path)
    assert said.index("GO: the lower end") < said.index("cost: 8 trainings, ")
    assert said.index("0 trainings are finished") < said.index("baseline (seed 0)")
    plan, rows = found["plan"], found["rows"]
    assert set(rows) == set(ARMS) and plan["seeds"] == [0, 1] and plan["metric"] == "bbox/AP"
    longer = math.ceil(3 * plan["step_times"]["ratio"])
    assert plan["iterations"] == {**dict.fromkeys(ARMS, 3), "equal-time": longer}
    for name, row in rows.items():
        assert set(row["results"]) == {"0", "1"} and not row["failures"], name
        for folder in plan["stages"][name]:
            log = (tmp_path / "out" / "stages" / folder / "metrics.json").read_text()
            last = json.loads(log.splitlines()[-1])["iteration"]
            assert last == plan["iterations"][name] - 1
    assert found["verdict"] in ("GO", "NO-GO", "INCONCLUSIVE")
    # Accumulated over the images as they are, the matches give the AP of the evaluation.
    for name, values in found["gains"].items():
        assert found["details"]["bootstrap"][name]["gain"] == pytest.approx(np.mean(values))
        assert np.ptp(values) > 0
    weights = list((tmp_path / "out" / "stages").glob("random-teacher-*.pth"))
    trained = torch.load(tmp_path / "teacher.pth", weights_only=True)["model"]
    (path,) = weights
    control = torch.load(path, weights_only=True)["model"]
    assert control.keys() == trained.keys()
    name = "backbone.fpn_output2.weight"
    assert not torch.equal(control[name], trained[name])
    taught = [rows[x]["results"]["0"]["bbox/AP"] for x in ("FitNet", "random-teacher")]
    assert taught[0] != taught[1]  # the same config would give the same bits

    def train(self: Any, stage: Stage) -> None:
        raise AssertionError(f"{stage.title} was trained again")

    monkeypatch.setattr(runner.Runner, "_train", train)
    assert run(tmp_path, config, "--seeds", "2") == 0
    assert "cost: 0 trainings, 0 iterations" in capsys.readouterr().out
    assert content(tmp_path) == found
    assert run(tmp_path, config, "--seeds", "2", "--margin", "-1") == 2
    assert "margin is 0.0, not -1.0. Keep it, or take" in capsys.readouterr().err
    assert content(tmp_path) == found


# ---- With trainings whose results are known.


class Fake:
    """Runs that write noisy annotations as their detections.

    Attributes:
        noise: pixels by arm.
        before: called before each run.
        ran: names and seeds of the runs that were not reused.
        measured: number of measurements of the step times.
        timed: the teacher's weights of the last measured trainings.
    """

    def __init__(self, shapes: Shapes, patch: pytest.MonkeyPatch):
        self.shapes, self.noise = shapes, {"FitNet": 2.0}
        self.ran: list[str] = []
        self.measured = 0
        self.timed: dict[str, str] = {}
        self.before: Callable[[Stage], None] = lambda stage: None
        fake = self

        def train(self: Any, stage: Stage) -> dict[str, float | None]:
            return fake.run(stage)

        def measure(cfgs: Mapping[str, Any], *_: Any) -> dict[str, float]:
            self.measured += 1  # every measurement gives another ratio
            self.timed = {k: x.MODEL.DISTILL.TEACHER.WEIGHTS for k, x in cfgs.items()}
            return {k: 0.1 + 0.1 * self.measured * (k == "FitNet") for k in cfgs}

        patch.setattr(runner.Runner, "run", train)
        patch.setattr(prove, "step_seconds", measure)
        # The command takes no fewer than 100 resamples, which would be most of the time.
        patch.setattr(detections, "resamples", lambda images, _, seed: resamples(images, 20, seed))

    def run(self, stage: Stage) -> dict[str, float | None]:
        path = stage.folder / "result.json"
        if path.is_file():
            found: dict[str, float | None] = json.loads(path.read_text())
            return found
        self.before(stage)
        self.ran.append(f"{stage.name} {stage.seed}")
        rng = np.random.default_rng([stage.seed, *stage.name.encode()])
        scale = self.noise.get(stage.name, 6.0)
        annotations = json.loads(Path(self.shapes[1]).read_text())["annotations"]
        boxes = [
            {
                **{k: x[k] for k in ("image_id", "category_id")},
                "bbox": np.maximum(x["bbox"] + rng.normal(scale=scale, size=4), 1).tolist(),
                "score": float(rng.uniform()),
            }
            for x in annotations
        ]
        (stage.folder / FILE).parent.mkdir(parents=True)
        (stage.folder / FILE).write_text(json.dumps(boxes))
        truth = load_truth(stage.cfg, self.shapes[0])
        metrics = coco_metrics(coco_evaluation(truth, load_results(truth, boxes, "")))
        result: dict[str, float | None] = {
            f"bbox/{k}": None if math.isnan(x) else 100 * x for k, x in metrics.items()
        }
        result |= {"seconds_per_step": scale, "threads": 1, "bbox/AP-a <b>": 1.0}
        path.write_text(json.dumps(result))
        return result


@pytest.fixture
def fake(shapes: Shapes, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(shapes, monkeypatch)


@pytest.mark.slow
def test_a_better_student_is_go_and_its_random_teacher_is_not(
    tmp_path: Path, shapes: Shapes, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    config = distillation_file(tmp_path, shapes)
    assert run(tmp_path, config) == 0
    found = content(tmp_path)
    assert found["verdict"] == "GO" and found["decision"]["seeds"] == 5
    assert found["random_teacher"]["verdict"] in ("NO-GO", "INCONCLUSIVE")
    assert fake.ran == [f"{arm} {seed}" for seed in range(5) for arm in ARMS]
    assert found["plan"]["iterations"]["equal-time"] == 6  # 0.2 s over 0.1 s, of 3 iterations
    for name, values in found["gains"].items():
        rows = [
            [x["bbox/AP"] for x in found["rows"][k]["results"].values()] for k in ("FitNet", name)
        ]
        assert values == [a - b for a, b in zip(*rows)]
        boot = found["details"]["bootstrap"][name]
        assert boot["gain"] == pytest.approx(np.mean(values)) and boot["low"] < boot["gain"]
    said = capsys.readouterr().out
    assert "cost: 20 trainings, 75 iterations, 0.0 hours" in said and "GO after 5 seeds" in said


@pytest.mark.slow
def test_a_look_saves_trainings(tmp_path: Path, shapes: Shapes, fake: Fake) -> None:
    config = distillation_file(tmp_path, shapes)
    fake.noise |= {"FitNet": 0.5, "baseline": 25.0, "equal-time": 25.0}
    assert run(tmp_path, config, "--looks", "3", "--first-seed", "7") == 0
    found = content(tmp_path)
    assert found["decision"]["seeds"] == 3 and found["plan"]["looks"] == [3, 5]
    assert fake.ran == [f"{arm} {seed}" for seed in (7, 8, 9) for arm in ARMS]
    assert all(len(x) == 3 for x in found["details"]["errors"].values())


@pytest.mark.slow
def test_a_teacher_of_its_own_is_trained_first_and_only_once(
    tmp_path: Path, shapes: Shapes, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    config = distillation_file(tmp_path, shapes)
    (tmp_path / "teacher.pth").unlink()
    assert run(tmp_path, config, "--seeds", "2", "--train-teacher") == 0
    assert fake.ran[:2] == ["teacher 0", "baseline 0"] and len(fake.ran) == 9
    assert [*fake.timed] == ["baseline", "FitNet", "teacher"]
    assert "random-teacher" in fake.timed["FitNet"]  # the other is not trained yet
    assert Path(fake.timed["FitNet"]).is_file()
    assert "cost: 9 trainings" in capsys.readouterr().out
    fresh = ("--seeds", "2", "--first-seed", "2")
    assert run(tmp_path, config, *fresh, "--train-teacher") == 0
    assert fake.ran[9:] == [f"{arm} {seed}" for seed in (2, 3) for arm in ARMS]


@pytest.mark.slow
def test_self_distillation_has_no_random_teacher(
    tmp_path: Path, shapes: Shapes, fake: Fake
) -> None:
    config = distillation_file(tmp_path, shapes, *PAFPN, "MODEL.DISTILL.HEADS", ("MSSD",))
    (tmp_path / "teacher.pth").unlink()
    assert run(tmp_path, config, "--seeds", "2") == 0
    found = content(tmp_path)
    assert [*found["rows"]] == ["baseline", "MSSD", "equal-time"]
    assert found["verdict"] and found["random_teacher"] is None


@pytest.mark.long
@pytest.mark.slow
def test_an_interrupted_proof_ends_with_the_same_numbers(
    tmp_path: Path, shapes: Shapes, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupt at the measurement, at every fourth run, and after all of them."""
    config = distillation_file(tmp_path, shapes)
    arguments = ("--seeds", "3", "--looks", "2")
    fake.noise.clear()  # so that no look ends early
    assert run(tmp_path, config, *arguments) == 0
    expected = content(tmp_path)
    assert expected["decision"]["seeds"] == 3
    (tmp_path / "out").rename(tmp_path / "whole")
    fake.measured, number = 0, len(fake.ran)

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    def at_every_fourth(stage: Stage) -> None:
        if len(fake.ran) % 4 == 0 and stage.title not in stops:
            stops.append(stage.title)
            raise KeyboardInterrupt

    stops: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(prove, "step_seconds", stopped)
        assert run(tmp_path, config, *arguments) == 130
    fake.ran.clear()
    fake.before = at_every_fourth
    for _ in range(3):
        assert run(tmp_path, config, *arguments) == 130
        assert content(tmp_path)["verdict"] is None
    with monkeypatch.context() as patch:
        patch.setattr(prove, "image_bootstrap", stopped)
        assert run(tmp_path, config, *arguments) == 130
    assert run(tmp_path, config, *arguments) == 0
    assert content(tmp_path) == expected
    assert len(stops) == 3 and len(fake.ran) == number == 12 and fake.measured == 1
    pages = [(tmp_path / x / "prove.html").read_bytes() for x in ("out", "whole")]
    assert pages[0] == pages[1]


@pytest.mark.slow
def test_a_failed_training_has_no_verdict_and_is_repeated(
    tmp_path: Path, shapes: Shapes, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(stage: Stage) -> None:
        if (stage.name, stage.seed) == (failing, 1):
            raise IndexError("out of <bounds>")

    config = distillation_file(tmp_path, shapes)
    arguments = ("--seeds", "3", "--looks", "2")
    # A look at the seeds that are left, 0 and 2, would be GO.
    fake.noise |= {"FitNet": 0.1, "baseline": 40.0, "equal-time": 40.0}
    fake.before, failing = fails, "equal-time"
    assert run(tmp_path, config, *arguments) == 1
    assert "no verdict, because a training failed" in capsys.readouterr().out
    found = content(tmp_path)
    assert found["verdict"] is None and len(fake.ran) == 7
    assert "out of <bounds>" in found["rows"]["equal-time"]["failures"]["1"]
    written = (tmp_path / "out" / "prove.html").read_text()
    assert "out of &lt;bounds&gt;" in written and "<bounds>" not in written
    failing = ""
    assert run(tmp_path, config, *arguments) == 0
    assert content(tmp_path)["verdict"] and fake.ran[7] == "equal-time 1"


@pytest.mark.slow
def test_seen_runs_keep_their_rule_and_fresh_seeds_may_have_another(
    tmp_path: Path, shapes: Shapes, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    config = distillation_file(tmp_path, shapes)
    assert run(tmp_path, config, "--seeds", "2") == 0
    before = (tmp_path / "out" / "prove.json").read_bytes()
    for other, key in (
        (["--seeds", "3"], "looks is [2], not [3]"),
        (["--seeds", "2", "--margin", "0.5"], "margin is 0.0, not 0.5"),
        (["--seeds", "2", "--metric", "bbox/AP50"], "metric is bbox/AP, not bbox/AP50"),
    ):
        capsys.readouterr()
        assert run(tmp_path, config, *other) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert key in line and line.startswith("error: The rule in ")
    assert (tmp_path / "out" / "prove.json").read_bytes() == before
    assert run(tmp_path, config, "--seeds", "3", "--first-seed", "2") == 0
    assert content(tmp_path)["plan"]["seeds"] == [2, 3, 4] and fake.measured == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "argument --seeds: '1' is not a whole number from 2"),
        (["--looks", "3,1"], "argument --looks: '1' is not a whole number from 2"),
        (["--margin", "nan"], "argument --margin: invalid finite value: 'nan'"),
    ],
)
def test_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prove", "--config-file", "any.yaml", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--looks", "6"], "--looks has 6, but --seeds is 5"),
        (["--metric", "bbox/PA"], "--metric: unknown value 'bbox/PA'"),
        (["MODEL.DISTILL.HEADS", "()"], "MODEL.DISTILL.HEADS is empty"),
        (
            ["DATALOADER.SEED", "0"],
            "DATALOADER.SEED is 0, but the seeds of a proof must see",
        ),
        (["MODEL.DISTILL.TEACHER.CACHE.DIR", "x"], "TEACHER.CACHE.DIR is set, but a proof counts"),
        (["MODEL.DISTILL.TEACHER.WEIGHTS", "gone.pth"], "gone.pth"),
    ],
)
def test_what_cannot_be_proved_ends_in_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    shapes: Shapes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path, distillation_file(tmp_path, shapes), *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out" / "prove.json").exists()


# ---- The schedule, and the page.


def test_the_longer_schedule_has_all_its_phases() -> None:
    cfg = get_distill_cfg()
    solver = cfg.SOLVER
    solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS = 1000, (600, 900), 100
    longer = prove.prolonged(cfg, 1.5).SOLVER
    assert (longer.MAX_ITER, longer.STEPS, longer.WARMUP_ITERS) == (1500, (900, 1350), 150)
    assert longer.CHECKPOINT_PERIOD == solver.CHECKPOINT_PERIOD and solver.MAX_ITER == 1000
    assert prove.prolonged(cfg, 1.0001).SOLVER.MAX_ITER == 1001  # rounded up
    assert prove.prolonged(cfg, 3).SOLVER.STEPS == (2200, 2800)  # as detectron2's 3x
    solver.MAX_ITER = 400
    assert prove.prolonged(cfg, 1.1).SOLVER.MAX_ITER == 440 < 400 * 1.1  # in binary
    solver.MAX_ITER = 1000
    solver.LR_SCHEDULER_NAME = "WarmupCosineLR"
    assert prove.prolonged(cfg, 2).SOLVER.STEPS == (600, 900)


def test_looks_rise_and_end_with_all_seeds() -> None:
    assert prove.looks([], 5) == (5,)
    assert prove.looks([4, 3, 5], 5) == (3, 4, 5)
    with pytest.raises(ConfigError, match="--looks has 6"):
        prove.looks([3, 6], 5)


class Sources(HTMLParser):
    """Addresses that a page names."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [str(x) for key, x in attributes if key in ("src", "href")]


@pytest.mark.slow
def test_the_page_needs_no_other_file_and_escapes_names(
    tmp_path: Path, shapes: Shapes, fake: Fake
) -> None:
    assert run(tmp_path, distillation_file(tmp_path, shapes), "--seeds", "2") == 0
    written = (tmp_path / "out" / "prove.html").read_text()
    sources = [x for x in Sources(written).found if x != "#main"]
    assert sources and all(x.startswith("data:image/png;base64,") for x in sources)
    assert "AP-a &lt;b&gt;" in written and "<b>" not in written
    for text in ("Kinds of errors", "Classes", "interval over test images", "APm", "BG: "):
        assert text in written
    report = content(tmp_path)
    report["details"] = {"problem": "There are <several> test sets."}
    text = page(report)
    assert "There is no bootstrap. There are &lt;several&gt; test sets." in text


def test_a_gain_needs_both_values_of_every_seed() -> None:
    assert gain_text([3.0, 5.0], [1.0, 2.0]) == "+2.5 [-3.9, 8.9]"
    assert gain_text([3.0, None], [1.0, 2.0]) == gain_text([], []) == "-"

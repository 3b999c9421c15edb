"""The comparison: paired runs, honest rows, and nothing trained twice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage, JSONWriter
from torch import Tensor

from distill import cli
from distill.experiments import compare, demo, paired, runner
from distill.experiments import shapes as shapes_data
from distill.experiments.compare_report import MethodTable, Row
from distill.heads import CWD
from distill.heads.base import DISTILL_HEAD_REGISTRY
from distill.utils.arguments import CommandParser
from distill.utils.progress import Progress
from tests.support.networks import PAFPN
from tests.support.trainings import distillation_file

Shapes = tuple[str, str, str]

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, config: str, *arguments: str) -> int:
    out = ("--out", str(folder / "out"))
    return cli.main(["compare", "--config-file", config, *out, *arguments])


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "comparison.json").read_text())


def not_a_number(self: Any, student: Any, teacher: Any) -> dict[str, Tensor]:
    zero = student.features["p2"].sum() * 0
    return {part: zero + float("nan") for part in self.parts}


@pytest.mark.slow
@pytest.mark.e2e
def test_a_method_that_fails_is_a_row_and_finished_runs_are_reused(
    tmp_path: Path, shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = distillation_file(tmp_path, shapes)
    heads = ["--heads", "CWD", "FitNet", "MaskLogitKD", "--seeds", "2"]
    override = ["--set", "FitNet", "MODEL.DISTILL.FITNET.WEIGHT", "0.0"]
    override += ["--set", "FitNet", "MODEL.DISTILL.FITNET.WARMUP_ITERS", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(CWD, "losses", not_a_number)
        assert run(tmp_path, config, *heads, *override) == 1
    found = content(tmp_path)
    rows = found["rows"]
    assert found["metric"] == "bbox/AP" and found["seeds"] == [0, 1]
    assert "compares masks" in rows["MaskLogitKD"]["failures"]["0"]
    assert "loss_cwd/p2 is nan" in rows["CWD"]["failures"]["1"] and not rows["CWD"]["results"]
    for name in ("baseline", "FitNet"):
        assert set(rows[name]["results"]) == {"0", "1"} and not rows[name]["failures"]
        assert all(x["seconds_per_step"] > 0 for x in rows[name]["results"].values())
    # A head at weight 0 is the student alone: the runs have the same start and images.
    for seed in (0, 1):
        assert same_weights(tmp_path, f"baseline-{seed}", f"FitNet-{seed}")
    adapters = 4 * (16 * 24 + 24) + (16 * 24 + 24)  # 1x1 convolutions of p2 to p6
    assert rows["FitNet"]["extra_parameters"] == adapters
    assert rows["baseline"]["results"]["0"]["peak_memory_mb"] is None  # on a CPU
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert "| MaskLogitKD | - | - |" in table and "GPU" not in table
    assert "FITNET.WARMUP_ITERS is 3 and SOLVER.MAX_ITER 3: what follows" in table
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 5_000

    trained: list[str] = []
    train = runner.Runner._train

    def watched(self: Any, stage: Any) -> None:
        trained.append(stage.title)
        train(self, stage)

    monkeypatch.setattr(runner.Runner, "_train", watched)
    heads.remove("MaskLogitKD")
    assert run(tmp_path, config, *heads, *override) == 0  # CWD is fixed
    assert trained == ["CWD (seed 0)", "CWD (seed 1)"]
    assert content(tmp_path)["rows"]["FitNet"] == rows["FitNet"]
    assert not same_weights(tmp_path, "baseline-0", "CWD-0")


def same_weights(folder: Path, *runs: str) -> bool:
    stages = folder / "out" / "stages"
    paths = [path for run in runs for path in stages.glob(f"{run}-*/model_final.pth")]
    a, b = (torch.load(path, weights_only=True)["model"] for path in paths)
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.e2e
def test_an_interrupted_comparison_goes_on(
    tmp_path: Path,
    shapes: Shapes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = distillation_file(tmp_path, shapes)
    seen: list[int] = []

    def interrupt(bar: Any) -> None:
        seen.append(bar.trainer.iter)
        if len(seen) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.ProgressHook, "after_step", interrupt)
    assert run(tmp_path, config, "--heads", "FitNet+ROIKD") == 130
    assert "start the same command again" in capsys.readouterr().err
    assert set(content(tmp_path)["rows"]["baseline"]["results"]) == {"0"}
    assert run(tmp_path, config, "--heads", "FitNet+ROIKD") == 0
    assert seen == [0, 1, 2, 0, 1, 2]  # from the checkpoint of iteration 1 on


@pytest.mark.slow
@pytest.mark.e2e
def test_all_heads_that_work_on_rendered_images_with_their_own_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)  # the config names its teacher from here
    monkeypatch.setattr(shapes_data, "SCENES", {"train": 5, "val": 2})
    names = ("FitNet", "MSSD", "MaskLogitKD", "IMA")  # the config has keys of IMA
    registered = {name: DISTILL_HEAD_REGISTRY.get(name) for name in names}
    monkeypatch.setattr(DISTILL_HEAD_REGISTRY, "_obj_map", registered)
    short = ("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "MODEL.ROI_BOX_HEAD.FC_DIM", "8")
    short += ("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8")
    config = demo.DISTILLED
    shallow = ("MODEL.BACKBONE.NAME", "build_shallow_resnet_fpn_backbone")
    teacher = [*short, *shallow, "MODEL.RESNETS.DEPTH", "10"]
    opts = ("MODEL.DISTILL.HEADS", "('FitNet',)", "MODEL.DISTILL.TEACHER.OPTS", str(teacher))
    assert run(tmp_path, config, "--shapes", "--tune", *short, *opts) == 0
    found = content(tmp_path)
    assert found["data_seed"] == 0 and found["seeds"] == [100]
    assert list(found["rows"]) == ["teacher", "baseline", "FitNet", "IMA"]
    assert set(found["skipped"]) == {"MSSD", "MaskLogitKD"}
    assert "bottom-up" in (tmp_path / "out" / "comparison.md").read_text()
    assert not found["rows"]["teacher"]["summary"].keys() & {"gain", "relative_cost"}
    said = capsys.readouterr().out
    assert said.index("left out: MSSD") < said.index("teacher (seed 100)")


def test_a_teacher_of_nothing_is_not_trained(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    config = distillation_file(tmp_path, shapes)
    assert run(tmp_path, config, "--train-teacher", "--heads", "MaskLogitKD") == 2
    assert "None of the methods works here: MaskLogitKD" in capsys.readouterr().err
    assert not (tmp_path / "out" / "stages").exists()


@pytest.mark.slow
@pytest.mark.e2e
def test_self_distillation_needs_no_teacher(tmp_path: Path, shapes: Shapes) -> None:
    config = distillation_file(tmp_path, shapes, *PAFPN)
    (tmp_path / "teacher.pth").unlink()
    assert run(tmp_path, config, "--heads", "MSSD") == 0
    assert content(tmp_path)["rows"]["MSSD"]["results"]["0"]["bbox/AP"] is not None


def test_rows_are_paired_by_seed_and_ranked() -> None:
    def measured(name: str, **ap: float) -> Row:
        results = {
            int(seed[1:]): {"bbox/AP": x, "seconds_per_step": 0.01 * x} for seed, x in ap.items()
        }
        return Row(name, 1234, results, {})

    good, bad = measured("good", s0=12.0, s1=24.0), measured("bad", s1=10.0)
    bad.failures[0] = "It has no | memory."
    never = Row("never", None, {}, {0: "No.", 1: "No."})
    alone = measured("baseline", s0=10.0, s1=20.0)
    bad.notes.append("Its warm-up never ends.")
    report = MethodTable("bbox/AP", None, alone, [never, bad, good], screening=[0, 1])
    assert [row.name for row in report.rows] == ["baseline", "good", "bad", "never"]
    assert report.costs(good) == {0: pytest.approx(1.2), 1: pytest.approx(1.2)}
    good.results[0]["threads"] = 8  # no other time of this seed is of 8
    assert report.costs(good) == {1: pytest.approx(1.2)}
    del good.results[0]["threads"]
    assert report.gains(good) == {0: 2.0, 1: 4.0} and report.gains(bad) == {1: -10.0}
    lines = report.markdown().splitlines()
    verdict = "+3.0 [-9.7, 15.7] | 2 | open: 4 seeds would decide"
    costs = "0.180 ± 0.085 | 1.20 ± 0.00 | 1,234"
    assert lines[3] == f"| good | 18.0 ± 8.5 | {verdict} | {costs} |  |"
    assert lines[4].endswith(
        "| -10.0 | 1 | open: one seed | 0.100 | 0.50 | 1,234 "
        "| Its warm-up never ends. Seed 0: It has no \\| memory. |"
    )
    assert lines[5] == "| never | - | - |  |  | - | - |  | No. |"
    gain = report.raw()["good"]["summary"]["gain"]
    assert gain == {"mean": 3.0, "std": pytest.approx(2**0.5), "values": {0: 2.0, 1: 4.0}}
    alone.results[0]["peak_memory_mb"] = 512.0
    assert "| GPU MiB |" in report.markdown()


def test_the_metric_is_that_of_the_task() -> None:
    boxes = {"bbox/AP": 1.0, "bbox/AP50": 2.0}
    assert paired.chosen_metric(None, boxes) == "bbox/AP"
    assert paired.chosen_metric(None, {**boxes, "segm/AP": 1.0}) == "segm/AP"
    assert paired.chosen_metric(None, {"a/bbox/AP": 1.0, "b/bbox/AP": 1.0}) == "a/bbox/AP"
    assert paired.chosen_metric("bbox/AP50", boxes) == "bbox/AP50"
    with pytest.raises(paired.ConfigError, match=r"--metric: unknown value 'AP'.*bbox/AP50"):
        paired.chosen_metric("AP", boxes)
    assert runner.flat({"x": {"bbox": {"AP": float("nan"), "APl": float("nan")}}}) == {
        "bbox/AP": 0.0,
        "bbox/APl": None,
    }


def test_the_reason_of_a_failure_is_a_sentence() -> None:
    log = Path("log.txt")
    memory = paired.reason(torch.OutOfMemoryError("CUDA out of memory."), log)
    assert memory.startswith("the GPU is out of memory") and "--resume" not in memory
    assert memory.endswith("and start the same command again.")
    crash = paired.reason(IndexError("index 7 is\nout of bounds"), log)
    assert crash == "IndexError: index 7 is out of bounds; the traceback is in log.txt."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "argument --seeds: '0' is not a whole number from 1"),
        (["--heads", "FitNet", "IMAA"], "unknown value 'IMAA'; did you mean IMA?"),
        (["--heads", "FitNet", "--set", "IMA", "SEED", "1"], "--set: unknown value 'IMA'"),
    ],
)
def test_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--config-file", "any.yaml", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_keys_may_stand_right_behind_the_heads() -> None:
    parser = CommandParser()
    compare.add_arguments(parser)
    heads = ("--heads", "IMA", "CWD", "SEED", "-1", "--seeds", "2", "A.B", "c")
    args = parser.parse_args(["--config-file", "any.yaml", *heads])
    compare.split_overrides(args, "heads")
    assert args.heads == ["IMA", "CWD"] and args.opts == ["SEED", "-1", "A.B", "c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL.DISTILL.HEADS", "()"], "MODEL.DISTILL.HEADS is empty"),
        (["MODEL.DISTILL.INHERIT", "('neck',)"], "MODEL.DISTILL.INHERIT is ('neck',)"),
        (["DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
        (
            ["--heads", "MaskLogitKD"],
            "None of the methods works here: MaskLogitKD: it compares masks",
        ),
        (
            ["--heads", "FitNet", "--set", "FitNet", "MODEL.DISTILL.FITNET.WIGHT", "1"],
            "Unknown config key 'MODEL.DISTILL.FITNET.WIGHT' in --set FitNet",
        ),
        (["MODEL.DISTILL.TEACHER.WEIGHTS", "gone.pth"], "gone.pth"),
    ],
)
def test_what_cannot_be_compared_ends_in_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    shapes: Shapes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path, distillation_file(tmp_path, shapes), *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_run_is_keyed_by_the_files_that_it_names(tmp_path: Path, shapes: Shapes) -> None:
    cfg = paired.configure(distillation_file(tmp_path, shapes), [])
    kept = runner.Runner(tmp_path, Progress())
    method = compare.method_config(cfg, "FitNet", [])
    alone = paired.student_alone(cfg)
    before = [kept.describe("x", 0, c).folder for c in (method, alone)]
    (tmp_path / "teacher.pth").write_bytes(b"another teacher")
    after = [kept.describe("x", 0, c).folder for c in (method, alone)]
    assert before[0] != after[0] and before[1] == after[1]
    other = compare.method_config(cfg, "FitNet", ["MODEL.DISTILL.IMA.WEIGHT", 2.0])
    assert kept.describe("x", 0, other).folder == after[0]  # which FitNet does not read
    yaml = tmp_path / "teacher.yaml"  # that names its weights itself, as a student.yaml does
    yaml.write_text(f"MODEL: {{WEIGHTS: {tmp_path / 'teacher.pth'}}}\n")
    teacher = "MODEL.DISTILL.TEACHER"
    named = compare.method_config(
        cfg, "FitNet", [f"{teacher}.CONFIG_FILE", str(yaml), f"{teacher}.WEIGHTS", ""]
    )
    before = [kept.describe("x", 0, named).folder]
    (tmp_path / "teacher.pth").write_bytes(b"a third teacher")
    assert kept.describe("x", 0, named).folder not in before


def test_a_row_says_that_its_weights_are_constants() -> None:
    cfg = compare.get_distill_cfg()
    weight = ["MODEL.DISTILL.FITNET.WEIGHT", 2.0]
    assert compare.remarks(compare.method_config(cfg, "FitNet", [])) == []
    assert compare.remarks(compare.method_config(cfg, "IMA", weight)) == []
    assert compare.remarks(compare.method_config(cfg, "FitNet", weight)) == [
        "Its weights are constants."
    ]


def test_a_teacher_of_the_model_zoo_is_trained_from_where_its_training_begins() -> None:
    cfg = compare.get_distill_cfg()
    cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    weights = paired.teachers_own_config(cfg).MODEL.WEIGHTS
    assert weights == "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    assert paired.teacher_config(cfg).MODEL.WEIGHTS.endswith("model_final_b275ba.pkl")


def test_the_cost_of_a_training_is_that_of_its_log(tmp_path: Path) -> None:
    log = JSONWriter(str(tmp_path / "metrics.json"), window_size=1)
    with EventStorage() as storage:
        for iteration, seconds in enumerate((0.5, 0.1, 0.2, 0.3)):
            storage.iter = iteration
            storage.put_scalars(time=seconds, memory_mb=100.0 - iteration)
            if iteration != 1:  # no objects: detectron2 writes the older value into its own row
                storage.put_scalar("fast_rcnn/fg_cls_accuracy", 0.5)
            if iteration % 2:
                log.write()
    log.close()
    cfg = compare.get_distill_cfg()
    stage = runner.Stage("x", 0, cfg, tmp_path)
    own = {"seconds_per_step": 0.2, "threads": torch.get_num_threads()}
    for cfg.MODEL.DEVICE, memory in (("cuda", 99.0), ("cpu", None)):
        assert runner.training_cost(stage) == {**own, "peak_memory_mb": memory}

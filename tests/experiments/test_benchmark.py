"""The benchmark runs on a tiny student, with and without a teacher, and reports what it says."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import cli
from distill.experiments.benchmark import gpu_check, memory
from distill.experiments.benchmark.heads import LargestTensor
from tests.support.networks import PAFPN, distill_opts, tiny_cfg, write_config
from tests.support.trainings import Shapes, trainable_cfg, write_teacher


def arguments(folder: Path, *opts: object) -> list[str]:
    """A config file of a tiny Faster R-CNN, with a registered data set that nobody opens."""
    sets = "('coco_2017_val',)"
    path = write_config(tiny_cfg("faster"), folder / "tiny.yaml")
    data = ["DATASETS.TRAIN", sets, "DATASETS.TEST", "()"]
    common = ["--config-file", str(path), "--size", "64x64", "--repeats", "1"]
    return ["benchmark", *common, "--json", *map(str, opts), *data]


def measured(capsys: pytest.CaptureFixture[str], part: str) -> Any:
    """The rows of a part of the only config."""
    (parts,) = json.loads(capsys.readouterr().out)["measured"].values()
    assert set(parts) == {part}
    return parts[part]


@pytest.mark.slow
def test_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("FitNet", "TID")
    opts = [*distill_opts("faster", names), *write_teacher(tmp_path, "faster")]
    assert cli.main(arguments(tmp_path, *opts)) == 0
    rows = measured(capsys, "steps")
    assert set(rows) == {*names, "all"}
    for row in rows.values():
        plain, teacher, distilled = (row[k]["median"] for k in ("plain", "teacher", "distilled"))
        assert row["ratio"]["median"] == pytest.approx(distilled / (plain + teacher))
        assert 0 < row["plain_mib"] < row["distilled_mib"]


def test_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("FitNet", "TID")
    opts = [*distill_opts("faster", names), *write_teacher(tmp_path, "faster")]
    flags = ["--parts", "heads", "--objects", 3]
    assert cli.main(arguments(tmp_path, *flags, *opts)) == 0
    rows = measured(capsys, "heads")
    assert set(rows) == {*names}
    for row in rows.values():
        times = row["head"]["median"], row["backbone"]["median"]
        assert row["ratio"]["median"] == pytest.approx(times[0] / times[1])
        assert row["largest"] > 0 and row["kept"] > 0


def test_named_heads_and_all_that_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opts = [*distill_opts("faster", ()), *write_teacher(tmp_path, "faster")]
    assert cli.main(arguments(tmp_path, "--parts", "heads", "--heads", "PKD", *opts)) == 0
    assert set(measured(capsys, "heads")) == {"PKD"}
    assert cli.main(arguments(tmp_path, "--parts", "heads", "--heads", "all", *opts)) == 0
    assert {"PKD", "ROIKD", "DenseKD"} < set(rows := measured(capsys, "heads"))
    assert not {"PixelKD", "MSSD"} & set(rows)
    assert cli.main(arguments(tmp_path, "--heads", "PKDD", *opts)) == 2
    assert "--heads: unknown value 'PKDD'; did you mean PKD?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_cost_of_a_balance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opts = [*distill_opts("faster", ("FitNet", "TID")), *write_teacher(tmp_path, "faster")]
    opts += ["MODEL.DISTILL.BALANCE.MODE", "gradient"]
    assert cli.main(arguments(tmp_path, *opts)) == 0
    rows = measured(capsys, "steps")
    assert set(rows) == {"FitNet", "TID", "all"}
    for row in rows.values():
        assert row["overhead"] == pytest.approx(row["balanced"] / row["distilled"]["median"])


def test_self_distillation_has_no_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opts = [*distill_opts("faster", ("MSSD",)), *PAFPN]
    assert cli.main(arguments(tmp_path, "--parts", "heads", *opts)) == 0
    assert 0 < measured(capsys, "heads")["MSSD"]["largest"] <= 2


LOSSES = ["--losses", "--size", "128x256", "--batch", "1", "--repeats", "1", "--json"]


def test_losses_need_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benchmark", *LOSSES]) == 0
    rows = measured(capsys, "losses")
    assert rows["mse"]["ratio"]["median"] == 1 and {"pkd", "cwd", "fgd, 500 objects"} < set(rows)
    mse = rows["mse"]["seconds"]["median"]
    for row in rows.values():
        assert row["ratio"]["median"] == pytest.approx(row["seconds"]["median"] / mse)
    assert cli.main(["benchmark", "--json"]) == 2
    assert (
        "name what to measure: --config-file FILE, --losses or --gpu-check."
        in capsys.readouterr().err
    )


def test_a_table_is_a_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row that is slower than the table fails; one that is faster does not."""
    table = tmp_path / "table.json"
    check = ["benchmark", *LOSSES, "--check", str(table)]

    def write(**rows: float) -> None:
        values = {name: {"ratio": {"median": x, "iqr": 0}} for name, x in rows.items()}
        table.write_text(json.dumps({"measured": {"losses": {"losses": values}}}))

    write(pkd=1000, cwd=1000)
    assert cli.main(check) == 0
    assert "all 2 ratios are at most 25% above the table" in capsys.readouterr().out
    write(pkd=1000, cwd=0.01)
    assert cli.main(check) == 1
    out = capsys.readouterr().out
    assert (
        "losses: cwd: the ratio is" in out and "the table says 0.01" in out and "pkd: " not in out
    )
    write(other=1)
    assert cli.main(check) == 2
    assert "losses: other was not measured" in capsys.readouterr().err
    write()
    assert cli.main(check) == 2
    table.write_text("[")
    assert cli.main(check) == 2
    assert "is no file of `distill benchmark --json`" in capsys.readouterr().err
    table.unlink()
    assert cli.main(check) == 2
    assert "No such file" in capsys.readouterr().err


def test_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opts = [*distill_opts("faster", ("FitNet",)), *write_teacher(tmp_path, "faster")]
    path = tmp_path / "trace.json"
    assert cli.main(arguments(tmp_path, "--parts", "heads", "--trace", path, *opts)) == 0
    names = {x["name"] for x in json.loads(path.read_text())["traceEvents"] if "name" in x}
    assert {"aten::convolution", "[memory]"} <= names


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    def call() -> None:
        for _ in range(3):
            torch.empty(2**18)  # 1 MiB
        kept = [torch.empty(2**18) for _ in range(4)]
        del kept

    assert memory.peak_mebibytes(call, cuda=False) == pytest.approx(4, abs=0.1)


@pytest.mark.slow
def test_parts_on_images(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = trainable_cfg("retinanet", shapes, tmp_path / "out", "DATASETS.TEST", shapes[:1])
    path = str(write_config(cfg, tmp_path / "own.yaml"))
    parts = ["--parts", "training", "data", "evaluation", "--repeats", "3", "--json"]
    assert cli.main(["benchmark", "--config-file", path, *parts]) == 0
    (found,) = json.loads(capsys.readouterr().out)["measured"].values()
    assert set(found["data"]) == {"decode", "mapper", "loader", "detectron2"}
    assert set(found["evaluation"]) == {"load", "network", "collect", "metrics"}
    training = found.pop("training")
    assert set(training) == {"data", "step", "hooks"}
    assert 0 < training["hooks"]["share"] < 1
    for rows in found.values():
        assert all(row["milliseconds"]["median"] > 0 for row in rows.values())


NARROW = [
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.FPN.OUT_CHANNELS", 16),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20),
]


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.slow
def test_the_check_of_a_gpu_runs_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but torch.compile, which takes long."""
    variants = {k: x for k, x in gpu_check.VARIANTS.items() if "compiled" not in k}
    monkeypatch.setattr(gpu_check, "VARIANTS", variants)
    teacher = ["MODEL.DISTILL.TEACHER.OPTS", repr([str(x) for x in NARROW])]
    options = ["--gpu-check", "--size", "64x64", "--batch", "1", "--repeats", "1", "--json"]
    assert cli.main(["benchmark", *options, *map(str, NARROW), *teacher]) == 0
    (found,) = json.loads(capsys.readouterr().out)["measured"].values()
    precision = found["precision"]
    assert precision["float32"]["difference"] == 0
    assert 0 < precision["bfloat16 teacher"]["difference"] < 0.5
    assert precision["channels-last teacher"]["difference"] < 1e-3
    assert all(row["finite"] for row in precision.values())
    assert all(row["equal"] for row in found["cache"].values())
    assert set(found["synchronisations"]) == {"student", *gpu_check.HEADS}
    assert set(found["steps"]) == {*gpu_check.HEADS, "all"}


def test_waits_for_a_gpu_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> None:
        for _ in range(3):  # torch says this of each such operation
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert gpu_check._waits(step, cuda=True) == 3
    assert modes == ["warn", "default"]


def test_the_largest_tensor_counts_complex_ones_twice_and_no_views() -> None:
    x = torch.ones(2, 8, 8, requires_grad=True)
    with LargestTensor() as mode:
        x.expand(100, 2, 8, 8).sum(0)
    assert mode.numel == 2 * 8 * 8
    with LargestTensor() as mode:
        torch.fft.fft2(x)
    assert mode.numel == 2 * 2 * 8 * 8

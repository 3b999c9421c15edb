"""The benchmark runs on a tiny student, with and without a teacher, and reports what it says."""

import json
from pathlib import Path

import pytest
import torch

from distill import cli
from distill.experiments import benchmark
from tests.support.networks import PAFPN, distill_opts, tiny_cfg, write_config
from tests.support.trainings import write_teacher


def arguments(folder: Path, *opts: object) -> list[str]:
    """A config file of a tiny Faster R-CNN, with a registered data set that nobody opens."""
    sets = "('coco_2017_val',)"
    path = write_config(tiny_cfg("faster"), folder / "tiny.yaml")
    data = ["DATASETS.TRAIN", sets, "DATASETS.TEST", "()"]
    common = ["--config-file", str(path), "--size", "64x64", "--repeats", "1"]
    return ["benchmark", *common, "--json", *map(str, opts), *data]


@pytest.mark.parametrize("only", [True, False])
def test_heads_with_a_teacher(
    tmp_path: Path, only: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("FitNet", "TID")
    opts = [*distill_opts("faster", names), *write_teacher(tmp_path, "faster")]
    flags = ["--heads-only", "--objects", 3] if only else []
    assert cli.main(arguments(tmp_path, *flags, *opts)) == 0
    medians = json.loads(capsys.readouterr().out)["medians"]
    assert set(medians) == ({*names} if only else {*names, "all"})
    for row in medians.values():
        assert all(value > 0 for value in row.values())
        time, reference = (
            (row["head"], row["backbone"])
            if only
            else (row["distilled"], row["plain"] + row["teacher"])
        )
        assert row["ratio"] == pytest.approx(time / reference)


def test_the_cost_of_a_balance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opts = [*distill_opts("faster", ("FitNet", "TID")), *write_teacher(tmp_path, "faster")]
    opts += ["MODEL.DISTILL.BALANCE.MODE", "gradient"]
    assert cli.main(arguments(tmp_path, *opts)) == 0
    medians = json.loads(capsys.readouterr().out)["medians"]
    assert set(medians) == {"FitNet", "TID", "all"}
    for row in medians.values():
        assert row["overhead"] == pytest.approx(row["balanced"] / row["distilled"])


def test_self_distillation_has_no_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opts = [*distill_opts("faster", ("MSSD",)), *PAFPN]
    assert cli.main(arguments(tmp_path, "--heads-only", *opts)) == 0
    medians = json.loads(capsys.readouterr().out)["medians"]
    assert 0 < medians["MSSD"]["largest"] <= 2


def test_losses_need_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--losses", "--size", "128x256", "--batch", "1", "--repeats", "1", "--json"]
    assert cli.main(["benchmark", *options]) == 0
    medians = json.loads(capsys.readouterr().out)["medians"]
    assert medians["mse"]["ratio"] == 1 and {"pkd", "cwd", "fgd, 500 objects"} < set(medians)
    for row in medians.values():
        assert row["ratio"] == pytest.approx(row["seconds"] / medians["mse"]["seconds"])
    assert cli.main(["benchmark", "--json"]) == 2
    assert "name what to measure: --config-file FILE, or --losses." in capsys.readouterr().err


def test_the_largest_tensor_counts_complex_ones_twice_and_no_views() -> None:
    x = torch.ones(2, 8, 8, requires_grad=True)
    with benchmark.LargestTensor() as mode:
        x.expand(100, 2, 8, 8).sum(0)
    assert mode.numel == 2 * 8 * 8
    with benchmark.LargestTensor() as mode:
        torch.fft.fft2(x)
    assert mode.numel == 2 * 2 * 8 * 8

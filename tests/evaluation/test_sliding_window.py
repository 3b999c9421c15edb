"""Test evaluation by overlapping windows against loops over single pixels."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from distill.config import student_config, validate_config
from distill.data.shapes import LAYOUTS, SceneConfig
from distill.engine import Trainer, setup_config
from distill.errors import ConfigError
from distill.evaluation.sliding_window import SlidingWindow, starts, with_sliding_window
from distill.launch.main import main
from tests.support.networks import outspoken_model, tiny_cfg
from tests.support.processes import call, starts_processes
from tests.support.trainings import trainable_cfg


def segmenter(*opts: Any) -> nn.Module:
    return outspoken_model("semantic", *opts).eval()


def batch(height: int, width: int) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(height * width)
    return [{"image": torch.randint(0, 256, (3, height, width), generator=g).float()}]


def naive(
    model: nn.Module, image: Tensor, crop: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """Compute every pixel as the mean of the windows that contain it."""
    height, width = image.shape[1:]
    corners = {
        (min(i, max(height - crop[0], 0)), min(j, max(width - crop[1], 0)))
        for i in range(0, height, stride[0])
        for j in range(0, width, stride[1])
    }
    windows = []
    for top, left in corners:
        part = image[:, top : top + crop[0], left : left + crop[1]]
        with torch.no_grad():
            windows.append((top, left, model([{"image": part}])[0]["sem_seg"]))
    mean = torch.empty(len(windows[0][2]), height, width)
    for y in range(height):
        for x in range(width):
            holding = [
                logits[:, y - top, x - left]
                for top, left, logits in windows
                if 0 <= y - top < logits.shape[1] and 0 <= x - left < logits.shape[2]
            ]
            mean[:, y, x] = torch.stack(holding).mean(0)
    return mean


@pytest.mark.parametrize(
    "length, window, stride, expected",
    [
        (1024, 512, 256, [0, 256, 512]),
        (2048, 1024, 683, [0, 683, 1024]),
        (10, 4, 4, [0, 4, 6]),
        (8, 4, 4, [0, 4]),
        (4, 4, 1, [0]),
        (3, 4, 2, [0]),
        (5, 1, 1, [0, 1, 2, 3, 4]),
    ],
)
def test_where_windows_start(length: int, window: int, stride: int, expected: list[int]) -> None:
    assert starts(length, window, stride) == expected


@pytest.mark.parametrize("size", [(64, 96), (63, 97), (40, 70)])
@pytest.mark.parametrize("output", [{}, {"height": 51, "width": 77}])
def test_one_window_is_the_single_pass(size: tuple[int, int], output: dict[str, int]) -> None:
    model, inputs = segmenter(), [batch(*size)[0] | output]
    with torch.no_grad():
        (expected,) = model(inputs)
    (got,) = SlidingWindow(model, (64, 97), (32, 32))(inputs)
    assert torch.equal(got["sem_seg"], expected["sem_seg"])


@pytest.mark.parametrize(
    "size, crop, stride",
    [
        ((64, 96), (32, 32), (16, 32)),
        ((37, 51), (32, 32), (20, 17)),
        ((33, 70), (64, 33), (1, 32)),
    ],
)
def test_windows_against_loops(size: Any, crop: Any, stride: Any) -> None:
    model, inputs = segmenter(), batch(*size)
    (got,) = SlidingWindow(model, crop, stride)(inputs)
    expected = naive(model, inputs[0]["image"], crop, stride)
    assert got["sem_seg"].dtype == torch.float32
    torch.testing.assert_close(got["sem_seg"], expected)


def test_several_images_of_other_sizes() -> None:
    model = SlidingWindow(segmenter(), (32, 32), (16, 16))
    inputs = [*batch(40, 50), *batch(50, 33)]
    together = model(inputs)
    assert [x["sem_seg"].shape[1:] for x in together] == [(40, 50), (50, 33)]
    for one, output in zip(inputs, together):
        assert torch.equal(model([one])[0]["sem_seg"], output["sem_seg"])


def test_modes_reach_the_network() -> None:
    """detectron2 evaluates in eval mode and then restores the previous mode."""
    model = segmenter().train()
    wrapped = SlidingWindow(model, (32, 32), (16, 16))
    assert wrapped.training
    wrapped.eval()
    assert not model.training
    assert not SlidingWindow(model, (32, 32), (16, 16)).training


def test_only_if_configured() -> None:
    cfg, model = tiny_cfg("semantic"), segmenter()
    assert with_sliding_window(cfg, model) is model
    cfg.TEST.SLIDING_WINDOW.ENABLED = True
    wrapped = with_sliding_window(cfg, model)
    assert isinstance(wrapped, SlidingWindow)
    assert (wrapped.crop_size, wrapped.stride) == ((512, 1024), (256, 512))
    assert with_sliding_window(student_config(cfg), model) is model  # a stock config


def test_the_trainer_evaluates_by_windows(
    shapes: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opts = ("TEST.SLIDING_WINDOW.ENABLED", True, "TEST.SLIDING_WINDOW.CROP_SIZE", [32, 32])
    opts += ("TEST.SLIDING_WINDOW.STRIDE", [16, 16], "DATASETS.TEST", (shapes[0],))
    cfg = trainable_cfg("semantic", shapes, tmp_path, *opts)
    seen = []

    def inference(model: nn.Module, *_: Any) -> dict[str, Any]:
        seen.append(model)
        return {}

    monkeypatch.setattr("detectron2.engine.defaults.inference_on_dataset", inference)
    Trainer.test(cfg, segmenter())
    assert isinstance(seen[0], SlidingWindow) and not isinstance(seen[0].model, SlidingWindow)


@pytest.mark.parametrize(
    "opts, word",
    [
        (["TEST.SLIDING_WINDOW.CROP_SIZE", [512]], r"CROP_SIZE.*height and a width"),
        (["TEST.SLIDING_WINDOW.STRIDE", [0, 512]], "STRIDE.*whole numbers"),
        (["TEST.SLIDING_WINDOW.STRIDE", [256, 2048]], "STRIDE.*CROP_SIZE"),
    ],
)
def test_wrong_values(opts: list[Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        validate_config(tiny_cfg("semantic", *opts), training=False)


def test_detectors_have_no_windows() -> None:
    with pytest.raises(ConfigError, match=r"SLIDING_WINDOW.*SemanticSegmentor"):
        validate_config(tiny_cfg("faster", "TEST.SLIDING_WINDOW.ENABLED", True), training=False)


ROOT = Path(__file__).parents[2]
PSPNET = str(ROOT / "configs/Cityscapes-SemanticSegmentation/pspnet_R_18.yaml")


def run_and_print_the_peak_memory(argv: list[str], folder: Path) -> int:
    """Run and print the peak of this process; getrusage would include that of its parent."""
    os.chdir(folder)
    code = main(argv)
    print(re.search(r"VmHWM.*", Path("/proc/self/status").read_text())[0])  # type: ignore[index]
    return code


@pytest.mark.long
@pytest.mark.slow
@starts_processes
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_of_the_evaluation_of_cityscapes(tmp_path: Path) -> None:
    """Run the whole command: PSPNet-R18 on an image of 1024x2048, with Cityscapes' own script."""
    scene = SceneConfig(height=1024, width=2048)
    LAYOUTS["cityscapes"](tmp_path / "datasets" / "cityscapes", "val", 1, 0, scene)
    cpu = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"]
    model = build_model(setup_config(PSPNET, cpu))
    torch.save({"model": model.state_dict()}, tmp_path / "random.pth")
    opts = [*cpu, "MODEL.WEIGHTS", str(tmp_path / "random.pth"), "OUTPUT_DIR", str(tmp_path)]
    opts += ["TEST.SLIDING_WINDOW.ENABLED", "True"]
    opts += ["TEST.SLIDING_WINDOW.STRIDE", "[512, 1024]"]  # four windows need as much as nine
    argv = ["--eval-only", "--config-file", PSPNET, *opts]
    result = call(run_and_print_the_peak_memory, argv, tmp_path, folder=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "mIoU_present" in result.stdout
    peak = int(result.stdout.split("VmHWM:")[1].split()[0])
    assert peak < 3 * 1024**2

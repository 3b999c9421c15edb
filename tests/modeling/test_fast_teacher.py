"""TEACHER.DTYPE, CHANNELS_LAST and COMPILE: how close the losses stay."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.errors import ConfigError
from distill.modeling.meta_arch import build_distill_model
from tests.support.networks import distill_opts, image_dict, kd_losses, tiny_cfg
from tests.support.trainings import write_teacher

TEACHER = "MODEL.DISTILL.TEACHER"
DTYPE, CHANNELS_LAST, COMPILE = (f"{TEACHER}.{x}" for x in ("DTYPE", "CHANNELS_LAST", "COMPILE"))
HEADS = {
    "mask": ("FitNet", "ROIKD", "MaskKD", "MKD"),
    "retinanet": ("IMA", "TID", "DenseKD"),
    "semantic": ("CWD", "PixelKD"),
}
# Relative tolerance of each loss.
BF16, FP16, REORDERED = 0.05, 0.02, 1e-4


def distilled(family: str, folder: Path, *opts: Any) -> Any:
    teacher = write_teacher(folder, family)
    cfg = tiny_cfg(family, *distill_opts(family, HEADS[family]), *teacher, *opts)
    torch.manual_seed(0)
    return build_distill_model(cfg).train()


def losses_of(model: Any, family: str, half: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(1)  # the regions are sampled
    images = [image_dict(k, 64, 96, semantic=family == "semantic") for k in range(2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        return kd_losses(model, images)


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize(
    ("opts", "tolerance"),
    [
        ((DTYPE, "float32"), 0.0),
        ((DTYPE, "bfloat16"), BF16),
        ((DTYPE, "float16"), FP16),
        ((CHANNELS_LAST, True), REORDERED),
    ],
)
def test_losses_stay(family: str, opts: tuple[Any, ...], tolerance: float, tmp_path: Path) -> None:
    plain = losses_of(distilled(family, tmp_path), family)
    fast = losses_of(distilled(family, tmp_path, *opts), family)
    assert fast.keys() == plain.keys()
    for name, x in plain.items():
        torch.testing.assert_close(fast[name], x, rtol=tolerance, atol=tolerance * 1e-3)
        assert x > 0
    if opts[0] == DTYPE and tolerance:
        assert any(not torch.equal(fast[k], x) for k, x in plain.items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)],
)
def test_the_teacher_has_its_own_precision(
    name: str, expected: torch.dtype, tmp_path: Path
) -> None:
    """Whatever the precision of the student's forward is, which here is half."""
    model = distilled("retinanet", tmp_path, DTYPE, name)
    seen = {}
    model.teacher.model.backbone.register_forward_hook(
        lambda _, __, maps: seen.update({k: (x.dtype, x.requires_grad) for k, x in maps.items()})
    )
    losses = losses_of(model, "retinanet", half=True)
    assert set(seen.values()) == {(expected, False)}
    assert all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()


def test_channels_last_reaches_the_convolutions(tmp_path: Path) -> None:
    """Heads see contiguous maps."""
    model = distilled("retinanet", tmp_path, CHANNELS_LAST, True)
    seen = []
    for module in model.teacher.model.backbone.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    losses_of(model, "retinanet")
    assert seen and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    maps = model.teacher._computed(torch.rand(1, 3, 64, 64))
    assert all(x.is_contiguous() for x in maps.values())


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_losses_of_a_compiled_teacher_stay(tmp_path: Path) -> None:
    plain = losses_of(distilled("retinanet", tmp_path), "retinanet")
    model = distilled("retinanet", tmp_path, COMPILE, True)
    fast = losses_of(model, "retinanet")
    for name, x in plain.items():
        torch.testing.assert_close(fast[name], x, rtol=REORDERED, atol=1e-7)
    names = {x for x in model.teacher.model.state_dict() if "_orig_mod" in x}
    assert not names  # a checkpoint of it would have other keys


@pytest.mark.slow
def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    torch._dynamo.reset()
    model = distilled("retinanet", tmp_path, COMPILE, True)
    with pytest.raises(ConfigError, match=r"TEACHER\.COMPILE: torch\.compile fails \(.*False\.$"):
        losses_of(model, "retinanet")


def test_the_teacher_stops_with_its_last_head(tmp_path: Path) -> None:
    stops = ("MODEL.DISTILL.IMA.STOP_ITER", 3, "MODEL.DISTILL.TID.STOP_ITER", 5)
    model = distilled("retinanet", tmp_path, *stops, "MODEL.DISTILL.DENSEKD.STOP_ITER", 5)
    calls = []
    model.teacher.model.backbone.register_forward_hook(lambda *args: calls.append(1))
    images = [image_dict(0, 64, 64)]
    for iteration, expected in ((2, 1), (4, 2), (5, 2), (6, 2)):
        kd_losses(model, images, iteration)
        assert len(calls) == expected

"""Weights in files of other tools, and starts from files that do not fit."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.checkpoint.formats import unwrapped, without_prefix
from distill.checkpoint.load import SafeCheckpointer, load_strictly, readable
from distill.engine import Trainer
from distill.errors import WeightsError
from tests.support.networks import tiny_model
from tests.support.trainings import Shapes, trainable_cfg


def network(fill: float = 0.0) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    for x in net.parameters():
        nn.init.constant_(x, fill)
    return net


def state(prefix: str = "", fill: float = 5.0) -> dict[str, Tensor]:
    return {prefix + name: x for name, x in network(fill).state_dict().items()}


def loaded(content: Any, folder: Path, name: str = "x.pth") -> nn.Module:
    if name.endswith(".safetensors"):
        save_file(content, folder / name)
    else:
        torch.save(content, folder / name)
    net = network()
    load_strictly(net, str(folder / name), "KEY")
    return net


WRAPPED: dict[str, Any] = {
    "detectron2": {"model": state(), "optimizer": {}},
    "a bare state dict": state(),
    "Lightning": {"state_dict": state("model."), "epoch": 3},
    "an average": {"ema_state": state(), "step": 1},
    "DataParallel": state("module."),
    "mmrazor": {"state_dict": state("architecture.")},
    "a student and other things": {"model": {**state("student."), "loss.scale": torch.ones(1)}},
    "two prefixes, one of which fits": {"model": {**state("teacher."), "head.x": torch.ones(1)}},
    "a deep prefix": {"state_dict": state("module.student.net.")},
    "timm": {"model": state(), "model_ema": state(fill=9.0)},
}


@pytest.mark.parametrize("case", WRAPPED)
def test_a_wrapped_file(case: str, tmp_path: Path) -> None:
    assert all((x == 5).all() for x in loaded(WRAPPED[case], tmp_path).parameters())


@pytest.mark.parametrize("prefix", ["", "student."])
def test_safetensors(prefix: str, tmp_path: Path) -> None:
    net = loaded(state(prefix), tmp_path, "x.safetensors")
    assert all((x == 5).all() for x in net.parameters())


AMBIGUOUS: dict[str, tuple[Any, list[str]]] = {
    "a teacher and a student": (
        {"model": {**state("teacher."), **state("student.")}},
        ["'teacher.' (7)", "'student.' (7)", "save the weights that you mean"],
    ),
    "weights and their average": (
        {"state_dict": state(), "model_ema": state()},
        ["several sets of weights (state_dict, model_ema)"],
    ),
    "no weights": ({"epoch": 3, "args": {}}, ["holds no weights", "'epoch', 'args'"]),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_an_ambiguous_file(case: str, tmp_path: Path) -> None:
    content, words = AMBIGUOUS[case]
    with pytest.raises(WeightsError) as e:
        loaded(content, tmp_path)
    assert str(e.value).startswith("KEY: ") and all(x in str(e.value) for x in words), e.value


def test_what_a_prefix_leaves_out_is_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded({**state("net."), "loss.scale": torch.ones(1)}, tmp_path)
    assert "Only the tensors with the prefix 'net.' are read, not loss.scale" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        loaded(state("net."), tmp_path)
    assert not caplog.text


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_those_of_the_network(
    dtype: torch.dtype, name: str, tmp_path: Path
) -> None:
    """A third is another number in each."""
    content = {k: x.to(dtype) if x.is_floating_point() else x for k, x in state(fill=1 / 3).items()}
    third = torch.tensor(1 / 3).to(dtype).float()
    for x in loaded(content, tmp_path, name).parameters():
        assert x.dtype == torch.float32 and (x == third).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    content = {**state(), "0.bias": torch.ones(4).to(dtype)}
    with pytest.raises(
        WeightsError, match=rf"0\.bias is of {dtype} where torch\.float32 is needed"
    ):
        loaded(content, tmp_path)


# Names of real files of torchvision 0.28 and transformers 5.24.
FOREIGN: dict[str, tuple[tuple[str, ...], str]] = {
    "torchvision's Faster R-CNN": (
        ("backbone.body.conv1.weight", "roi_heads.box_head.fc7.weight"),
        "detectors of torchvision; as a teacher, let .*'file.py:function'",
    ),
    "torchvision's SSD": (
        ("backbone.features.7.weight", "head.classification_head.module_list.4.bias"),
        "detectors of torchvision",
    ),
    "torchvision's ResNet": (
        ("conv1.weight", "layer1.0.conv1.weight", "fc.bias"),
        r"ResNets of torchvision and timm; convert .* tools/convert-torchvision-to-d2\.py",
    ),
    "RT-DETR": (
        ("model.backbone.model.embedder.embedder.0.convolution.weight",),
        "Hugging Face's transformers; as a teacher",
    ),
    "DETR": (("model.encoder.layers.0.self_attn.k_proj.weight",), "Hugging Face's transformers"),
    "YOLOS": (("vit.embeddings.patch_embeddings.projection.bias",), "Hugging Face's transformers"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_names_of_other_libraries(case: str, tmp_path: Path) -> None:
    names, words = FOREIGN[case]
    for prefix in ("", "module."):
        content = {"state_dict": {prefix + name: torch.ones(1) for name in names}}
        with pytest.raises(WeightsError, match=f"x.pth' has no weights of a Sequential: .*{words}"):
            loaded(content, tmp_path)
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(WeightsError, match=rf"MODEL\.WEIGHTS: .* fills 0 .*{words}"):
            start(tmp_path / "x.pth")


def test_names_that_fit_keep_their_prefix() -> None:
    own = state()
    both = {**state(), **state("teacher.", 9.0)}
    assert without_prefix(both, own) == both
    assert without_prefix({"a.b": torch.ones(1)}, own).keys() == {"a.b"}
    assert unwrapped({}) == {}


# ---- Starts.


def start(weights: Path) -> SafeCheckpointer:
    checkpointer = SafeCheckpointer(tiny_model("faster"))
    with readable(str(weights), "MODEL.WEIGHTS"):
        checkpointer.load(str(weights))
        checkpointer.check_filled()
    return checkpointer


def test_a_file_of_which_nothing_fits(tmp_path: Path) -> None:
    torch.save({"encoder.0.w": torch.ones(1), "encoder.1.w": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"fills 0 of the network's \d+ tensors.*encoder \(2\)"):
        start(tmp_path / "x.pth")


def test_a_file_of_which_the_smaller_part_fits(tmp_path: Path) -> None:
    own = list(tiny_model("faster").state_dict().items())
    few = dict(own[: len(own) // 3])
    torch.save(
        {**few, **{f"other.{i}": torch.ones(1) for i in range(len(own))}}, tmp_path / "x.pth"
    )
    with pytest.raises(WeightsError, match=r"MODEL\.WEIGHTS: .* fills"):
        start(tmp_path / "x.pth")
    torch.save(few, tmp_path / "x.pth")  # all of it fits
    start(tmp_path / "x.pth")


def test_a_backbone_alone_is_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = tiny_model("faster", seed=3).state_dict()
    backbone = {k: x for k, x in own.items() if k.startswith("backbone.bottom_up.")}
    torch.save({**backbone, "fc.weight": torch.ones(10, 4)}, tmp_path / "x.pth")
    with caplog.at_level(logging.WARNING):
        start(tmp_path / "x.pth")
    assert "is it of another backbone" not in caplog.text


def test_a_part_of_a_backbone_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tiny_model("faster", seed=3).state_dict()
    torch.save({k: x for k, x in own.items() if "res5" not in k}, tmp_path / "x.pth")
    with caplog.at_level(logging.WARNING):
        start(tmp_path / "x.pth")
    assert "tensors of the network's backbone" in caplog.text and "res5" in caplog.text


def test_a_training_does_not_start_from_weights_of_another_network(
    shapes: Shapes, tmp_path: Path
) -> None:
    torch.save({"model": state()}, tmp_path / "x.pth")
    cfg = trainable_cfg("faster", shapes, tmp_path, "MODEL.WEIGHTS", str(tmp_path / "x.pth"))
    with pytest.raises(WeightsError, match=r"^MODEL\.WEIGHTS: "):
        Trainer(cfg).resume_or_load(resume=False)

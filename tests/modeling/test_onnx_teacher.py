"""ONNX files as teachers of features and detections."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode

from distill import DistillModel
from distill.config import teacher_config
from distill.config.validate import check_values
from distill.errors import ConfigError
from distill.export import runner
from distill.export.graphs import build_graph
from distill.export.writer import export_info
from distill.families import build_family
from distill.modeling.distillation import network_infos
from distill.modeling.teacher import Teacher, build_teacher
from distill.nets import onnx
from distill.structures import Batch, NetworkOutputs
from tests.support.cases import for_each
from tests.support.exports import exported
from tests.support.networks import CLASSES, image_dict, kd_losses, tiny_cfg, tiny_model
from tests.support.onnx_files import FOUND, MAPS, weights, write_onnx

FILE, OPTS = "MODEL.DISTILL.TEACHER.CONFIG_FILE", "MODEL.DISTILL.TEACHER.OPTS"
HEADS = "MODEL.DISTILL.HEADS"
LEVELS = ["MODEL.ONNX.LEVELS", [["fine", 8], ["coarse", 32]]]
NAMED = ["MODEL.ONNX.DETECTIONS", list(FOUND)]
INFO: dict[str, Any] = {
    "levels": {"fine": 8, "coarse": 32},
    "input_format": "BGR",
    "preprocessing": "outside",
    "pixel_mean": [1.0, 2.0, 3.0],
    "pixel_std": [2.0, 4.0, 8.0],
    "pad_value": [1.0, 2.0, 3.0],
    "thing_classes": list(CLASSES),
}


def config(path: Path, *opts: Any, teacher: Any = LEVELS, family: str = "faster") -> CfgNode:
    return tiny_cfg(family, FILE, str(path), OPTS, list(teacher), *opts)


def asked(teacher: Teacher, *needs: str, height: int = 50, width: int = 70) -> NetworkOutputs:
    """The teacher's outputs for an image, whose padded size is that of the image."""
    batch = Batch([image_dict(0, height, width)], (height, width))
    own = NetworkOutputs(batch, features={"p3": torch.zeros(1)})
    return teacher.ask(own, frozenset({"features", *needs}))


def convolved(pixels: torch.Tensor, name: str) -> torch.Tensor:
    stride = MAPS[name][0]
    height, width = (-n % 32 for n in pixels.shape[1:])
    padded = F.pad(pixels, (0, width, 0, height))
    return F.conv2d(padded[None], torch.from_numpy(weights(name)), stride=stride)


def test_maps_are_those_of_the_file(tmp_path: Path) -> None:
    teacher = build_teacher(config(write_onnx(tmp_path / "t.onnx")))
    found = asked(teacher)
    pixels = image_dict(0, 50, 70)["image"].flip(0).float()  # RGB in [0, 255]
    for name in MAPS:
        expected = convolved(pixels, name)
        assert torch.allclose(found.features[name], expected, rtol=1e-4, atol=1e-4)


def test_the_config_says_how_pixels_are_normalized(tmp_path: Path) -> None:
    own = [*LEVELS, "INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", [9.0, 8.0, 7.0]]
    own += ["MODEL.PIXEL_STD", [255.0, 255.0, 255.0]]
    found = asked(build_teacher(config(write_onnx(tmp_path / "t.onnx"), teacher=own)))
    pixels = (image_dict(0, 50, 70)["image"] - torch.tensor([9.0, 8, 7]).view(3, 1, 1)) / 255
    assert torch.allclose(found.features["fine"], convolved(pixels, "fine"), atol=1e-5)


@for_each("where, pad", [("outside", (1, 2, 3)), ("inside", (1, 2, 3)), ("outside", (114,) * 3)])
def test_metadata_replace_the_mapping(where: str, pad: Any, tmp_path: Path) -> None:
    """The file gets the pixels that `distill export` has promised it, also in the padding."""
    info = {**INFO, "preprocessing": where, "pad_value": list(map(float, pad))}
    path = write_onnx(tmp_path / "t.onnx", info=info, found=FOUND)
    cfg = config(path, teacher=())
    teacher = build_teacher(cfg)
    assert teacher.family.outputs == {"features", "detections"}
    _, described = network_infos(cfg, build_family(tiny_model("faster")), teacher)
    assert described is not None and described.classes == CLASSES
    pixels = image_dict(0, 50, 70)["image"].float()
    mean, std = (torch.tensor(INFO[k]).view(3, 1, 1) for k in ("pixel_mean", "pixel_std"))
    canvas = torch.tensor(info["pad_value"]).view(3, 1, 1).expand(3, 64, 96).clone()
    canvas[:, :50, :70] = pixels
    expected = convolved(canvas if where == "inside" else (canvas - mean) / std, "fine")
    assert torch.allclose(asked(teacher).features["fine"], expected, rtol=1e-4, atol=1e-4)


def test_metadata_are_named_as_by_the_runner() -> None:
    assert onnx.METADATA == runner.METADATA


@for_each("half, batch", [(False, "N"), (True, 1), (False, 1)])
def test_other_inputs(half: bool, batch: Any, tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "t.onnx", half=half, batch=batch, inputs=("x", "image_size"))
    maps = build_teacher(config(path)).model.backbone(torch.rand(3, 3, 32, 64) * 255)
    assert maps["fine"].shape == (3, 5, 4, 8) and maps["fine"].dtype == torch.float32


def test_a_fixed_size_is_padded_to(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "t.onnx", sides=(96, 96))
    teacher = build_teacher(config(path))
    assert asked(teacher).features["fine"].shape == (1, 5, 12, 12)
    with pytest.raises(ConfigError, match="pads to 96 x 96 pixels, but its input has 50 x 100"):
        asked(teacher, width=100)


def test_detections(tmp_path: Path) -> None:
    """An axis of the batch is left out; labels may be of any number type."""
    batched = {k: x[None] for k, x in FOUND.items()}
    batched["classes"] = batched["classes"].astype(np.int32)
    for found in (FOUND, batched):
        path = write_onnx(tmp_path / "t.onnx", found=found)
        cfg = config(path, "MODEL.DISTILL.TEACHER.CLASSES", CLASSES, teacher=[*LEVELS, *NAMED])
        (x,) = asked(build_teacher(cfg), "detections").detections
        assert torch.equal(x.pred_boxes.tensor, torch.from_numpy(FOUND["boxes"]))
        assert x.scores.tolist() == pytest.approx([0.9, 0.4])
        assert x.pred_classes.dtype == torch.int64 and x.pred_classes.tolist() == [2, 0]


def test_no_detection(tmp_path: Path) -> None:
    none = {k: x[:0] for k, x in FOUND.items()}
    path = write_onnx(tmp_path / "t.onnx", found=none, info=INFO)
    (x,) = asked(build_teacher(config(path, teacher=())), "detections").detections
    assert len(x) == 0 and x.pred_boxes.tensor.shape == (0, 4)


def test_it_teaches(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "t.onnx", found=FOUND)
    keys = ("MODEL.DISTILL.IMA.INSTANCES", "teacher", HEADS, ("FitNet", "IMA"))
    cfg = config(path, *keys, teacher=[*LEVELS, *NAMED])
    check_values(teacher_config(cfg))
    model = DistillModel(cfg).train()
    levels = [(x.student, x.teacher) for x in model.heads["FitNet"].levels]
    assert levels == [("p3", "fine"), ("p5", "coarse")]
    found = kd_losses(model, [image_dict(0, 50, 70), image_dict(1, 64, 40)])
    assert all(x.isfinite() and x > 0 for x in found.values())
    sum(found.values()).backward()
    assert not any("digest" in name for name in model.state_dict())


def test_a_resume_knows_the_file_by_its_content(tmp_path: Path) -> None:
    files = [
        write_onnx(tmp_path / "a.onnx"),
        write_onnx(tmp_path / "b.onnx"),
        write_onnx(tmp_path / "c.onnx", batch="N"),
    ]
    first, same, other = (build_teacher(config(path)).weights_hash for path in files)
    assert first == same != other


# ---- Refusals.

BOXES_ONLY = {**FOUND, "scores": FOUND["scores"][:1]}


@pytest.mark.parametrize(
    ("file", "own", "words"),
    [
        ({}, (), r"maps of .* are unknown; set MODEL\.ONNX\.LEVELS .* are 'fine', 'coarse'"),
        ({}, ["MODEL.ONNX.LEVELS", [["fin", 8]]], "'fin', which is no output .* are fine, coarse"),
        ({}, [*LEVELS, *NAMED], "DETECTIONS names 'boxes', which is no output"),
        ({}, [*LEVELS, NAMED[0], ["fine"]], "name the outputs that are boxes, scores and labels"),
        (
            {},
            ["MODEL.ONNX.LEVELS", [["fine", 16]]],
            r"'fine' of stride 16 has shape \(1, 5, 32, 34\)",
        ),
        ({"inputs": ("a", "b")}, LEVELS, "must have one input of images"),
        ({"batch": 2}, LEVELS, "one at a time"),
        ({"sides": (64, 96)}, LEVELS, "takes images of 64 x 96 pixels only"),
        ({"sides": (64, "w")}, LEVELS, "takes images of 64 x w pixels only"),
        ({"found": BOXES_ONLY}, [*LEVELS, *NAMED], r"the shapes must be \(R, 4\), \(R,\) and"),
        ({"found": FOUND, "info": {**INFO, "thing_classes": ["a"]}}, (), r"labels in \[0, 2\]"),
        ({"info": {"levels": 3}}, (), "metadata of .* are damaged"),
        ({"info": {**INFO, "pixel_mean": ["x"]}}, (), "metadata of .* are damaged"),
        ({"info": {**INFO, "levels": {"none": 8}}}, (), "'none', which is no output"),
        (
            {"external": "../outside.bin"},
            LEVELS,
            r"data outside of its folder: '\.\./outside\.bin'",
        ),
        ({"external": "/etc/hostname"}, LEVELS, "data outside of its folder: '/etc/hostname'"),
        ({"external": "link/outside.bin"}, LEVELS, "data outside of its folder: 'link/"),
        ({"external": "missing.bin"}, LEVELS, "names data that are missing"),
    ],
)
def test_wrong_files(file: dict[str, Any], own: Any, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(bytes(2**20))
    os.symlink(tmp_path, folder / "link")
    path = write_onnx(folder / "t.onnx", **file)
    with pytest.raises(ConfigError, match=words) as error:
        build_teacher(config(path, teacher=own))
    assert "\n" not in str(error.value)


def test_data_beside_the_file_are_read(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "t.onnx", maps=("fine",), external="weights.bin")
    (tmp_path / "weights.bin").write_bytes(weights("fine").tobytes())
    own = ["MODEL.ONNX.LEVELS", [["fine", 8]]]
    teacher = build_teacher(config(path, teacher=own))
    pixels = image_dict(0, 32, 64)["image"].flip(0).float()
    found = asked(teacher, height=32, width=64).features["fine"]
    assert torch.allclose(found, convolved(pixels, "fine"), rtol=1e-4, atol=1e-4)
    before = teacher.weights_hash
    (tmp_path / "weights.bin").write_bytes((2 * weights("fine")).tobytes())
    assert build_teacher(config(path, teacher=own)).weights_hash != before


@for_each("content", [b"", b"\x80\x04", b"pytorch" * 100, bytes(range(256))])
def test_no_onnx_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.onnx").write_bytes(content)
    with pytest.raises(ConfigError, match=r"t\.onnx'"):
        build_teacher(config(tmp_path / "t.onnx"))


def test_wrong_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file 'none\.onnx'"):
        build_teacher(config(Path("none.onnx")))
    path = write_onnx(tmp_path / "t.onnx")
    with pytest.raises(ConfigError, match="the weights of an ONNX file are its own; empty it"):
        build_teacher(config(path, "MODEL.DISTILL.TEACHER.WEIGHTS", "w.pth"))
    for wrong in ([["fine", 0]], [["fine"]], [[8, 8]]):
        with pytest.raises(ConfigError, match=r"MODEL\.ONNX\.LEVELS is .* must be a list of"):
            check_values(teacher_config(config(path, teacher=["MODEL.ONNX.LEVELS", wrong])))


# ---- Files of `distill export`.


def test_the_metadata_of_an_export_have_the_strides() -> None:
    graph = build_graph(tiny_model("retinanet", training=False), with_features=True)
    info = export_info(tiny_cfg("retinanet"), graph, None)
    assert info["levels"] == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    assert build_graph(graph.model).levels == {}


@pytest.mark.long
@pytest.mark.slow
def test_an_export_teaches_without_a_mapping(tmp_path: Path) -> None:
    """Its maps are those of the exported network as a teacher."""
    model, cfg = tiny_model("retinanet", training=False), tiny_cfg("retinanet")
    exported(model, cfg, tmp_path, "onnx", features=True)
    size = {"height": 64, "width": 128}
    own = asked(build_teacher(config(tmp_path / "kept.onnx", teacher=())), "detections", **size)
    order = cfg.INPUT.FORMAT
    network = Teacher(build_family(model), input_format=order, student_format=order)
    expected = asked(network, **size)
    assert own.features.keys() == expected.features.keys() and len(own.detections) == 1
    for name, x in expected.features.items():
        assert torch.allclose(own.features[name], x, rtol=1e-4, atol=1e-4)

"""INT8 files: integers in the graph of a file, and what they change of a network."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill import cli
from distill.errors import ConfigError
from distill.export import int8_report
from distill.export.int8 import Calibration, export_int8, use_integers
from distill.export.int8_report import Int8Report, compare_detections, root_mean_square
from distill.export.main import add_arguments, calibration_of, comparison
from distill.export.parity import ParityError
from distill.export.runner import Prediction
from distill.export.student import student_cfg
from distill.export.writer import Options, load
from distill.modeling.quantization import Grid, Quantization, rounded_weight
from distill.utils.progress import Progress
from tests.support.cases import for_each
from tests.support.exports import SIZES, confident, scene, student_folder
from tests.support.networks import tiny_cfg
from tests.support.trainings import Shapes

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

LEVELS = ("MODEL.ATSS.IN_FEATURES", ["p4", "p5"])  # fewer levels are exported sooner
INPUT, OUTPUT = Grid.of_range(-2.0, 3.1), Grid.of_range(0.0, 4.0)
assert INPUT and OUTPUT


# ---- The graph in a file.


def rounding(x: str, y: str, grid: Grid) -> list[Any]:
    """Nodes that round the tensor ``x`` to ``y``, with constants as nodes."""
    names = f"{y}_scale", f"{y}_zero"
    values = np.float32(grid.scale), np.uint8(grid.zero_point)
    constants = [onnx.numpy_helper.from_array(np.array(v), k) for k, v in zip(names, values)]
    nodes = [
        onnx.helper.make_node("QuantizeLinear", [x, *names], [f"{y}_integers"]),
        onnx.helper.make_node("DequantizeLinear", [f"{y}_integers", *names], [y]),
    ]
    return [nodes, constants]


def write_graph(path: Path, steps: list[Any], shape: Any, *outputs: str, **weights: Any) -> None:
    """Write a graph whose input is ``x``.

    Args:
        path: the file.
        steps: (type of node, inputs, output, attributes), or a result of :func:`rounding`.
        shape: shape of ``x``.
        outputs: names of the outputs.
        weights: constants.
    """
    nodes, constants = [], [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()]
    for step in steps:
        if isinstance(step, list):
            nodes += step[0]
            constants += step[1]
        else:
            kind, inputs, output, attributes = step
            nodes.append(onnx.helper.make_node(kind, inputs, [output], **attributes))
    real = onnx.TensorProto.FLOAT
    given = [onnx.helper.make_tensor_value_info("x", real, shape)]
    found = [onnx.helper.make_tensor_value_info(x, real, [None] * len(shape)) for x in outputs]
    graph = onnx.helper.make_graph(nodes, "graph", given, found, constants)
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def run(path: Path, x: np.ndarray, optimized: Path) -> tuple[list[np.ndarray], list[str]]:
    """Return the outputs of a file, and the operators that onnxruntime computes."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x}), operators(optimized)


def operators(path: Path) -> list[str]:
    return [x.op_type for x in onnx.load(path).graph.node]


def stored(path: Path) -> dict[str, np.ndarray]:
    constants = onnx.load(path).graph.initializer
    return {x.name: onnx.numpy_helper.to_array(x) for x in constants}


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_onnxruntime_computes_a_layer_as_it_is_rounded(
    tmp_path: Path, random: np.random.Generator
) -> None:
    """99.8 % of the values are the same, and none is more than a step away."""
    x = random.normal(size=(1, 8, 40, 50)).astype(np.float32)
    weight = random.normal(size=(16, 8, 3, 3)).astype(np.float32)
    bias = random.normal(size=16).astype(np.float32)
    write_graph(
        tmp_path / "a.onnx",
        [
            rounding("x", "rounded", INPUT),
            ("Conv", ["rounded", "weight", "bias"], "y", {}),
            rounding("y", "out", OUTPUT),
        ],
        x.shape,
        "out",
        weight=weight,
        bias=bias,
    )
    use_integers(tmp_path / "a.onnx")
    (found,), computed = run(tmp_path / "a.onnx", x, tmp_path / "optimized.onnx")
    assert "QLinearConv" in computed and "Conv" not in computed
    rounded = INPUT.rounded(torch.from_numpy(x))
    y = F.conv2d(rounded, rounded_weight(torch.from_numpy(weight)), torch.from_numpy(bias))
    steps = np.abs(found - OUTPUT.rounded(y).numpy()) / OUTPUT.scale
    assert (steps < 0.01).mean() >= 0.998 and steps.max() < 1.01
    sizes = {name: v.dtype for name, v in stored(tmp_path / "a.onnx").items()}
    assert "weight" not in sizes and sizes["weight_integers"] == np.int8


@for_each("kind, axis", [("Gemm", 1), ("transposed Gemm", 0), ("MatMul", 1)])
def test_linear_layers(kind: str, axis: int, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    weight[:, 2] *= 100
    attributes = {"transB": 1} if kind == "transposed Gemm" else {}
    steps = [
        rounding("x", "rounded", INPUT),
        (kind.split()[-1], ["rounded", "weight"], "y", attributes),
        ("Add", ["y", "bias"], "sum", {}),
        rounding("sum", "out", OUTPUT),
    ]
    bias = np.ones(6 if attributes else 4, np.float32)
    write_graph(tmp_path / "a.onnx", steps, (3, 10 - len(bias)), "out", weight=weight, bias=bias)
    use_integers(tmp_path / "a.onnx")
    found = stored(tmp_path / "a.onnx")
    expected = np.abs(weight).max(1 - axis) / 127
    np.testing.assert_allclose(found["weight_scale"], expected)
    integers = found["weight_integers"]
    assert integers.dtype == np.int8 and np.abs(integers).max(1 - axis).tolist() == [127] * len(
        expected
    )


def test_only_layers_between_roundings_have_integers(tmp_path: Path) -> None:
    """The last layer keeps its precision; a layer after a pool does not. A weight is shared."""
    weight, last = np.ones((2, 2, 1, 1), np.float32), np.full((2, 2, 1, 1), 0.3, np.float32)
    steps = [
        rounding("x", "a", INPUT),
        ("Conv", ["a", "weight"], "b", {}),
        ("Relu", ["b"], "c", {}),
        rounding("c", "d", OUTPUT),
        ("Relu", ["d"], "e", {}),
        ("MaxPool", ["e"], "f", {"kernel_shape": [2, 2]}),
        ("Conv", ["f", "weight"], "g", {}),
        rounding("g", "h", INPUT),
        ("Relu", ["h"], "i", {}),
        ("Conv", ["i", "last"], "out", {}),
        ("Conv", ["h", "unread"], "second", {}),
        ("Relu", ["d"], "third", {}),
    ]
    weights = {"weight": weight, "last": last, "unread": last}
    write_graph(tmp_path / "a.onnx", steps, (1, 2, 4, 4), "out", "second", "third", **weights)
    x = np.random.default_rng(0).normal(size=(1, 2, 4, 4)).astype(np.float32)
    before, _ = run(tmp_path / "a.onnx", x, tmp_path / "b.onnx")
    use_integers(tmp_path / "a.onnx")
    after, _ = run(tmp_path / "a.onnx", x, tmp_path / "b.onnx")
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b, atol=1.01 * INPUT.scale)
    names = stored(tmp_path / "a.onnx").keys()
    assert {"weight_integers", "last", "unread"} <= names and "weight" not in names
    # One ReLU is before a rounding, one has negative values before it, and one makes an output.
    assert operators(tmp_path / "a.onnx").count("Relu") == 3


# ---- Reports.


def detections(*rows: tuple[float, float, int], dx: float = 0.0) -> Prediction:
    """Boxes of 10 x 10 pixels from (left, score, class)."""
    boxes = np.array([[x + dx, 0, x + dx + 10, 10] for x, *_ in rows]).reshape(-1, 4)
    scores, classes = (np.array([row[k] for row in rows]) for k in (1, 2))
    return Prediction((10, 100), boxes, scores, classes.astype(np.int64))


@for_each(
    "truth, found, expected",
    [
        (detections((0, 0.9, 1)), detections((0, 0.7, 1), dx=1), (1, 1, 0.2)),
        (detections((0, 0.9, 1)), detections((0, 0.7, 2)), (1, 0, 0.0)),
        (detections((0, 0.9, 1)), detections((0, 0.7, 1), dx=8), (1, 0, 0.0)),
        (detections((0, 0.9, 1), (1, 0.8, 1)), detections((0, 0.9, 1)), (2, 1, 0.0)),
        (detections((0, 0.2, 1)), detections(), (0, 0, 0.0)),
        (detections(), detections((0, 0.9, 1)), (0, 0, 0.0)),
        (detections((0, 0.9, 1)), detections(), (1, 0, 0.0)),
    ],
)
def test_detections_are_found_again(truth: Prediction, found: Prediction, expected: Any) -> None:
    report = Int8Report("", 0)
    compare_detections(truth, found, report)
    assert (report.detections, report.found, report.score) == pytest.approx(expected)


def test_the_share_of_equal_pixels() -> None:
    report = Int8Report("", 0)
    truth, found = detections(), detections()
    truth.sem_seg = np.eye(4).reshape(4, 2, 2)
    found.sem_seg = np.eye(4)[[0, 1, 3, 2]].reshape(4, 2, 2)
    compare_detections(truth, found, report)
    assert report.pixels == 0.5


def test_root_mean_square() -> None:
    assert root_mean_square(np.array([[3.0, 4.0]])) == pytest.approx(12.5**0.5)
    assert root_mean_square(np.zeros((0, 4))) == 0


def test_a_report_with_faults_is_an_error() -> None:
    Int8Report("", 0).check()
    with pytest.raises(ParityError, match=r"VNNI") as error:
        Int8Report("", 0, faults=["logits_s8 deviates by 12.0%"]).check()
    assert "not kept: logits_s8 deviates by 12.0%. Sums" in str(error.value)


# ---- Networks.


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{k}.png" for k in range(len(SIZES))]
    for k, (path, size) in enumerate(zip(paths, SIZES)):
        scene(k, *size).save(path)
    return [str(x) for x in paths]


@pytest.mark.slow
def test_an_int8_file_computes_what_its_rounded_network_does(
    tmp_path: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_report, "SURE", 0.0)  # a network that is not trained is not sure
    model, cfg = confident("atss", *LEVELS), tiny_cfg("atss", *LEVELS)
    cfg.INPUT.MIN_SIZE_TEST = 0
    path, calibration = tmp_path / "student_int8.onnx", Calibration(files, "mean")
    with Progress() as progress:
        report = export_int8(cfg, model, path, files, Options(), calibration, progress)
    assert report.images == 2 and report.weights == 18 and not report.faults
    assert report.ranges == load(path).info["int8"] == "mean of 2 images"
    assert report.rounding < report.deviation / 2 < 0.25
    assert report.detections > 50 and report.found > 0.9 * report.detections
    assert len([k for k in stored(path) if k.endswith("_integers")]) == report.weights


def learned(folder: Path) -> None:
    """Give the checkpoint of a student ranges, as a training with SOLVER.QAT does."""
    quantization = Quantization(confident("semantic"))
    with quantization.calibration(), torch.no_grad():
        quantization.model([{"image": 255 * torch.rand(3, 64, 96)}])
        quantization.update()
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    saved["quantization"] = quantization.state_dict()
    torch.save(saved, folder / "model_final.pth")


@pytest.mark.long
@pytest.mark.slow
def test_the_command_uses_learned_ranges(
    tmp_path: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = student_folder("semantic", tmp_path / "student")
    learned(folder)
    images = ["--image-folder", str(Path(files[0]).parent), "--images", "1"]
    assert cli.main(["export", str(folder), "--int8", *images]) == 0
    report = json.loads((folder / "student.json").read_text())
    assert report["int8"]["report"]["ranges"] == report["int8"]["info"]["int8"] == "training"
    assert report["int8"]["bytes"] < 0.7 * report["bytes"]
    assert report["ms"].keys() == {"network", "file", "int8"} and min(report["ms"].values()) > 0
    text = " ".join(capsys.readouterr().out.split())
    assert "weights are integers; ranges: training." in text and "MiB" in text
    assert report["int8"]["report"]["pixels"] > 0.8
    assert sorted(x.name for x in folder.glob("*.onnx")) == ["student.onnx", "student_int8.onnx"]


# ---- The command.


def arguments(folder: Path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(folder), *options])


def test_the_source_of_the_ranges(tmp_path: Path, files: list[str]) -> None:
    folder, images = student_folder("semantic", tmp_path / "student"), str(Path(files[0]).parent)
    cfg = student_cfg(folder)
    calibrating = "--int8", "--calibration-folder", images
    assert calibration_of(arguments(folder), cfg) is None
    options = (*calibrating, "--calibration-images", "1", "--calibration-method", "minmax")
    assert calibration_of(arguments(folder, *options), cfg) == Calibration(files[:1], "minmax")
    assert calibration_of(arguments(folder, *calibrating), cfg) == Calibration(files, "mean")
    learned(folder)
    assert calibration_of(arguments(folder, *calibrating), cfg) is None


def test_the_training_set_gives_ranges(tmp_path: Path, shapes: Shapes, catalogues: None) -> None:
    folder = student_folder("semantic", tmp_path / "student")
    sets = "DATASETS.COCO_FORMAT", str([list(shapes)]), "DATASETS.TEST", f"('{shapes[0]}',)"
    options = "--int8", "--calibration-images", "4", "--opts", *sets
    with pytest.raises(ConfigError, match=r"DATASETS.TRAIN is empty; name images by --calibration"):
        calibration_of(arguments(folder, *options), student_cfg(folder))
    trained = (*options, "DATASETS.TRAIN", f"('{shapes[0]}',)")
    found = calibration_of(arguments(folder, *trained), student_cfg(folder))
    assert found is not None and len(found.files) == 4 and found.files[0].startswith(shapes[2])


def test_torchscript_and_teachers_have_no_integers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(tmp_path), "--format", "torchscript", "--int8"]) == 2
    assert "--int8 needs --format onnx" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path), "--features", "--int8"]) == 2
    assert "--int8 is for devices, and --features is for teachers" in capsys.readouterr().err


def test_a_table_of_networks_and_files() -> None:
    metrics = {"network": {"AP": 1.5}, "file": {"AP": 1.5}, "int8": {"AP": 1.25}}
    report = {"bytes": 2**21, "metrics": {k: metrics[k] for k in ("network", "file")}}
    table = comparison(report)
    assert [x.header for x in table.columns] == ["", "network", "file"] and table.row_count == 1
    times = {"network": 3.0, "file": 2.0, "int8": 1.0}
    table = comparison({**report, "metrics": metrics, "int8": {"bytes": 2**20}, "ms": times})
    rows = list(zip(*(list(x.cells) for x in table.columns)))
    assert rows == [
        ("AP", "1.500", "1.500", "1.250"),
        ("MiB", "", "2.000", "1.000"),
        ("ms of CPU per image", "3.000", "2.000", "1.000"),
    ]

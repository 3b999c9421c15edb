"""ONNX files whose layers compute with 8-bit integers.

A network that rounds as :class:`~distill.modeling.quantization.Quantization` is exported, with the
ranges of a training with ``SOLVER.QAT`` or of some images. Its file has QuantizeLinear and
DequantizeLinear at the same tensors. onnxruntime replaces them, and the layers between them, by
integer kernels.
"""

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from torch import nn

from ..modeling.quantization import LARGEST, Quantization
from ..utils.progress import Progress
from .graphs import build_graph, exportable
from .int8_report import Int8Report, compare_int8
from .parity import network_pixels, reference
from .runner import Array, read_image
from .writer import Info, Options, export_info, keep_outputs, load, write

# Axis of the output channels in the weight of a layer.
AXES = {"Conv": 0, "Gemm": 1, "MatMul": 1}
BIASED = "Relu", "Add"  # may stand between a layer and its rounding


class Calibration(NamedTuple):
    """Images that give the ranges of a student without learned ones.

    Attributes:
        files: images of the training set.
        method: one of :data:`~distill.modeling.quantization.METHODS`.
    """

    files: Sequence[str]
    method: str


def export_int8(
    cfg: CfgNode,
    model: nn.Module,
    path: Path,
    files: Sequence[str],
    options: Options,
    calibration: Calibration | None,
    progress: Progress,
) -> Int8Report:
    """Write an INT8 file that is kept only if it computes what its rounded network does.

    Args:
        cfg: config of the student.
        model: the student.
        path: the file.
        files: images to compare.
        options: content of the file.
        calibration: images that give the ranges; None: those in ``MODEL.WEIGHTS``.
        progress: display of the stages.

    Raises:
        ConfigError: if the network cannot be exported.
        ParityError: if the file differs from its rounded network.
        WeightsError: if the learned ranges are of another network.
    """
    parts = {"normalizes": options.normalizes}
    rounded = exportable(model)
    chosen = build_graph(rounded, with_raw=not options.final, with_final=options.final, **parts)
    info = export_info(cfg, chosen, options.size)
    if calibration is None:
        ranges = "training"
        Quantization(rounded).load(cfg.MODEL.WEIGHTS)
    else:
        ranges = f"{calibration.method} of {len(calibration.files)} images"
        quantization = Quantization(rounded, method=calibration.method)
        calibrate(quantization, info, calibration.files, progress)
    info["int8"] = ranges
    task = progress.add_task("export to INT8", total=2)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        full, kept = Path(folder, "full.onnx"), Path(folder, "kept.onnx")
        write(build_graph(rounded, **parts), info, full, "onnx", options.opset)
        report = Int8Report(ranges, use_integers(full))
        progress.advance(task)
        keep_outputs(chosen, full, kept, "onnx")
        progress.advance(task)
        task = progress.add_task("compare with the network", total=len(files))
        images = (read_image(x) for x in progress.track(files, task_id=task))
        network, expected = (build_graph(x, with_final=False, **parts) for x in (model, rounded))
        compare_int8(network, expected, load(full), load(kept), images, report)
        report.check()
        kept.replace(path)
    return report


def calibrate(
    quantization: Quantization, info: Info, files: Sequence[str], progress: Progress
) -> None:
    """Measure the ranges of a network on images, each of which is a step."""
    task = progress.add_task("calibrate", total=len(files))
    with quantization.calibration():
        for file in progress.track(files, task_id=task):
            image = read_image(file)
            size = image.height, image.width
            reference(quantization.model, network_pixels(image, info), size, info)
            quantization.update()


# ---- The graph in a file.


def use_integers(path: Path) -> int:
    """Store weights as integers, remove ReLUs that change nothing, and return how many weights."""
    import onnx

    model = onnx.load(path)
    remove_relus(model.graph)
    number = round_weights(model.graph)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return number


def round_weights(graph: Any) -> int:
    """Replace the weight of each layer between two roundings by integers with scales.

    Layers may share a weight. Returns the number of weights.
    """
    from onnx import helper

    makers, readers, constants = links(graph)
    shared: dict[str, str] = {}
    for node in list(graph.node):
        if node.op_type not in AXES or not is_quantized(node, makers, readers):
            continue
        name = node.input[1]
        if name not in shared:
            transposed = any(x.name == "transB" and x.i for x in node.attribute)
            axis = 0 if transposed else AXES[node.op_type]
            parts = add_integers(graph, constants[name], axis)
            shared[name] = f"{name}_rounded"
            rounding = helper.make_node("DequantizeLinear", parts, [shared[name]], axis=axis)
            graph.node.insert(0, rounding)
        node.input[1] = shared[name]
    for name in shared:
        graph.initializer.remove(constants[name])
    return len(shared)


def is_quantized(node: Any, makers: Any, readers: Any) -> bool:
    """Return whether the input of a layer is rounded, and its output, too."""
    before = makers.get(node.input[0])
    while before is not None and before.op_type == "MaxPool":
        before = makers.get(before.input[0])
    after = node
    while after is not None and after.op_type != "QuantizeLinear":
        following = readers[after.output[0]]
        passes = after is node or after.op_type in BIASED
        after = following[0] if passes and len(following) == 1 else None
    return before is not None and before.op_type == "DequantizeLinear" and after is not None


def add_integers(graph: Any, weight: Any, axis: int) -> list[str]:
    """Add a weight as integers with scales and zero points, and return the names of these.

    Args:
        graph: graph of a file.
        weight: tensor of the file.
        axis: axis of the output channels.
    """
    from onnx import numpy_helper

    values: Array = numpy_helper.to_array(weight)
    others = tuple(k for k in range(values.ndim) if k != axis)
    scale = np.abs(values).max(others, keepdims=True) / np.float32(LARGEST)
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    integers = np.rint(values / scale).clip(-LARGEST, LARGEST).astype(np.int8)
    parts = {
        "integers": integers,
        "scale": scale.ravel(),
        "zero_point": np.zeros(scale.size, np.int8),
    }
    tensors = [numpy_helper.from_array(x, f"{weight.name}_{k}") for k, x in parts.items()]
    graph.initializer.extend(tensors)
    return [x.name for x in tensors]


def remove_relus(graph: Any) -> None:
    """Remove ReLUs of tensors whose zero point is 0, which have no negative values."""
    from onnx import numpy_helper

    makers, readers, constants = links(graph)
    outputs = {x.name for x in graph.output}
    for node in [x for x in graph.node if x.op_type == "Relu" and x.output[0] not in outputs]:
        maker = makers.get(node.input[0])
        if maker is None or maker.op_type != "DequantizeLinear":
            continue
        if numpy_helper.to_array(constants[maker.input[2]]).any():
            continue
        for reader in readers[node.output[0]]:
            names = [node.input[0] if x == node.output[0] else x for x in reader.input]
            del reader.input[:]
            reader.input.extend(names)
        graph.node.remove(node)


def links(graph: Any) -> tuple[dict[str, Any], dict[str, list[Any]], dict[str, Any]]:
    """Return the node that makes each tensor, the nodes that read it, and the constants."""
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    makers = {name: node for node in graph.node for name in node.output}
    return makers, readers, {x.name: x for x in graph.initializer}

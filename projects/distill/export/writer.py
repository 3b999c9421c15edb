"""Write a graph to an ONNX or TorchScript file, with the metadata that a runner reads."""

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import Tensor

from ..errors import ConfigError
from ..modeling.quantization import ROUND_TO_GRID
from ..utils.io import replacing
from ..utils.provenance import versions
from ..utils.text import first_sentence
from .graphs import Graph
from .runner import METADATA, Array, ExportError, Run, Size, onnx_network

OPSETS = range(18, 24)  # for which torch's exporter has translations
OPSET = 20
FORMATS = {"onnx": ".onnx", "torchscript": ".ts"}
INPUTS = ("image", "image_size")
# Cells of the coarsest level in the image that a graph is traced with. An exporter takes a single
# row or column for one that every image has.
EXAMPLE = (2, 3)
FAULT = re.compile(r"op='([\w:.]+)'|torch\.ops\.([\w.]+)")
NEAREST = "the other of --format onnx and torchscript, or --postprocessing outside"
Info = dict[str, Any]


class Options(NamedTuple):
    """Content of a file.

    Attributes:
        form: a key of :data:`FORMATS`.
        size: height and width of the input in pixels, or None if they may vary.
        normalizes: True if the file normalizes pixels.
        final: True if the file selects detections; False if it returns the outputs of its layers.
        features: True if the file also returns the maps of the backbone.
        opset: version of ONNX's operators.
    """

    form: str = "onnx"
    size: Size | None = None
    normalizes: bool = True
    final: bool = True
    features: bool = False
    opset: int = OPSET


def export_info(cfg: CfgNode, graph: Graph, size: Size | None) -> Info:
    """Return the metadata that a runner reads.

    Args:
        cfg: config of the student.
        graph: the graph to export.
        size: height and width of the input, or None if they may vary.

    Raises:
        ConfigError: if the network cannot have inputs of this size.
    """
    return {
        **network_info(cfg, graph.model, size),
        "preprocessing": "inside" if graph.normalizes else "outside",
        "postprocessing": "inside" if graph.with_final else "outside",
        "levels": graph.levels,
        **graph.info(),
    }


def network_info(cfg: CfgNode, model: Any, size: Size | None) -> Info:
    """Return the metadata of a network: its images and its classes.

    Args, errors: as :func:`export_info`.
    """
    step = max(model.backbone.size_divisibility, 1)
    square = model.backbone.padding_constraints.get("square_size", 0)
    if square and size is None:
        size = square, square
    if size and (size[0] % step or size[1] % step or (square and size != (square, square))):
        valid = f"is {square}x{square}" if square else f"has sides that are multiples of {step}"
        raise ConfigError(f"--size {size[1]}x{size[0]} does not fit: the network's input {valid}.")
    mean, std = model.pixel_mean.flatten().tolist(), model.pixel_std.flatten().tolist()
    pad_value = getattr(model, "pad_value", None)
    return {
        "versions": versions(),
        "architecture": type(model).__name__,
        "thing_classes": class_names(cfg, "thing_classes"),
        "stuff_classes": class_names(cfg, "stuff_classes"),
        "input_format": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "size": size and list(size),
        "size_divisibility": step,
        "coarsest_stride": coarsest_stride(model, step),
        "pixel_mean": mean,
        "pixel_std": std,
        # detectron2 pads with 0 after the normalization, which is the mean before it.
        "pad_value": mean if pad_value is None else [pad_value] * len(mean),
    }


def coarsest_stride(model: Any, step: int) -> int:
    """Return the smallest multiple of ``step`` that is at least the stride of every level."""
    largest = max(x.stride for x in model.backbone.output_shape().values())
    return -(-largest // step) * step


def class_names(cfg: CfgNode, kind: str) -> list[str]:
    """Return the class names that :func:`distill.get_student_cfg` registered, or none."""
    if not cfg.DATASETS.TEST:
        return []
    return list(MetadataCatalog.get(cfg.DATASETS.TEST[0]).get(kind, ()))


def example(info: Info) -> tuple[Tensor, Tensor]:
    """Return inputs with which a graph can be traced."""
    height, width = info["size"] or (n * info["coarsest_stride"] for n in EXAMPLE)
    noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    return 255 * noise, torch.tensor([height, width])


def write(graph: Graph, info: Info, path: Path, form: str, opset: int = OPSET) -> None:
    """Write all outputs of a graph to a file.

    Args:
        graph: the graph, whose device is the CPU.
        info: its metadata, :func:`export_info`.
        path: the file.
        form: a key of :data:`FORMATS`.
        opset: version of ONNX's operators.

    Raises:
        ConfigError: if the exporter lacks an operator, with its name.
    """
    with torch.no_grad(), quiet(), refusing(form):
        WRITERS[form](graph, info, path, opset)


def write_onnx(graph: Graph, info: Info, path: Path, opset: int) -> None:
    import onnx
    import onnxslim

    inputs = example(info)
    names = list(graph.values(*inputs))
    program: Any = torch.onnx.export(
        graph,
        inputs,
        dynamo=True,
        input_names=INPUTS,
        output_names=names,
        dynamic_shapes=None if info["size"] else (varying_sides(info), None),
        opset_version=opset,
        custom_translation_table={ROUND_TO_GRID: quantized},
        verbose=False,
    )
    model = onnxslim.slim(program.model_proto)
    onnx.checker.check_model(model)
    save_onnx(model, {**info, "opset": opset, "outputs": names}, path)


def quantized(x: Any, scale: float, zero_point: int) -> Any:
    """Translate :data:`~distill.modeling.quantization.ROUND_TO_GRID` to ONNX's operators."""
    import onnx
    import onnxscript

    op: Any = onnxscript.opset18
    zero = op.Constant(value=onnx.helper.make_tensor("", onnx.TensorProto.UINT8, [], [zero_point]))
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)


def save_onnx(model: Any, info: Info, path: Path) -> None:
    """Write a model of the package onnx with its metadata."""
    from onnx.helper import set_model_props

    set_model_props(model, {METADATA: json.dumps(info)})
    with replacing(path) as f:
        f.write(model.SerializeToString())


def varying_sides(info: Info) -> dict[int, Any]:
    """Return the height and width of an image as multiples of the size divisibility."""
    names = {2: "rows", 3: "columns"}
    step = info["size_divisibility"]
    sides = {axis: torch.export.Dim(name, min=2) for axis, name in names.items()}
    return {axis: side if step == 1 else step * side for axis, side in sides.items()}


def write_torchscript(graph: Graph, info: Info, path: Path, opset: int) -> None:
    inputs = example(info)
    traced = torch.jit.trace(graph, inputs, check_trace=False)
    content = {**info, "outputs": list(graph.values(*inputs))}
    extra = {METADATA: json.dumps(content)}
    with replacing(path) as f:
        f.write(torch.jit.freeze(traced.eval()).save_to_buffer(extra))


WRITERS: dict[str, Callable[[Graph, Info, Path, int], None]] = {
    "onnx": write_onnx,
    "torchscript": write_torchscript,
}


def keep_outputs(graph: Graph, source: Path, path: Path, form: str) -> None:
    """Write a file with the outputs of ``graph``, given one with all outputs.

    Args:
        graph: the graph with the outputs to keep.
        source: file that :func:`write` wrote.
        path: file to write.
        form: format of both.
    """
    info = load(source).info
    with torch.no_grad(), quiet():
        if form == "torchscript":
            write_torchscript(graph, info, path, OPSET)
            return
        import onnxslim

        names = list(graph.values(*example(info)))
        model = onnxslim.slim(str(source), outputs=names)
        save_onnx(model, {**info, "outputs": names}, path)


# ---- Errors and warnings of exporters.


@contextlib.contextmanager
def refusing(form: str) -> Iterator[None]:
    """Turn an exporter's error into one sentence with the name of the operator.

    Raises:
        ConfigError: the format does not have the operator.
    """
    try:
        yield
    except ImportError as e:
        raise ConfigError(
            f"--format {form} needs the package {e.name}: pip install 'distill[export]'."
        ) from e
    except (torch.onnx.OnnxExporterError, RuntimeError) as e:
        found = [x for error in causes(e) for x in FAULT.findall(str(error))]
        operator = next((a or b for a, b in found), "")
        reason = f"operator {operator}" if operator else first_sentence(list(causes(e))[-1])
        raise ConfigError(
            f"The network cannot be exported to {form}: {reason}; use {NEAREST}."
        ) from e


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, the one that caused it, and so on."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what exporters print about their own code."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ---- Files that were written.


class Exported(NamedTuple):
    """A file that can be run.

    Attributes:
        run: maps inputs by name to outputs by name.
        inputs: names of its inputs.
        info: its metadata.
    """

    run: Run
    inputs: Sequence[str]
    info: Info

    def __call__(self, image: Array, size: Size) -> dict[str, Array]:
        """Return the outputs for an input (1, 3, H, W) with an image of this size."""
        feed = {"image": image, "image_size": np.array(size, np.int64)}
        return self.run({name: feed[name] for name in self.inputs})


def load(path: Path, threads: int = 0) -> Exported:
    """Load a file that :func:`write` wrote.

    Args:
        path: the file; its suffix gives the format.
        threads: threads of onnxruntime; 0: one per core.

    Raises:
        ExportError: if the file cannot be read, or ``distill export`` did not write it.
    """
    if path.suffix == FORMATS["torchscript"]:
        return load_torchscript(path)
    return Exported(*onnx_network(str(path), threads))


def load_torchscript(path: Path) -> Exported:
    """Load a TorchScript file; arguments as :func:`load`."""
    extra = {METADATA: ""}
    try:
        with quiet():
            network = torch.jit.load(str(path), "cpu", extra)
        info = json.loads(extra[METADATA])
    except (RuntimeError, ValueError) as e:
        raise ExportError(f"'{path}' was not written by `distill export`") from e

    @torch.no_grad()
    def run(feed: dict[str, Array]) -> dict[str, Array]:
        with torch.jit.optimized_execution(False):  # no new code for every size of an image
            outputs = network(*(torch.from_numpy(feed[name]) for name in INPUTS))
        return {name: x.numpy() for name, x in zip(info["outputs"], outputs)}

    return Exported(run, INPUTS, info)

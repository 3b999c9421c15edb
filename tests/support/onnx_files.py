"""Small ONNX files, which are written without torch's exporter."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SIDES = ("height", "width")
MAPS = {"fine": (8, 5), "coarse": (32, 7)}
"""Strides and channels of the maps of :func:`write_onnx`."""
FOUND = {
    "boxes": np.array([[4, 6, 40, 50], [10, 8, 20, 30]], np.float32),
    "scores": np.array([0.9, 0.4], np.float32),
    "classes": np.array([2, 0], np.int64),
}
"""Detections of :func:`write_onnx`."""


def weights(name: str) -> Any:
    """Return the weights (C, 3, stride, stride) of the only convolution of a map."""
    stride, channels = MAPS[name]
    shape = (channels, 3, stride, stride)
    return np.random.default_rng(stride).normal(0, 0.01, shape).astype(np.float32)


def write_onnx(
    path: Path,
    *,
    maps: Sequence[str] = tuple(MAPS),
    sides: Sequence[Any] = SIDES,
    batch: Any = 1,
    inputs: Sequence[str] = ("image",),
    found: Mapping[str, Any] | None = None,
    info: Mapping[str, Any] | None = None,
    half: bool = False,
    external: str = "",
) -> Path:
    """Write a file with a convolution per map, and with constant detections.

    Args:
        maps: names of :data:`MAPS`, which are the outputs.
        sides: height and width of the input, texts if they vary.
        batch: length of the input's first axis.
        inputs: names of the inputs; the first one is of images.
        found: detections by the names of their outputs.
        info: metadata of `distill export`.
        half: True for images as 16-bit floats.
        external: place that the file names for the weights, if they are not inside of it.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    dtype = np.float16 if half else np.float32
    values = [helper.make_tensor_value_info(inputs[0], kind, [batch, 3, *sides])]
    values += [helper.make_tensor_value_info(x, TensorProto.INT64, [2]) for x in inputs[1:]]
    nodes, initial, outputs = [], [], []
    for name in maps:
        tensor = numpy_helper.from_array(weights(name).astype(dtype), f"{name}.weight")
        if external:
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=external)
            tensor.ClearField("raw_data")
        initial.append(tensor)
        stride = [MAPS[name][0]] * 2
        nodes.append(
            helper.make_node("Conv", [inputs[0], f"{name}.weight"], [name], strides=stride)
        )
        outputs.append(helper.make_tensor_value_info(name, kind, None))
    for name, x in (found or {}).items():
        initial.append(numpy_helper.from_array(x, f"{name}.value"))
        nodes.append(helper.make_node("Identity", [f"{name}.value"], [name]))
        element = helper.np_dtype_to_tensor_dtype(x.dtype)
        outputs.append(helper.make_tensor_value_info(name, element, x.shape))
    graph = helper.make_graph(nodes, "teacher", values, outputs, initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if info is not None:
        helper.set_model_props(model, {"distill": json.dumps(info)})
    onnx.save(model, str(path)) if not external else path.write_bytes(model.SerializeToString())
    return path

"""ONNX files as teachers of features and detections. No code of a file is executed."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from ..utils.io import file_hash
from ..utils.text import choices, clause, quoted
from .module import ModuleBackbone

METADATA = "distill"  # key of the metadata, as JSON, in a file of `distill export`
IMAGE_SIZE = "image_size"  # input of such a file: height and width without padding
DETECTIONS = ("boxes", "scores", "classes")  # outputs of such a file
TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


class OnnxNetwork(nn.Module):
    """Network of an ONNX file, which onnxruntime runs image by image.

    It runs on the GPU of the images if onnxruntime has been installed for GPUs, else on the CPU.

    Args:
        path: the file.
        levels: (name, stride) of the outputs that are maps.
        detections: names of the outputs that are boxes, scores and labels, or none.

    Attributes:
        strides, classes, image_size: see :class:`~distill.nets.module.ModuleBackbone`.

    Raises:
        ValueError: the file cannot be read or run, or it lacks an output.
    """

    def __init__(self, path: str, levels: Sequence[Sequence[Any]], detections: Sequence[str] = ()):
        super().__init__()
        self.path = path
        model = read_onnx(path)
        info = metadata(model, path)
        if not levels:
            outputs = quoted([x.name for x in model.graph.output])
            raise ValueError(
                f"the maps of '{path}' are unknown; set MODEL.ONNX.LEVELS to outputs and strides, "
                f"such as [['p3', 8]], or export it with --features; its outputs are {outputs}"
            )
        self.strides = {str(name): int(stride) for name, stride in levels}
        self.detections = tuple(detections)
        self.classes = tuple(info.get("thing_classes", ()))
        self.sessions: dict[bool, Any] = {}  # on the CPU (False) and on the GPU
        self.last: tuple[Tensor, list[dict[str, Any]]] | None = None
        self.scale: Tensor
        self.shift: Tensor
        self._check_outputs([x.name for x in self.session("cpu").get_outputs()])
        self.input, self.image_size = self._found_input()
        scale, shift = _pixels(info)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        # In the hash of the teacher's weights, by which a resume knows the file.
        digest = torch.frombuffer(bytearray(content_hash(path, model)), dtype=torch.uint8)
        self.register_buffer("digest", digest)

    def session(self, device: str) -> Any:
        """Return onnxruntime's session on a kind of device, which is built once."""
        import onnxruntime

        gpu = "CUDAExecutionProvider"
        on_gpu = device == "cuda" and gpu in onnxruntime.get_available_providers()
        if on_gpu not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.log_severity_level = 4  # errors are raised, too
            providers = [gpu] * on_gpu + ["CPUExecutionProvider"]
            try:
                session = onnxruntime.InferenceSession(self.path, options, providers=providers)
            except Exception as e:  # onnxruntime has a type for each of its faults
                raise ValueError(f"'{self.path}' cannot be read by onnxruntime: {clause(e)}") from e
            self.sessions[on_gpu] = session
        return self.sessions[on_gpu]

    def _check_outputs(self, names: Sequence[str]) -> None:
        if len(self.detections) not in (0, 3):
            raise ValueError(
                f"MODEL.ONNX.DETECTIONS is {self.detections}; name the outputs that are boxes, "
                "scores and labels, or none"
            )
        for key, wanted in {"LEVELS": self.strides, "DETECTIONS": self.detections}.items():
            for name in wanted:
                if name not in names:
                    raise ValueError(
                        f"MODEL.ONNX.{key} names '{name}', which is no output of '{self.path}'; "
                        f"its outputs are {choices(name, names)}"
                    )

    def _found_input(self) -> tuple[Any, tuple[int, int] | None]:
        """Return the input of images, and its height and width if these are fixed."""
        inputs = [x for x in self.session("cpu").get_inputs() if x.name != IMAGE_SIZE]
        described = ", ".join(f"{x.name} {x.shape} {x.type}" for x in inputs)
        image = inputs[0] if len(inputs) == 1 else None
        if image is None or len(image.shape) != 4 or image.type not in TYPES:
            raise ValueError(
                f"'{self.path}' must have one input of images (1, 3, H, W) as floats; it has "
                f"{described or 'no input'}"
            )
        batch, channels, *sides = image.shape
        for length, valid in ((batch, 1), (channels, 3)):
            if isinstance(length, int) and length != valid:
                raise ValueError(
                    f"'{self.path}' must take images (1, 3, H, W), one at a time; its input is "
                    f"{described}"
                )
        if not any(isinstance(x, int) for x in sides):
            return image, None
        if sides[0] != sides[1]:
            raise ValueError(
                f"'{self.path}' takes images of {sides[0]} x {sides[1]} pixels only; export it for "
                "any height and width, or for a square"
            )
        return image, (sides[0], sides[1])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return maps (N, C, H / stride, W / stride) by name for images (N, 3, H, W)."""
        found = self._outputs(images)
        return {
            name: torch.cat([torch.from_numpy(x[name]) for x in found]).to(images.device).float()
            for name in self.strides
        }

    @property
    def detects(self) -> bool:
        """True if outputs are named that are detections."""
        return bool(self.detections)

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Return a dict of boxes, scores and labels per image, for images (N, 3, H, W)."""
        keys = dict(zip(("boxes", "scores", "labels"), self.detections))
        return [
            {k: _of_one_image(x[name], k).to(images.device) for k, name in keys.items()}
            for x in self._outputs(images)
        ]

    def _outputs(self, images: Tensor) -> list[dict[str, Any]]:
        """Return the outputs for each image by name.

        onnxruntime always runs the whole network, so maps and detections are of one run.
        """
        if self.last is None or self.last[0] is not images:
            self.last = images, [self._run(x) for x in images]
        return self.last[1]

    def _run(self, image: Tensor) -> dict[str, Any]:
        session = self.session(image.device.type)
        pixels = (image * self.scale + self.shift)[None].to("cpu", TYPES[self.input.type])
        feed = {self.input.name: pixels.numpy()}
        if any(x.name == IMAGE_SIZE for x in session.get_inputs()):
            feed[IMAGE_SIZE] = torch.tensor(image.shape[1:]).numpy()
        names = [*self.strides, *self.detections]
        try:
            return dict(zip(names, session.run(names, feed)))
        except Exception as e:  # onnxruntime has a type for each of its faults
            size = " x ".join(map(str, image.shape[1:]))
            raise ValueError(
                f"'{self.path}' cannot be run for an image of {size} pixels: {clause(e)}"
            ) from e


def _of_one_image(output: Any, name: str) -> Tensor:
    """Return an output of detections without the axis of the batch, of length 1."""
    x = torch.from_numpy(output)
    return x[0] if x.dim() == (3 if name == "boxes" else 2) and len(x) == 1 else x


# ---- Reading a file.


def read_onnx(path: str) -> Any:
    """Return the package onnx's model of a file, without its external data.

    Raises:
        ValueError: there is no such file, it is no ONNX file, it names data outside of its folder,
            or a package is missing.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as e:
        raise ValueError(
            f"an ONNX file needs the package {e.name}: pip install 'distill[export]'"
        ) from e
    if not os.path.isfile(path):
        raise ValueError(f"there is no file '{path}'")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as e:  # the parser has several types
        raise ValueError(f"'{path}' is no ONNX file ({clause(e)})") from e
    _external_files(path, model)
    return model


def _external_files(path: str, model: Any) -> list[str]:
    """Return the paths of the files with a model's external data.

    Raises:
        ValueError: one is missing or outside of the model's folder, also by a link.
    """
    folder = os.path.realpath(os.path.dirname(path) or ".")
    found = set()
    for name in sorted(set(_external_names(model))):
        file = os.path.realpath(os.path.join(folder, name))
        if os.path.commonpath([folder, file]) != folder:
            raise ValueError(f"'{path}' names data outside of its folder: '{name}'")
        if not os.path.isfile(file):
            raise ValueError(f"'{path}' names data that are missing: '{name}'")
        found.add(file)
    return sorted(found)


def _external_names(message: Any) -> Iterator[str]:
    """Yield the names of the external files of every tensor anywhere in a message of protobuf."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in value if hasattr(value, "__len__") else [value]:
            if field.name == "external_data":
                if part.key == "location":
                    yield part.value
            else:
                yield from _external_names(part)


def content_hash(path: str, model: Any) -> bytes:
    """Return the sha256 of a file and its external data."""
    digests = [file_hash(x) for x in (path, *_external_files(path, model))]
    return hashlib.sha256("".join(digests).encode()).digest()


def metadata(model: Any, path: str) -> dict[str, Any]:
    """Return the metadata that ``distill export`` wrote to a file, or an empty dict.

    Raises:
        ValueError: the metadata are damaged.
    """
    text = {x.key: x.value for x in model.metadata_props}.get(METADATA, "{}")
    try:
        info = json.loads(text)
        if info:
            _pixels(info)
            dict(info.get("levels", {}))
            str(info["input_format"]), "".join(info["thing_classes"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as e:
        raise ValueError(f"the metadata of '{path}' are damaged ({clause(e)})") from e
    return dict(info)


def _pixels(info: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the factor and summand, (3, 1, 1) each, that make a file's input of an image.

    An exported file has images of which the value of their padding is subtracted already, so that
    padding is 0.
    """
    one, zero = torch.ones(3, 1, 1), torch.zeros(3, 1, 1)
    if not info:
        return one, zero
    pad, mean, std = (
        torch.tensor(info[key]).view(3, 1, 1) for key in ("pad_value", "pixel_mean", "pixel_std")
    )
    return (one, pad) if info["preprocessing"] == "inside" else (1 / std, (pad - mean) / std)


def describe_onnx(path: str) -> dict[str, Any]:
    """Return the config values of an ONNX file, which the metadata of `distill export` give.

    A file without metadata gets RGB images in [0, 255], padded with 0.

    Raises:
        ValueError: as :func:`read_onnx` and :func:`metadata`.
    """
    model = read_onnx(path)
    info = metadata(model, path)
    own: dict[str, Any] = {
        "MODEL.ONNX.FILE": path,
        "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "INPUT.FORMAT": "RGB",
    }
    if info:
        own["MODEL.PIXEL_MEAN"] = [float(x) for x in info["pad_value"]]
        own["INPUT.FORMAT"] = str(info["input_format"])
        own["MODEL.ONNX.LEVELS"] = [list(x) for x in info.get("levels", {}).items()]
        if {x.name for x in model.graph.output}.issuperset(DETECTIONS):
            own["MODEL.ONNX.DETECTIONS"] = DETECTIONS
    return own


@BACKBONE_REGISTRY.register()
def build_onnx_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build the network of the file ``MODEL.ONNX.FILE``.

    Raises:
        ValueError: as :class:`OnnxNetwork`, or a map is not of the stride that the config says.
    """
    node = cfg.MODEL.ONNX
    return ModuleBackbone(OnnxNetwork(node.FILE, node.LEVELS, node.DETECTIONS))

"""Convert the authors' weights of RTMDet and YOLO to a checkpoint.

    distill convert --config-file F --weights FILE --out FILE.pth [KEY VALUE ...]

The config describes the network of the weights: detector, size, number of classes, and the format
and normalization of its images. FILE is a checkpoint of mmdetection 3 (RTMDet, RTMDet-Ins), of
YOLOX, or of PyTorch_YOLOv4 (YOLOv4), or a state dict of YOLOv3, YOLOv4-CSP, YOLOv5 or YOLOv7.
Averaged weights are taken where a file has both.

Every tensor must have its place in the network, and every place its tensor. Otherwise a message
names those that do not fit, and nothing is written. Nothing of the file is executed. The result is
a stock checkpoint, for MODEL.WEIGHTS or MODEL.DISTILL.TEACHER.WEIGHTS.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..checkpoint.compare import tensor_misfits
from ..checkpoint.formats import unwrapped
from ..checkpoint.load import readable
from ..checkpoint.save import write_checked
from ..checkpoint.unpickler import require_dict
from ..data.datasets import model_classes
from ..engine import setup_config
from ..errors import CheckpointError, ConfigError, WeightsError
from ..modeling.meta_arch import build_student
from ..utils.arguments import add_config_arguments
from ..utils.text import shortened
from .reader import read_content
from .sources import Source, source_of

SHOWN = 6  # tensors that do not fit, in a message


def converted(
    state: Mapping[str, Any], source: Source, own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return tensors of the authors' code by the names of a network, in its types and its order.

    Args:
        state: tensors by the authors' names.
        source: the authors' code.
        own: tensors of the network by name.

    Raises:
        WeightsError: a tensor is missing, left over or of another shape; or two tensors differ that
            are one in the network.
    """
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for theirs, value in state.items():
        name = source.renamed(str(theirs))
        if name is None:
            continue
        floats = isinstance(value, Tensor) and value.is_floating_point()
        value = value.float() if floats else value  # YOLOv5 keeps half precision
        if name in found and not _equal(value, found[name]):
            raise WeightsError(
                f"{origin[name]} and {theirs} of the weights differ, but are one tensor here; "
                "choose a config that separates them (MODEL.RTMDETINS.SHARED_BOX_BRANCH False)."
            )
        found[name], origin[name] = value, theirs
    if misfits := list(tensor_misfits(found, own)):
        raise WeightsError(
            "The weights do not fit the network of the config: "
            f"{shortened(misfits, SHOWN, '; ')}; choose the config of their size and number of "
            "classes."
        )
    return {name: found[name] for name in own}


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)


def check_config(
    cfg: CfgNode, source: Source, content: Mapping[str, Any], state: Mapping[str, Any]
) -> None:
    """Check what no name and no shape shows: the input, decoding and classes of the weights.

    Args:
        cfg: config of the network.
        source: the authors' code.
        content: content of the file.
        state: its state dict.

    Raises:
        ConfigError: names the key, its value and the value that the weights need.
    """
    for key, needed in {**source.config, **source.config_in(content, state)}.items():
        value = reduce(getattr, key.split("."), cfg)
        if not _agree(value, needed):
            raise ConfigError(
                f"{key} is {value}, but these weights of {source.code} need {needed}; set it in "
                "the config."
            )
    for k, (theirs, ours) in enumerate(zip(_classes(content), model_classes(cfg) or ())):
        if theirs != ours:
            raise ConfigError(
                f"Class {k} of the weights is '{theirs}', but that of DATASETS.TRAIN is '{ours}'; "
                "list the categories in the order of the weights."
            )


def _agree(value: Any, needed: Any) -> bool:
    if isinstance(needed, str):
        return bool(value == needed)
    a, b = np.asarray(value, float), np.asarray(needed, float)
    return a.shape == b.shape and np.allclose(a, b, rtol=2e-3)  # half precision rounds anchors


def _classes(content: Mapping[str, Any]) -> Sequence[str]:
    """Return the class names in a file of mmdet; empty if it has none."""
    meta: Any = content.get("meta")
    data = meta.get("dataset_meta") if isinstance(meta, Mapping) else None
    names = data.get("classes", data.get("CLASSES")) if isinstance(data, Mapping) else None
    return names if isinstance(names, list | tuple) else ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, metavar="FILE", help="the authors' weights")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write, a .pth file")
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.out.suffix != ".pth" or args.out.resolve() == Path(args.weights).resolve():
        raise ConfigError(
            f"--out is '{args.out}'; name a file other than --weights that ends with .pth."
        )
    no_data = ["MODEL.DEVICE", "cpu", "DATASETS.TEST", ()]
    cfg = setup_config(args.config_file, [*args.opts, *no_data], training=False)
    source = source_of(cfg)
    network = build_student(cfg)
    with readable(args.weights, "--weights"):
        content = read_content(args.weights, source)
        inner = unwrapped(content)
        state = require_dict(inner.get("model", inner))
    tensors = converted(state, source, network.state_dict())
    check_config(cfg, source, content, state)
    try:
        os.makedirs(args.out.parent, exist_ok=True)
        write_checked(str(args.out), {"model": tensors})
    except OSError as e:
        raise CheckpointError(f"--out '{args.out}' cannot be written: {e.strerror}.") from e
    numbers = sum(x.numel() for x in network.parameters())
    print(
        f"wrote {args.out}: {type(network).__name__} with {numbers:,} parameters, "
        f"{len(tensors)} tensors of {len(state)} in {args.weights}"
    )
    return 0

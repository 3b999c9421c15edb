"""Detections of a trained network, and their cost."""

import gc
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn
from torch.nn.functional import interpolate

from ..config import load_config
from ..data.datasets import class_indices, number_of_classes, predicted_classes
from ..data.registration import FORMATS
from ..engine import Trainer, load_student, setup_config
from ..errors import ConfigError
from ..evaluation.own_coco import ResultCollector
from ..utils.progress import Progress
from ..utils.text import quoted
from ..utils.timing import seconds

CONFIGS = ("student.yaml", "config.yaml")  # written by a training, the plain one first
WEIGHTS = "model_final.pth"
WARM_UP, REPEATS = 3, 20  # forwards of the network whose cost is measured
OwnSets = Mapping[str, Sequence[tuple[str, str, str]]]
"""Entries of ``DATASETS``, by ``COCO_FORMAT`` or ``YOLO_FORMAT``."""


def detect(
    cfg: CfgNode,
    weights: str,
    name: str,
    size: tuple[int, int] | None,
    progress: Progress,
    title: str,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return COCO's results of a trained network, and its :func:`efficiency`.

    Args:
        cfg: config of its training, see :func:`read_config`.
        weights: file of its checkpoint.
        name: name of the data set.
        size: size of the measured image, see :func:`efficiency`.
        progress, title: display of the stage.

    Raises:
        DistillError: there is no network, or it does not fit the data set.
    """
    model = load_student(cfg, weights).eval()
    loader = Trainer.build_test_loader(cfg, name)
    check_classes(cfg, name)
    measured = efficiency(model, next(iter(loader))[0], size)
    task = progress.add_task(title, total=len(loader))
    advance = {"after_inference": partial(progress.advance, task)}
    collector = ResultCollector(name, class_indices(cfg, name))
    return inference_on_dataset(model, loader, collector, advance), measured


def read_config(folder: Path, name: str, own: OwnSets) -> CfgNode:
    """Read the config of a training, with the data set ``name`` to test on.

    Args:
        folder: OUTPUT_DIR of the training.
        name: name of the data set.
        own: the entry of the data set, if it needs one.
    """
    config = next((folder / x for x in CONFIGS if (folder / x).is_file()), None)
    if config is None:
        raise ConfigError(
            f"'{folder}' has neither {' nor '.join(CONFIGS)}; name the OUTPUT_DIR of a training or "
            "a file of predictions."
        )
    opts: list[Any] = ["DATASETS.TEST", (name,)]
    trained: Mapping[str, Any] = {}
    if (folder / CONFIGS[-1]).is_file():  # the plain config does not have the names of the classes
        trained = load_config(str(folder / CONFIGS[-1])).DATASETS
        opts += ["DATASETS.KEEP_GROUP_CATEGORIES", trained["KEEP_GROUP_CATEGORIES"]]
    for key in FORMATS:
        others = [x for x in trained.get(key, ()) if x[0] != name]
        opts += [f"DATASETS.{key}", (*others, *own.get(key, ()))]
    return setup_config(str(config), opts, training=False)


def check_classes(cfg: CfgNode, name: str) -> None:
    """Refuse a network that detects no objects, or whose classes the data set does not have."""
    (key, predicted), known = number_of_classes(cfg), len(MetadataCatalog.get(name).thing_classes)
    if predicted is None:
        raise ConfigError(f"{cfg.MODEL.META_ARCHITECTURE} detects no boxes; name a detector.")
    indices = class_indices(cfg, name)
    if indices is None and predicted > known:
        raise ConfigError(
            f"{key} of the training is {predicted}, but data set '{name}' has {known} classes; "
            "choose another of the two."
        )
    if indices is not None and max(indices) < 0:
        raise ConfigError(
            f"Data set '{name}' has none of the classes of the training, "
            f"{quoted(predicted_classes(cfg, name))}; use the same names in the categories of both."
        )


@torch.no_grad()
def efficiency(
    model: nn.Module, entry: dict[str, Any], size: tuple[int, int] | None
) -> dict[str, Any]:
    """Measure the cost of one image.

    Args:
        model: the network.
        entry: entry of a test loader.
        size: width and height in pixels to resize the image to, or None.

    Returns:
        ``input`` (width x height), ``device``, ``parameters`` (millions), ``gflops``, ``memory``
        (MiB at its peak, None on a CPU) and ``fps``.
    """
    if size:
        resized = interpolate(entry["image"][None].float(), size[::-1], mode="bilinear")[0]
        entry = {**entry, "image": resized}
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    run = partial(model, [entry])
    for _ in range(WARM_UP):
        run()
    memory = None
    if cuda:
        gc.collect()  # frees an earlier model
        torch.cuda.reset_peak_memory_stats(device)
        run()
        memory = torch.cuda.max_memory_allocated(device) / 2**20
    time = statistics.median(seconds(run, cuda) for _ in range(REPEATS))
    counter = FlopCountAnalysis(model, [entry]).unsupported_ops_warnings(False)
    height, width = entry["image"].shape[1:]
    threads = torch.get_num_threads()
    return {
        "input": f"{width} x {height}",
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, threads: {threads}",
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "gflops": counter.total() / 1e9,
        "memory": memory,
        "fps": 1 / time,
    }

"""A sheet of training samples as the student gets them, with their boxes and masks."""

import math
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.utils.visualizer import Visualizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..data.datasets import class_names, load_training_sets
from ..data.loader import build_train_loader, data_seed
from ..engine.trainer import train_mapper

COLUMNS, PANEL = 4, 3.0  # samples in a row, and their width in inches
ALPHA = 0.4  # opacity of masks


def training_samples(cfg: CfgNode, number: int, iteration: int) -> list[dict[str, Any]]:
    """Return samples of this process as the training gets them.

    Args:
        cfg: the whole config. Its ``SEED``, if one is set, makes the samples those of the training.
        number: number of samples.
        iteration: iteration of the first one.
    """
    seed = data_seed(cfg, max(cfg.SEED, 0))
    loader = build_train_loader(
        cfg, load_training_sets(cfg), train_mapper(cfg), seed=seed, start=iteration
    )
    return list(islice(chain.from_iterable(loader), number))


def draw_samples(cfg: CfgNode, number: int, iteration: int, path: Path) -> None:
    """Write the sheet; see :func:`training_samples`."""
    samples = training_samples(cfg, number, iteration)
    names = class_names(cfg) or ()
    rows = math.ceil(number / COLUMNS)
    figure = Figure((PANEL * COLUMNS, PANEL * rows), layout="constrained")
    for k, sample in enumerate(samples, 1):
        ax = figure.add_subplot(rows, COLUMNS, k)
        ax.imshow(drawn(sample, cfg.INPUT.FORMAT, names))
        height, width = sample["image"].shape[1:]
        ax.set_title(f"{Path(sample['file_name']).name}, {width} × {height}", fontsize=7)
        ax.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, dpi=110)


def drawn(sample: dict[str, Any], image_format: str, names: Sequence[str]) -> NDArray[Any]:
    """Return a sample's image with its objects, (H, W, 3) RGB.

    Args:
        sample: an entry of ``batched_inputs``.
        image_format: ``INPUT.FORMAT``.
        names: class names; empty if they are unknown.
    """
    pixels = convert_image_to_rgb(sample["image"].permute(1, 2, 0), image_format)
    canvas = Visualizer(pixels)
    if "instances" in sample:
        truth = sample["instances"]
        classes = truth.gt_classes.tolist()
        canvas.overlay_instances(
            boxes=truth.gt_boxes,
            labels=[names[i] for i in classes] if names else [f"class {i}" for i in classes],
            masks=truth.gt_masks if truth.has("gt_masks") else None,
            alpha=ALPHA,
        )
    shown: NDArray[Any] = canvas.get_output().get_image()
    return shown

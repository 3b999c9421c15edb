"""Figures of the comparison of models: curves of errors, and their boxes on an image."""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from ..evaluation.coco_errors import CURVES
from .visualize_figure import HALO, draw_image

# Colour of the area between a curve and the one below. The first is white, as COCO's; all are
# distinct in grey, too.
FILLS = ("#ffffff", "#c6dbef", "#6baed6", "#2171b5", "#08306b", "#fdae6b", "#d94801")
# Colour and line of a box by its kind, distinct for the colour-blind.
STYLES = {
    "object": ("#f0e442", "solid"),
    "right": ("#56b4e9", "solid"),
    "wrong": ("#ff5a36", "solid"),
    "missed": ("#f0e442", "dashed"),
}
COLUMNS, PANEL = 3, 4.2  # panels in a row of curves; inches
IMAGE_WIDTH = 3.6  # inches


class DrawnBox(NamedTuple):
    box: Sequence[float]  # x, y, width, height in pixels
    label: str
    kind: str  # a key of STYLES


def draw_curves(curves: Mapping[str, NDArray[np.float64]]) -> bytes:
    """Draw a PNG with one panel per model.

    Args:
        curves: precision (7, R) at R recalls from 0 to 1, by the model's name.
    """
    columns = min(len(curves), COLUMNS)
    rows = -(-len(curves) // columns)
    figure = Figure((PANEL * columns, (PANEL + 0.5) * rows), layout="constrained")
    for place, (name, precision) in enumerate(curves.items(), 1):
        draw_model(figure.add_subplot(rows, columns, place), name, precision)
    return encoded(figure, "png")


def draw_model(ax: Axes, name: str, precision: NDArray[np.float64]) -> None:
    recalls = np.linspace(0, 1, precision.shape[1])
    below = np.zeros_like(recalls)
    patches = []
    for curve, fill, values in zip(CURVES, FILLS, precision):
        ax.fill_between(recalls, below, values, facecolor=fill)
        ax.plot(recalls, values, color="k", lw=0.6)
        label = f"{100 * values.mean():.1f} {curve}"
        patches.append(Patch(facecolor=fill, edgecolor="k", label=label))
        below = values
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision", aspect="equal")
    ax.set_title(name, parse_math=False)
    ax.legend(handles=patches, ncols=4, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def draw_panels(image: NDArray[np.uint8], panels: Mapping[str, Sequence[DrawnBox]]) -> bytes:
    """Draw a JPEG with one image several times in a row, each time with other boxes.

    Args:
        image: (H, W, 3) RGB.
        panels: boxes by title.
    """
    height, width = image.shape[:2]
    size = (IMAGE_WIDTH * len(panels), IMAGE_WIDTH * height / width + 0.35)
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False).flat
    for ax, (title, boxes) in zip(axes, panels.items()):
        draw_image(ax, image)
        for (x, y, w, h), label, kind in boxes:
            color, line = STYLES[kind]
            ax.add_patch(Rectangle((x, y), w, h, fill=False, color=color, lw=1.2, ls=line))
            # Below a missed object, because the label of a wrong box there would hide it.
            at, side = (y + h, "top") if kind == "missed" else (y, "bottom")
            text = ax.text(x, at, label, fontsize=7, color=color, va=side, path_effects=HALO)
            text.set(clip_on=True, parse_math=False)
        ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        ax.set_title(title, fontsize=8, parse_math=False)
    return encoded(figure, "jpg")


def encoded(figure: Figure, kind: str) -> bytes:
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(stream, dpi=110, format=kind, bbox_inches="tight")
    return stream.getvalue()

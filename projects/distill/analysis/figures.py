"""Figure of the comparison of models: curves of errors."""

import io
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from ..evaluation.coco_errors import CURVES

# Colour of the area between a curve and the one below. The first is white, as COCO's; all are
# distinct in grey, too.
FILLS = ("#ffffff", "#c6dbef", "#6baed6", "#2171b5", "#08306b", "#fdae6b", "#d94801")
COLUMNS, PANEL = 3, 4.2  # panels in a row of curves; inches


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
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(stream, dpi=110, format="png", bbox_inches="tight")
    return stream.getvalue()


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

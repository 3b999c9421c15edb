"""Figures of maps over an image, in rows and columns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

PANEL, OVERVIEW = 2.2, 3.2  # inches, widths of a panel and of the image next to the panels
COLORS, BOX_COLOR = colormaps["inferno"], "#7cfc00"
HALO = [withStroke(linewidth=2, foreground="k")]


@dataclass(frozen=True)
class ShownImage:
    """The image under the maps.

    Attributes:
        image: (H, W, 3) RGB.
        boxes: left, top, right, bottom in pixels.
        labels: labels of the boxes.
    """

    image: NDArray[np.uint8]
    boxes: list[list[float]]
    labels: list[str]


@dataclass(frozen=True)
class Panel:
    """A map to draw over the image.

    Attributes:
        array: (H, W), NaN where nothing is drawn, or None to draw only the image.
        area: left, top, right, bottom of the map in pixels of the image.
        limits: limits of the colours, or None for those of the array.
        note: a line of the title.
        zoom: show only this area.
        classes: names of the values 0, 1, ... if these are classes.
        marks: x and y in pixels and text.
    """

    array: NDArray[np.float32] | None
    area: tuple[float, float, float, float]
    limits: tuple[float, float] | None = None
    note: str = ""
    zoom: bool = False
    classes: tuple[str, ...] = ()
    marks: tuple[tuple[float, float, str], ...] = ()


Grid = dict[tuple[str, str], Panel]
"""Panels by row (what is shown) and column (level or instance)."""


def draw(grid: Grid, shown: ShownImage, title: str, path: Path) -> None:
    """Write a figure: the image with its boxes, and the grid next to it."""
    rows, columns = (list(dict.fromkeys(keys)) for keys in zip(*grid))
    height, width = shown.image.shape[:2]
    zoomed = any(panel.zoom for panel in grid.values())
    panel_height = PANEL * (1 if zoomed else height / width) + 0.35
    size = (
        OVERVIEW + PANEL * len(columns) + 1,
        max(panel_height * len(rows), OVERVIEW * height / width) + 1,
    )
    figure = Figure(size, layout="constrained")
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    ratios = [OVERVIEW, *[PANEL] * len(columns)]
    cells = figure.add_gridspec(len(rows), len(ratios), width_ratios=ratios)
    draw_overview(figure.add_subplot(cells[:, 0]), grid, shown)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            ax = figure.add_subplot(cells[i, j + 1])
            draw_panel(ax, grid[row, column], shown, column if i == 0 else "")
            ax.set_ylabel(row if j == 0 else "", fontsize=8)
        if limits := grid[row, columns[-1]].limits:  # shared by the whole row
            bar = ScalarMappable(Normalize(*limits), COLORS)
            beside = ax.inset_axes((1.05, 0, 0.06, 1))
            ticks = np.linspace(*limits, 3)
            figure.colorbar(bar, beside, ticks=ticks, format="%.2f").ax.tick_params(labelsize=7)
    FigureCanvasAgg(figure).print_figure(path, dpi=110)


def draw_overview(ax: Axes, grid: Grid, shown: ShownImage) -> None:
    """Draw the image with its numbered boxes, and the legend of the classes in the grid."""
    draw_image(ax, shown.image)
    ax.set(xticks=[], yticks=[], anchor="N")
    draw_boxes(ax, shown)
    for (x1, y1, x2, _), label in zip(shown.boxes, shown.labels):
        x, side = (x2, "right") if x1 > 0.7 * shown.image.shape[1] else (x1, "left")
        ax.text(x, y1, label, fontsize=7, color=BOX_COLOR, ha=side, va="top", path_effects=HALO)
    classes: dict[int, str] = {}
    for panel in grid.values():
        if panel.classes and panel.array is not None:
            present = np.unique(panel.array[np.isfinite(panel.array)]).astype(int)
            classes |= {k: panel.classes[k] for k in present.tolist()}
    if classes:
        colors = class_colors(max(classes) + 1)
        patches = [Patch(color=colors(k), label=classes[k]) for k in sorted(classes)]
        ax.legend(handles=patches, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0))


def draw_panel(ax: Axes, panel: Panel, shown: ShownImage, title: str) -> None:
    """Draw the map over the grey image; lower values are more transparent."""
    grey = shown.image.mean(2, keepdims=True).repeat(3, 2).astype(np.uint8)
    draw_image(ax, shown.image if panel.array is None else grey)
    lines = [title, panel.note]
    left, top, right, bottom = panel.area
    if panel.array is not None and np.isfinite(panel.array).any():
        values = panel.array[np.isfinite(panel.array)]
        low, high = panel.limits or (values.min(), values.max())
        colors: Colormap = COLORS
        alpha: Any = 0.2 + 0.6 * np.nan_to_num(Normalize(low, high, clip=True)(panel.array).data)
        if panel.classes:
            low, high, alpha = -0.5, len(panel.classes) - 0.5, 0.6
            colors = class_colors(len(panel.classes))
        else:
            lines.append(f"{values.min():.2f} … {values.max():.2f}")
        extent = (left, right, bottom, top)
        ax.imshow(panel.array, colors, extent=extent, vmin=low, vmax=high, alpha=alpha)
    if panel.zoom:
        ax.set_aspect((right - left) / (bottom - top))  # square, as the crops are
    else:
        left, top, right, bottom = 0, 0, shown.image.shape[1], shown.image.shape[0]
        draw_boxes(ax, shown)
    for x, y, text in panel.marks:
        ax.text(x, y, text, fontsize=6, color="w", ha="center", va="center", path_effects=HALO)
    ax.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], anchor="N")
    ax.set_title("\n".join(x for x in lines if x), fontsize=7)


def draw_image(ax: Axes, image: NDArray[np.uint8]) -> None:
    height, width = image.shape[:2]
    ax.imshow(image, extent=(0, width, height, 0))  # by default pixel centres are whole numbers


def draw_boxes(ax: Axes, shown: ShownImage) -> None:
    for x1, y1, x2, y2 in shown.boxes:
        ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=BOX_COLOR, lw=0.8))


def class_colors(number: int) -> ListedColormap:
    tab = colormaps["tab20"]
    return ListedColormap([tab(k % tab.N) for k in range(number)])

"""Charts of the report, as Plotly's HTML; each has its values as a table, and a description."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ..utils.html import Table

# Colours of Okabe and Ito, which the colour-blind can tell apart; the baseline is grey.
GREY = "#6b7280"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ("solid", "dash", "dot")  # if there are more lines than colours
MOST_POINTS, MOST_ROWS = 400, 10  # per line; per table
MOST_IN_WORDS = 4  # lines that a description lists
HEIGHT, BAR_HEIGHT = 270, 26  # pixels
FONT = {"family": "system-ui, sans-serif", "size": 12, "color": "#1b2330"}
CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
}


class Line(NamedTuple):
    """Line of a chart: values by iteration."""

    name: str
    values: Mapping[int, float]
    color: str
    dash: str = "solid"


class Chart(NamedTuple):
    """Chart of a page.

    Attributes:
        title: measure and unit.
        description: its content in words, for screen readers.
        html: Plotly's HTML, which needs :func:`library` on the page.
        height: in pixels.
        table: its values.
    """

    title: str
    description: str
    html: Markup
    height: int
    table: Table


def library() -> Markup:
    """Return the JavaScript of Plotly, which a page needs once."""
    return Markup(get_plotlyjs())


def style(number: int) -> tuple[str, str]:
    """Return colour and dash of the line with a number from 0."""
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]


def line_chart(id: str, title: str, lines: Sequence[Line], dots: bool = False) -> Chart:
    """Return a chart of values over iterations.

    Args:
        id: unique on the page.
        title: measure and unit.
        lines: lines with at least one value.
        dots: mark each value.
    """
    figure = go.Figure(layout=_layout(len(lines) > 1))
    for line in lines:
        points = dict(_thinned(sorted(line.values.items()), MOST_POINTS))
        figure.add_scatter(
            x=list(points),
            y=[_rounded(y) for y in points.values()],
            name=_text(line.name),
            mode="lines+markers" if dots or len(points) == 1 else "lines",
            line={"color": line.color, "dash": line.dash, "width": 2},
            marker={"size": 6},
        )
    figure.update_xaxes(title={"text": "iteration", "standoff": 4}, rangemode="tozero")
    figure.update_yaxes(rangemode="tozero")
    columns = ["iteration", *(x.name for x in lines)]
    every = sorted({k for line in lines for k in line.values})
    rows: list[list[Any]] = [
        [k, *(short(line.values.get(k)) for line in lines)] for k in _thinned(every, MOST_ROWS)
    ]
    return _chart(id, figure, _in_words(lines), Table(title, columns, rows))


def bar_chart(
    id: str, title: str, bars: Mapping[str, Mapping[str, float | None]], colors: Sequence[str]
) -> Chart:
    """Return a chart of horizontal bars, one group per name, with a bar for each series.

    Args:
        id, title: see :func:`line_chart`.
        bars: values of the groups by name, by series.
        colors: colour of each series.
    """
    names = list(dict.fromkeys(x for values in bars.values() for x in values))
    figure = go.Figure(layout=_layout(len(bars) > 1))
    for (series, values), color in zip(bars.items(), colors):
        figure.add_bar(
            y=[_text(name) for name in names],
            x=[_rounded(values.get(name)) for name in names],
            name=_text(series),
            orientation="h",
            marker={"color": color},
        )
    thickness = BAR_HEIGHT if len(bars) < 3 else 9 * len(bars)
    figure.update_layout(height=110 + thickness * len(names), bargap=0.25)
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    rows = [[name, *(short(values.get(name)) for values in bars.values())] for name in names]
    words = "; ".join(
        f"{series}: " + _listed(f"{name} {short(x)}" for name, x in values.items())
        for series, values in bars.items()
    )
    return _chart(id, figure, words, Table(title, ["", *bars], rows))


def stacked_chart(
    id: str, title: str, parts: Mapping[str, Mapping[str, float]], colors: Sequence[str]
) -> Chart:
    """Return a chart with one horizontal bar per name, made of parts.

    Args:
        id, title: see :func:`line_chart`.
        parts: sizes of the parts in percent by part, by the name of the bar.
        colors: colour of each part.
    """
    kinds = list(next(iter(parts.values())))
    figure = go.Figure(layout=_layout(True))
    for kind, color in zip(kinds, colors):
        figure.add_bar(
            y=[_text(name) for name in parts],
            x=[_rounded(sizes[kind]) for sizes in parts.values()],
            name=_text(kind),
            orientation="h",
            marker={"color": color, "line": {"color": "#444", "width": 1}},
        )
    figure.update_layout(barmode="stack", height=170 + 44 * len(parts))
    figure.update_xaxes(range=[0, 100], ticksuffix=" %")
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    figure.update_layout(legend={"traceorder": "normal"})
    rows = [[name, *(short(x) for x in sizes.values())] for name, sizes in parts.items()]
    words = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {short(x)}" for kind, x in sizes.items())
        for name, sizes in parts.items()
    )
    return _chart(id, figure, words, Table(title, ["", *kinds], rows))


def short(value: float | None) -> str:
    """Return a number as text with about three digits, "-" for None."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.1f}" if 10 <= abs(value) < 1e5 else f"{value:.3g}"


def _layout(legend: bool) -> dict[str, Any]:
    axis = {"gridcolor": "#e5e8ee", "linecolor": "#9aa3b2", "zerolinecolor": "#9aa3b2"}
    return {
        "template": None,
        "height": HEIGHT + 30 * legend,
        "margin": {"l": 52, "r": 12, "t": 12, "b": 44},
        "font": FONT,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "#fff",
        "showlegend": legend,
        "legend": {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top", "yref": "paper"},
        "hovermode": "closest",
        "dragmode": False,  # a finger on a chart scrolls the page
        "xaxis": axis,
        "yaxis": {**axis, "automargin": True},
    }


def _chart(id: str, figure: go.Figure, description: str, table: Table) -> Chart:
    """Return a chart. Plotly escapes its JSON, and the texts in it are escaped already."""
    options = {"full_html": False, "include_plotlyjs": False, "config": CONFIG, "div_id": id}
    html = Markup(figure.to_html(**options))
    return Chart(table.caption, description, html, figure.layout.height, table)


def _text(name: str) -> str:
    """Return a name for Plotly, which reads a few tags and entities in texts, but not "&quot;"."""
    return escape(name, quote=False)


def _thinned(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most ``most`` items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def _in_words(lines: Sequence[Line]) -> str:
    """Return where each line begins and ends."""
    texts = []
    for line in lines:
        (first, start), (last, end) = (f(line.values.items()) for f in (min, max))
        moves = f"{short(start)} at iteration {first}"
        if last > first:
            moves += f" to {short(end)} at iteration {last}"
        texts.append(f"{line.name}: {moves}")
    return _listed(texts, "; ")


def _listed(texts: Iterable[str], separator: str = ", ") -> str:
    known = list(texts)
    more = f"{separator}and {len(known) - MOST_IN_WORDS} more in the table"
    return separator.join(known[:MOST_IN_WORDS]) + (more if len(known) > MOST_IN_WORDS else "")

"""HTML pages that need no other file, from the templates in ``distill/templates``.

Jinja2 escapes every text that a template inserts. The pages forbid the browser to load anything.
"""

import base64
import functools
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

FOLDER = Path(__file__).resolve().parents[1] / "templates"


class Table(NamedTuple):
    """Table of a page; the first cell of a row is its heading.

    Attributes:
        caption: name of the table, for screen readers.
        columns: headings of the columns.
        rows: cells, as :func:`cell` takes them.
    """

    caption: str
    columns: list[str]
    rows: list[list[Any]]


def render(template: str, **values: Any) -> str:
    """Return a page.

    Args:
        template: file in ``distill/templates``.
        values: values that the template inserts.
    """
    return _environment().get_template(template).render(values)


def cell(value: Any, digits: int = 1) -> str:
    """Return a value as text: floats with some digits, "-" for None."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def data_uri(content: bytes, kind: str) -> str:
    """Return an image as the address of itself.

    Args:
        kind: file format, such as "png".
    """
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(cell=cell, data_uri=data_uri)
    return environment

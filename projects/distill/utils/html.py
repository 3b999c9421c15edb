"""One HTML page that needs no other file; every text is escaped."""

import base64
from collections.abc import Iterable
from html import escape
from typing import Any
from urllib.parse import quote

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
th, td {{ padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; }}
figure {{ margin: 1.5em 0; }}
dt {{ float: left; width: 3.5em; font-weight: bold; }}
.key {{ background: #444; padding: 0 .4em; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(title: str, body: Iterable[str]) -> str:
    """Return a whole page.

    Args:
        body: elements as the functions below return them.
    """
    return PAGE.format(title=escape(title), body="\n".join(body))


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{escape(x)}</th>" for x in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell(x))}</td>" for x in row) + "</tr>\n" for row in rows
    )
    return f"<table>\n<tr>{head}</tr>\n{body}</table>"


def cell(value: Any, digits: int = 1) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def image(data: bytes, kind: str, text: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<img alt="{escape(text)}" src="data:image/{kind};base64,{encoded}">'


def link_image(path: str) -> str:
    """Return an image that is a file beside the page, by its path relative to the page."""
    return f'<img alt="{escape(path)}" src="{escape(quote(path))}">'

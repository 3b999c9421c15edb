"""Page of the comparison of models: one HTML file that needs no other."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..evaluation.coco_errors import CURVES
from .figures import STYLES

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
COST = {
    "input": "input, pixels",
    "parameters": "parameters, M",
    "gflops": "GFLOPs",
    "memory": "peak memory, MiB",
    "fps": "images/s",
}


def render(report: Mapping[str, Any], curves: bytes, images: Sequence[bytes]) -> str:
    """Write the page.

    Args:
        report: content of the JSON file.
        curves: PNG.
        images: JPEGs of ``report["images"]``.
    """
    data, models = report["data"], report["models"]
    facts = (
        f"{data['images']} images with {data['objects']} objects (crowds not counted) of "
        f"{len(data['classes'])} classes. Boxes, at most {report['max_detections']} of a class "
        "in an image. All measures are in percent; - where there are no objects."
    )
    body = [
        paragraph(facts),
        table(["model", "detections from"], [[k, x["source"]] for k, x in models.items()]),
        heading("Average precision and recall"),
        table(["", *measures(models)], [[k, *x["metrics"].values()] for k, x in models.items()]),
        heading("Efficiency"),
        *efficiency(models),
        heading("Analysis of errors"),
        *errors(models, data, image(curves, "png", "precision over recall")),
        heading("Where the models differ most"),
        *differences(report, images),
    ]
    return PAGE.format(title=escape(f"Detections on {data['name']}"), body="\n".join(body))


def measures(models: Mapping[str, Any]) -> list[str]:
    return list(next(iter(models.values()))["metrics"])


def efficiency(models: Mapping[str, Any]) -> list[str]:
    known = {k: x["efficiency"] for k, x in models.items() if x["efficiency"]}
    parts = []
    if known:
        rows = [[k, *(cell(x[c], 2) for c in COST), x["device"]] for k, x in known.items()]
        parts = [
            table(["", *COST.values(), "device"], rows),
            paragraph(
                "One image at a time: the first of the data set. GFLOPs are fvcore's, a "
                "multiplication with its addition counted once; images/s are of the median of "
                "repeated runs, after others to warm up. Peak memory is that of PyTorch's tensors, "
                "weights included, on a GPU; on a CPU it is not measured."
            ),
        ]
    if unknown := [k for k in models if k not in known]:
        names = ", ".join(unknown)
        parts.append(
            paragraph(
                f"Not known of {names}: a file of predictions tells nothing of the network; "
                "name the folder of a training instead."
            )
        )
    return parts


def errors(models: Mapping[str, Any], data: Mapping[str, Any], figure: str) -> list[str]:
    meanings = "".join(f"<dt>{k}</dt><dd>{escape(text)}</dd>" for k, text in CURVES.items())
    overall = [[k, *x["errors"].values()] for k, x in models.items()]
    parts = [
        paragraph(
            "COCO's analysis: the area below the curve of precision over recall, the mean of the "
            "classes, as one kind of error after another is ignored. The difference of a "
            "column to the one before it is the cost of that kind of error."
            + " The data set names no supercategories, so Sim is Loc."
            * (not data["supercategories"])
        ),
        table(["", *CURVES], overall),
        f"<dl>{meanings}</dl>",
        figure,
    ]
    for name, model in models.items():
        rows = [[k, *x.values()] for k, x in zip(data["classes"], model["errors_of_classes"])]
        summary = f"<summary>{escape(name)}: each class</summary>"
        parts.append(f"<details>{summary}{table(['', *CURVES], rows)}</details>")
    return parts


def differences(report: Mapping[str, Any], images: Sequence[bytes]) -> list[str]:
    if not images:
        return [paragraph(f"{report['images_chosen_by']} There is no such image.")]
    key = "".join(
        f'<span class="key" style="color: {color}">{kind}{", dashed" * (line == "dashed")}</span> '
        for kind, (color, line) in STYLES.items()
    )
    figures = [
        f"<figure>{image(data, 'jpeg', entry['file_name'])}"
        f"<figcaption>{escape(entry['file_name'])}</figcaption></figure>"
        for entry, data in zip(report["images"], images)
    ]
    return [paragraph(report["images_chosen_by"]), f"<p>{key}</p>", *figures]


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

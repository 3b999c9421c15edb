"""Page of the comparison of models: one HTML file that needs no other."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..evaluation.coco_errors import CURVES
from ..utils.html import cell, heading, image, page, paragraph, table
from .figures import STYLES

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
    return page(f"Detections on {data['name']}", body)


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

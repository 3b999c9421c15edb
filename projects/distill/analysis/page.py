"""Page of the comparison of models: one HTML file that needs no other."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..evaluation.coco_errors import CURVES
from ..report.panels import STYLES, ComparedImage
from ..utils.html import Table, cell, render

COST = {
    "input": "input, pixels",
    "parameters": "parameters, M",
    "gflops": "GFLOPs",
    "memory": "peak memory, MiB",
    "fps": "images/s",
}


def page(report: Mapping[str, Any], curves: bytes, images: Sequence[ComparedImage]) -> str:
    """Return the page.

    Args:
        report: content of the JSON file.
        curves: PNG.
        images: those of ``report["images"]``.
    """
    data, models = report["data"], report["models"]
    known = {k: x["efficiency"] for k, x in models.items() if x["efficiency"]}
    cost = [[k, *(cell(x[c], 2) for c in COST), x["device"]] for k, x in known.items()]
    measures = list(next(iter(models.values()))["metrics"])
    results = [[k, *x["metrics"].values()] for k, x in models.items()]
    errors = [[k, *x["errors"].values()] for k, x in models.items()]
    sources = [[k, x["source"]] for k, x in models.items()]
    return render(
        "analysis.html",
        title=f"Detections on {data['name']}",
        report=report,
        sources=Table("Models", ["model", "detections from"], sources),
        results=Table("Average precision and recall", ["", *measures], results),
        efficiency=Table("Efficiency", ["", *COST.values(), "device"], cost) if known else None,
        unknown=", ".join(k for k in models if k not in known),
        errors=Table("Analysis of errors", ["", *CURVES], errors),
        meanings=CURVES,
        errors_of_classes=list(_errors_of_classes(models, data["classes"])),
        curves=curves,
        images=images,
        styles=STYLES,
    )


def _errors_of_classes(models: Mapping[str, Any], classes: Sequence[str]) -> Iterator[Table]:
    for name, model in models.items():
        rows = [[k, *x.values()] for k, x in zip(classes, model["errors_of_classes"])]
        yield Table(f"{name}: each class", ["", *CURVES], rows)

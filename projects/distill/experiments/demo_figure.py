"""Figure of the demo: AP bars, loss curves, and predictions on the same images."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import BoxMode
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ..config import student_config

COLORS = {
    "teacher": "#4c72b0",
    "baseline": "#8c8c8c",
    "control": "#ccb974",
    "distilled": "#c44e52",
    "ground truth": "#55a868",
}
NUM_IMAGES = 5
MIN_SCORE = 0.5  # lower boxes are not drawn


def draw(results: dict[str, Any], stages: list[Any], path: Path) -> None:
    """Write the summary of the first seed's models and of all seeds' AP."""
    names: list[str] = [n for n in ("teacher", "baseline", "control", "distilled") if n in results]
    first = {s.name: s for s in reversed(stages)}
    shown = ["ground truth", *(n for n in names if n != "control")]
    figure = plt.figure(figsize=(13, 5 + 2.3 * len(shown)), layout="constrained")
    ratios = [4, 2.3 * len(shown)]
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=ratios)[:, 0]
    bars, curves = top.subplots(1, 2)
    _draw_bars(bars, results, names)
    _draw_curves(curves, {n: first[n].folder for n in names})
    rows = bottom.subplots(len(shown), NUM_IMAGES, squeeze=False)
    _draw_predictions(rows, shown, first)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_bars(ax: Axes, results: dict[str, Any], names: list[str]) -> None:
    for i, name in enumerate(names):
        values = np.array(results[name]["AP"])
        ax.bar(
            i,
            values.mean(),
            color=COLORS[name],
            yerr=values.std(ddof=1) if values[1:].size else None,
        )
        ax.plot([i] * len(values), values, "k.", markersize=4)
        ax.annotate(f"{values.mean():.1f}", (i, values.mean()), ha="right", va="bottom")
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel("box AP")
    ax.set_title(f"AP, {len(results['seeds'])} seed(s)")


def _draw_curves(ax: Axes, folders: dict[str, Path]) -> None:
    """Draw the task loss (without distillation), smoothed over detectron2's logging window."""
    for name, folder in folders.items():
        rows = [json.loads(x) for x in (folder / "metrics.json").read_text().splitlines()]
        rows = [r for r in rows if "total_loss" in r]
        task = ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc")
        ax.plot(
            [r["iteration"] for r in rows],
            [sum(r[k] for k in task) for r in rows],
            label=name,
            color=COLORS[name],
        )
    ax.set_xlabel("iteration")
    ax.set_ylabel("task loss")
    ax.set_title("Training, first seed")
    ax.legend()


def _draw_predictions(axes: Any, names: list[str], stages: dict[str, Any]) -> None:
    dataset = stages["baseline"].cfg.DATASETS.TEST[0]
    entries = DatasetCatalog.get(dataset)[:NUM_IMAGES]
    classes = MetadataCatalog.get(dataset).thing_classes
    for row, name in zip(axes, names):
        predictor = None if name == "ground truth" else _predictor(stages[name])
        for ax, entry in zip(row, entries):
            image = read_image(entry["file_name"], format="BGR")
            boxes, labels = (
                _ground_truth(entry) if predictor is None else _predict(predictor, image)
            )
            ax.imshow(image[:, :, ::-1])
            ax.set_xticks([]), ax.set_yticks([])
            for (x1, y1, x2, y2), label in zip(boxes, labels):
                ax.add_patch(
                    Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=COLORS[name], lw=2)
                )
                ax.text(x1, y1, classes[label], fontsize=7, color="w", backgroundcolor=COLORS[name])
        row[0].set_ylabel(name, fontsize=12)


def _predictor(stage: Any) -> DefaultPredictor:
    cfg = student_config(stage.cfg)
    cfg.MODEL.WEIGHTS = str(stage.weights)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = MIN_SCORE
    return DefaultPredictor(cfg)


@torch.no_grad()
def _predict(predictor: DefaultPredictor, image: np.ndarray) -> tuple[list[Any], list[int]]:
    instances = predictor(image)["instances"]
    return instances.pred_boxes.tensor.tolist(), instances.pred_classes.tolist()


def _ground_truth(entry: dict[str, Any]) -> tuple[list[Any], list[int]]:
    annotations = entry["annotations"]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    return boxes, [a["category_id"] for a in annotations]

"""Folders of trainings, as a training leaves them, without training."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pycocotools.mask import frPyObjects, merge

from distill.config import get_distill_cfg

Shapes = tuple[str, str, str]
Change = Callable[[dict[str, Any]], dict[str, Any] | None]
BAD = '"><script>alert(1)</script><b>'  # in the name of a class, a head, an image and a run
LOG = f"""\
[11/30 19:00:00] detectron2 INFO: Environment info:
---------------  -------------------------
sys.platform     linux
PyTorch          2.11.0 @/some/where {BAD}
---------------  -------------------------

[11/30 19:00:01] distill.engine WARNING: Iteration 19: fitnet is dead.
continued {BAD}
[11/30 19:00:02] distill.engine WARNING: Twice
[11/30 19:00:03] distill.engine WARNING: Twice
[11/30 19:00:04] distill.engine INFO: no warning
"""


def rows(ap: float, heads: tuple[str, ...] = (), name: str = "circle") -> list[dict[str, float]]:
    """Return the rows of 40 iterations with an evaluation after each 20."""
    found = []
    for k in (19, 39):
        row = {"iteration": k, "loss_cls": 1 / (k + 1), "lr": 0.01, "time": 0.5, "data_share": 0.1}
        row |= {"total_loss": 2.0, "memory_mb": 100.0, "images_per_second": 4.0, "rpn/pos": 3}
        for head in heads:
            row |= {f"loss_{head}/p2": 2.0, f"loss_{head}/p3": 1.0, f"kd_cosine/{head}": -0.1}
            row |= {f"kd_ratio/{head}/p2": 0.2, f"kd_ratio/{head}/p3": 0.1}
        row |= {"bbox/AP": ap + k, "bbox/AP50": ap + k + 1, "bbox/APl": float("nan")}
        found.append(row | {f"bbox/AP-{name}": ap + k, "bbox/AP-square": ap, "bbox/AR": 50.0})
    return found


def write_rows(folder: Path, content: list[Mapping[str, float]]) -> None:
    text = "".join(f"{json.dumps(row)}\n" for row in content)
    (folder / "metrics.json").write_text(text)


def write_run(
    folder: Path,
    shapes: Shapes,
    ap: float = 10,
    *,
    heads: tuple[str, ...] = (),
    name: str = "circle",
    change: Change = lambda x: x,
    masks: bool = False,
) -> Path:
    """Write the folder of a run, whose detections are the annotations.

    Args:
        heads, name: see :func:`rows`.
        change: changes or leaves out a detection.
        masks: write masks, too.
    """
    (folder / "inference").mkdir(parents=True)
    write_rows(folder, rows(ap, heads, name))
    (folder / "log.txt").write_text(LOG)
    cfg = get_distill_cfg()
    cfg.DATASETS.COCO_FORMAT, cfg.DATASETS.TEST = (shapes,), (shapes[0],)
    cfg.SOLVER.MAX_ITER = 40
    cfg.MODEL.DISTILL.HEADS = heads
    (folder / "config.yaml").write_text(cfg.dump())  # all keys, as detectron2 does
    found = [y for x in detected(shapes, masks) if (y := change(x))]
    (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(found))
    return folder


def detected(shapes: Shapes, masks: bool = False) -> list[dict[str, Any]]:
    """Return every object as a detection."""
    content = json.loads(Path(shapes[1]).read_text())
    sizes = {x["id"]: (x["height"], x["width"]) for x in content["images"]}
    found = []
    for x in content["annotations"]:
        entry = {key: x[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        if masks:
            mask = merge(frPyObjects(x["segmentation"], *sizes[x["image_id"]]))
            entry["segmentation"] = {**mask, "counts": mask["counts"].decode()}
        found.append(entry)
    return found


def write_teacher(folder: Path, shapes: Shapes, change: Change) -> None:
    """Write the teacher's detections on all images, changed or left out."""
    images = [x["id"] for x in json.loads(Path(shapes[1]).read_text())["images"]]
    results = [y for x in detected(shapes) if (y := change(x))]
    content = {"images": images, "results": results}
    (folder / "report_teacher.json").write_text(json.dumps(content))

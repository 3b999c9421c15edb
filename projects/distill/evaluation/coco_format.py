"""Data sets and detections as pycocotools takes them, checked before."""

import contextlib
import io
import json
import reprlib
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from pycocotools.coco import COCO

from ..data.checks.coco_file import CocoFile
from ..data.checks.issues import ESCAPE, is_number, one_line
from ..data.datasets import find_faults
from ..errors import DataError

_KEYS = ("image_id", "category_id", "bbox", "score")


def load_truth(cfg: CfgNode, name: str) -> COCO:
    """A registered data set with boxes; its file's own content, if it has one of COCO's format.

    Args:
        cfg: of whatever uses the data set.
        name: of the data set.

    Raises:
        DataError: it cannot be read or evaluated.
    """
    metadata = MetadataCatalog.get(name)
    file = None
    if metadata.get("json_file"):
        file = CocoFile(metadata.json_file, metadata.get("image_root") or "")
        faults = [*file.faults(masks=False), *file.evaluation_faults(masks=False)]
    else:
        faults = find_faults(cfg, name)[0]
    for fault in faults:
        # A fault of one picture is one of training on it; but no picture is opened elsewhere.
        if fault.fatal and (not fault.picture or fault.kind == ESCAPE):
            raise DataError(f"Data set '{name}', {fault.where}: {fault.detail}.")
    if not metadata.get("json_file") and not metadata.get("thing_classes"):
        raise DataError(f"Data set '{name}' has no objects with boxes.")
    content = file.content if file else convert_to_coco_dict(name)
    images = {x["id"] for x in content["images"]}
    annotations = [x for x in content.get("annotations", ()) if x["image_id"] in images]
    if all(x["iscrowd"] for x in annotations):
        raise DataError(f"Data set '{name}' has no objects to find.")
    # pycocotools takes a match with an object of id 0 for none.
    numbered = [{**x, "id": k} for k, x in enumerate(annotations, 1)]
    return _indexed({**content, "annotations": numbered})


def read_results(path: str) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except OSError as e:
        raise DataError(f"Predictions '{path}' cannot be opened: {one_line(e)}.") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"Predictions '{path}' are no JSON: {one_line(e)}.") from e


def load_results(truth: COCO, results: Any, source: str) -> COCO:
    """Detected boxes in COCO's format of results, whatever they hold; masks are left out.

    Args:
        truth: the data set.
        results: list of ``{"image_id", "category_id", "bbox": [x, y, w, h] in pixels, "score"}``.
        source: of the results, for the messages.

    Raises:
        DataError: they are no such list, or of another data set.
    """
    if not isinstance(results, list):
        raise DataError(f"{source} is a JSON {type(results).__name__}, no list of detections.")
    images, categories = set(truth.getImgIds()), set(truth.getCatIds())
    for place, entry in enumerate(results):
        if problem := _problem(entry, images, categories):
            raise DataError(f"{source}, detection {place}: {problem}.")
    boxes = [{key: entry[key] for key in _KEYS} for entry in results]
    if not boxes:  # loadRes needs a detection
        return _indexed({**truth.dataset, "annotations": []})
    with contextlib.redirect_stdout(io.StringIO()):
        return truth.loadRes(boxes)


def _indexed(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _problem(entry: Any, images: set[Any], categories: set[Any]) -> str:
    """What is wrong with a detection, or ""."""
    if not isinstance(entry, dict):
        return f"{reprlib.repr(entry)} is no JSON object"
    if "bbox" not in entry:
        other = next((k for k in ("segmentation", "keypoints") if k in entry), "")
        return f"it has no bbox{f', only a {other}' if other else ''}; boxes are analyzed"
    if missing := [key for key in _KEYS if key not in entry]:
        return f"it has no {missing[0]}"
    box, score = entry["bbox"], entry["score"]
    numbers = isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
    if not numbers or min(box[2:]) < 0:
        return f"bbox {reprlib.repr(box)} is no box of x, y, width, height"
    if not is_number(score):
        return f"score {reprlib.repr(score)} is no number"
    known = {"image_id": ("picture", images), "category_id": ("category", categories)}
    for key, (what, ids) in known.items():
        if not isinstance(entry[key], (int, float, str)) or entry[key] not in ids:
            return f"the data set has no {what} of {key} {reprlib.repr(entry[key])}"
    return ""

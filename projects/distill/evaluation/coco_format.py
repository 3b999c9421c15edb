"""Checked data sets and detections in the format of pycocotools."""

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
from ..data.checks.issues import ESCAPE, is_number
from ..data.datasets import find_issues
from ..data.normalise import Rules
from ..data.registration import own_files
from ..errors import DataError
from ..utils.text import clause

_KEYS = ("image_id", "category_id", "bbox", "score")


def load_truth(cfg: CfgNode, name: str) -> COCO:
    """Return a registered data set with boxes.

    If the data set has a file in COCO's format, its content is returned, normalised.

    Args:
        cfg: config of the program that uses the data set.
        name: name of the data set.

    Raises:
        DataError: if the data set cannot be read or evaluated.
    """
    metadata = MetadataCatalog.get(name)
    file = own_files(name)
    if file is None and metadata.get("json_file"):
        rules = Rules(clip_boxes=False, keep_groups=True)
        file = CocoFile(metadata.json_file, metadata.get("image_root") or "", rules)
    if isinstance(file, CocoFile):
        issues = [*file.issues(masks=False), *file.evaluation_issues(masks=False)]
    else:
        issues = find_issues(cfg, name)[0]
    for issue in issues:
        # Issues of single images matter only in training. A path out of the folder always matters.
        if issue.fatal and (not issue.image or issue.kind == ESCAPE):
            raise DataError(f"Data set '{name}', {issue.where}: {issue.detail}.")
    if not isinstance(file, CocoFile) and not metadata.get("thing_classes"):
        raise DataError(f"Data set '{name}' has no objects with boxes.")
    content = file.content if isinstance(file, CocoFile) else convert_to_coco_dict(name)
    images = {x["id"] for x in content["images"]}
    annotations = [x for x in content.get("annotations", ()) if x["image_id"] in images]
    if all(x["iscrowd"] for x in annotations):
        raise DataError(f"Data set '{name}' has no objects to find.")
    return _indexed({**content, "annotations": annotations})


def read_results(path: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except OSError as e:
        raise DataError(f"Predictions '{path}' cannot be opened: {clause(e)}.") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"Predictions '{path}' are not valid JSON: {clause(e)}.") from e


def load_results(truth: COCO, results: Any, source: str) -> COCO:
    """Load detected boxes from COCO's format of results. Masks are left out.

    Args:
        truth: data set of the detections.
        results: list of ``{"image_id", "category_id", "bbox": [x, y, w, h] in pixels, "score"}``.
        source: origin of the results, for messages.

    Raises:
        DataError: if this is not such a list, or belongs to another data set.
    """
    if not isinstance(results, list):
        raise DataError(f"{source} is a JSON {type(results).__name__}, not a list of detections.")
    images, categories = set(truth.getImgIds()), set(truth.getCatIds())
    for number, entry in enumerate(results):
        if problem := _problem(entry, images, categories):
            raise DataError(f"{source}, detection {number}: {problem}.")
    boxes = [{key: entry[key] for key in _KEYS} for entry in results]
    if not boxes:  # loadRes fails without detections
        return _indexed({**truth.dataset, "annotations": []})
    with contextlib.redirect_stdout(io.StringIO()):
        return truth.loadRes(boxes)


def _indexed(content: dict[str, Any]) -> COCO:
    """Return a COCO object of the content."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _problem(entry: Any, images: set[Any], categories: set[Any]) -> str:
    """Describe the error in a detection; return "" if there is no error."""
    if not isinstance(entry, dict):
        return f"{reprlib.repr(entry)} is not a JSON object"
    if "bbox" not in entry:
        other = next((k for k in ("segmentation", "keypoints") if k in entry), "")
        return f"it has no bbox{f', only a {other}' if other else ''}; the analysis needs boxes"
    if missing := [key for key in _KEYS if key not in entry]:
        return f"it has no {missing[0]}"
    box, score = entry["bbox"], entry["score"]
    numbers = isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
    if not numbers or min(box[2:]) < 0:
        return f"bbox {reprlib.repr(box)} must be [x, y, width, height] in pixels"
    if not is_number(score):
        return f"score {reprlib.repr(score)} is not a number"
    known = {"image_id": ("image", images), "category_id": ("category", categories)}
    for key, (noun, ids) in known.items():
        if not isinstance(entry[key], (int, float, str)) or entry[key] not in ids:
            return f"the data set has no {noun} with {key} {reprlib.repr(entry[key])}"
    return ""

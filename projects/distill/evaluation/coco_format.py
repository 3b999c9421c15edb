"""Checked data sets and detections in the format of pycocotools."""

import contextlib
import io
import json
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from pycocotools.coco import COCO

from ..data.checks.coco_file import CocoFile
from ..data.checks.issues import ESCAPE, is_number
from ..data.datasets import find_issues
from ..data.normalise import Rules
from ..data.registration import is_own_set, own_files
from ..errors import DataError
from ..utils.text import clause

# Keys of a detection by the part that is compared. pycocotools takes the area of a mask only if
# there is no box.
_KEYS = {
    "bbox": ("image_id", "category_id", "bbox", "score"),
    "segm": ("image_id", "category_id", "segmentation", "score"),
}


@dataclass(frozen=True)
class AnnotatedSet:
    """A data set with boxes, and its images.

    Attributes:
        truth: its annotations.
        image_root: folder of the images; "" if their names are whole paths.
        max_detections: detections of a class in an image that its evaluation counts.
    """

    truth: COCO
    image_root: str
    max_detections: int = 100


def open_set(cfg: CfgNode, name: str) -> AnnotatedSet:
    """Open a registered data set as :func:`load_truth` does, and with its errors."""
    metadata = MetadataCatalog.get(name)
    in_file = metadata.get("json_file")  # otherwise detectron2's reader gives whole paths
    # As the evaluators: a user's own images may have more objects than COCO's.
    most = max(100, cfg.TEST.DETECTIONS_PER_IMAGE) if is_own_set(cfg, name) else 100
    return AnnotatedSet(load_truth(cfg, name), (in_file and metadata.get("image_root")) or "", most)


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


def load_results(
    truth: COCO,
    results: Any,
    source: str,
    iou_type: str = "bbox",
    images: Collection[Any] | None = None,
) -> COCO:
    """Load detections from COCO's format of results.

    Args:
        truth: data set of the detections.
        results: list of ``{"image_id", "category_id", "bbox": [x, y, w, h] in pixels, "score"}``,
            or with ``"segmentation"``, a mask in COCO's compressed run lengths.
        source: origin of the results, for messages.
        iou_type: "bbox" loads the boxes, "segm" the masks.
        images: ids of the images whose detections to keep; None: all.

    Raises:
        DataError: if this is not such a list, or belongs to another data set.
    """
    if not isinstance(results, list):
        raise DataError(f"{source} is a JSON {type(results).__name__}, not a list of detections.")
    keys, known, categories = _KEYS[iou_type], truth.imgs, set(truth.getCatIds())
    for number, entry in enumerate(results):
        if problem := _problem(entry, known, categories, keys):
            raise DataError(f"{source}, detection {number}: {problem}.")
    kept = known if images is None else set(images)
    found = [{key: x[key] for key in keys} for x in results if x["image_id"] in kept]
    if not found:  # loadRes fails without detections
        return _indexed({**truth.dataset, "annotations": []})
    with contextlib.redirect_stdout(io.StringIO()):
        return truth.loadRes(found)


def _indexed(content: dict[str, Any]) -> COCO:
    """Return a COCO object of the content."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _problem(
    entry: Any, images: Mapping[Any, Any], categories: set[Any], keys: Sequence[str]
) -> str:
    """Describe the error in a detection; return "" if there is no error."""
    if not isinstance(entry, dict):
        return f"{reprlib.repr(entry)} is not a JSON object"
    if "bbox" in keys and "bbox" not in entry:
        other = next((k for k in ("segmentation", "keypoints") if k in entry), "")
        return f"it has no bbox{f', only a {other}' if other else ''}; the analysis needs boxes"
    if missing := [key for key in keys if key not in entry]:
        return f"it has no {missing[0]}"
    if not is_number(entry["score"]):
        return f"score {reprlib.repr(entry['score'])} is not a number"
    known = {"image_id": ("image", images), "category_id": ("category", categories)}
    for key, (noun, ids) in known.items():
        if not isinstance(entry[key], (int, float, str)) or entry[key] not in ids:
            return f"the data set has no {noun} with {key} {reprlib.repr(entry[key])}"
    if "bbox" in keys:
        return _box_problem(entry["bbox"])
    return _mask_problem(entry["segmentation"], images[entry["image_id"]])


def _box_problem(box: Any) -> str:
    numbers = isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
    if numbers and min(box[2:]) >= 0:
        return ""
    return f"bbox {reprlib.repr(box)} must be [x, y, width, height] in pixels"


def _mask_problem(mask: Any, image: dict[str, Any]) -> str:
    size = [image["height"], image["width"]]
    if isinstance(mask, dict) and mask.get("size") == size and isinstance(mask.get("counts"), str):
        return ""
    return f"segmentation {reprlib.repr(mask)} must be compressed run lengths of size {size}"

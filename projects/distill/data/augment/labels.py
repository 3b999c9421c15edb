"""Boxes, classes and masks of an image as arrays, which move together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data.detection_utils import annotations_to_instances, filter_empty_instances
from detectron2.structures import BoxMode, Instances
from fvcore.transforms.transform import CropTransform, Transform
from numpy.typing import NDArray

from ..detections import Found

Array = NDArray[Any]
Size = tuple[int, int]
Mask = list[Array] | Array
"""Polygons, (K, 2) in pixels each, or a bitmask (H, W) of uint8."""


class BoxRule(NamedTuple):
    """Rule by which objects are dropped after their image was cut.

    Attributes:
        min_side: width and height in pixels, which a box must exceed.
        min_visible: share of the object's area, which must be exceeded inside of the image.
        max_aspect: limit of the longer side over the shorter one.
    """

    min_side: float = 0.0
    min_visible: float = 0.0
    max_aspect: float = math.inf

    def keeps(self, boxes: Array, areas: Array) -> NDArray[np.bool_]:
        """Return True for the boxes to keep.

        Args:
            boxes: (N, 4) XYXY, cut to the image.
            areas: (N,) in square pixels, before the cut.
        """
        sides = boxes[:, 2:] - boxes[:, :2]
        short, long = sides.min(1), sides.max(1)
        visible = sides.prod(1) > self.min_visible * areas
        return (short > self.min_side) & visible & (short > long / self.max_aspect)


ANY_AREA = BoxRule()
"""Objects are dropped if no area remains."""


@dataclass(frozen=True)
class Labels:
    """Objects of an image.

    Attributes:
        boxes: (N, 4) XYXY in pixels, float64.
        classes: (N,).
        scores: (N,) of a teacher's detections, in [0, 1]; NaN for annotated objects.
        masks: one per object, or None if the network has no masks.
    """

    boxes: Array
    classes: Array
    scores: Array
    masks: list[Mask] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, keep: NDArray[np.bool_]) -> "Labels":
        masks = self.masks
        if masks is not None:
            masks = [mask for mask, kept in zip(masks, keep) if kept]
        return Labels(self.boxes[keep], self.classes[keep], self.scores[keep], masks)

    def moved(self, transform: Transform, size: Size, rule: BoxRule = ANY_AREA) -> "Labels":
        """Return the objects that remain in the transformed image.

        Boxes are those of the masks, if there are masks, and otherwise hulls of the four corners.

        Args:
            transform: its ``area_scale`` is the factor of areas; without it, they stay the same.
            size: height and width of the transformed image, to which the objects are cut.
            rule: decides which objects are dropped.
        """
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        areas = sides.prod(1) * getattr(transform, "area_scale", 1.0)
        boxes, masks = transform.apply_box(self.boxes), None
        if self.masks is not None:
            masks = _moved_masks(self.masks, transform, size)
            boxes = np.array([_bounds(mask) for mask in masks], dtype=float).reshape(-1, 4)
        boxes = boxes.clip(0, [size[1], size[0]] * 2)
        return Labels(boxes, self.classes, self.scores, masks)[rule.keeps(boxes, areas)]

    def instances(self, size: Size, mask_format: str) -> Instances:
        """Return detectron2's ground truth of an image of ``size``, height and width.

        Args:
            mask_format: ``INPUT.MASK_FORMAT``.
        """
        own = self[np.isnan(self.scores)]
        rows = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": k}
            for box, k in zip(own.boxes, own.classes)
        ]
        for row, mask in zip(rows, own.masks or ()):
            row["segmentation"] = [x.ravel() for x in mask] if isinstance(mask, list) else mask
        return filter_empty_instances(annotations_to_instances(rows, size, mask_format))

    @property
    def detections(self) -> Found:
        """The detections of a teacher."""
        found = self[~np.isnan(self.scores)]
        return Found(found.boxes, found.scores, found.classes)


def joined(parts: Sequence[Labels]) -> Labels:
    """Return the objects of several images, which lie in the same frame."""
    masks = None
    if all(x.masks is not None for x in parts):
        masks = [mask for x in parts for mask in x.masks or ()]
    boxes, classes, scores = (
        np.concatenate([getattr(x, k) for x in parts]) for k in ("boxes", "classes", "scores")
    )
    return Labels(boxes, classes, scores, masks)


def read_labels(
    annotations: Sequence[dict[str, Any]], size: Size, masks: bool, found: Found | None = None
) -> Labels:
    """Return the objects of detectron2's annotations, without crowds, and a teacher's detections.

    Args:
        annotations: those of an image.
        size: height and width of the image, to which boxes are cut.
        masks: also read the masks; that of a detection is its box.
        found: the detections.
    """
    objects = [x for x in annotations if not x.get("iscrowd", 0)]
    boxes = [BoxMode.convert(list(x["bbox"]), x["bbox_mode"], BoxMode.XYXY_ABS) for x in objects]
    own = Labels(
        np.array(boxes, dtype=float).reshape(-1, 4).clip(0, [size[1], size[0]] * 2),
        np.array([x["category_id"] for x in objects], dtype=np.int64),
        np.full(len(objects), np.nan),
        [_read_mask(x["segmentation"]) for x in objects] if masks else None,
    )
    if found is None or not len(found.boxes):
        return own
    cut = found.boxes.astype(float).clip(0, [size[1], size[0]] * 2)
    corners: list[Mask] = [[x[[0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)] for x in cut]
    return joined([own, Labels(cut, found.classes, found.scores, corners if masks else None)])


def _read_mask(segmentation: Any) -> Mask:
    if isinstance(segmentation, dict):
        mask: Array = mask_util.decode(segmentation)
        return mask
    return [np.asarray(polygon, dtype=float).reshape(-1, 2) for polygon in segmentation]


def _moved_masks(masks: Sequence[Mask], transform: Transform, size: Size) -> list[Mask]:
    polygons = [x for mask in masks if isinstance(mask, list) for x in mask]
    cut = iter(_moved_polygons(polygons, transform, size))
    return [
        [part for _ in mask for part in next(cut)]
        if isinstance(mask, list)
        else transform.apply_segmentation(mask)
        for mask in masks
    ]


def _moved_polygons(
    polygons: Sequence[Array], transform: Transform, size: Size
) -> list[list[Array]]:
    """Return the parts of each transformed polygon that are inside of the image.

    The points of all polygons are transformed at once, and only polygons on the border are cut, in
    order to save time.
    """
    if not polygons:
        return []
    ends = np.cumsum([len(x) for x in polygons])
    points = transform.apply_coords(np.concatenate(polygons))
    starts = np.r_[0, ends[:-1]]
    low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    corner = np.array([size[1], size[0]])
    inside = np.all(low >= 0, 1) & np.all(high <= corner, 1)
    outside = np.any(high <= 0, 1) | np.any(low >= corner, 1)
    window = CropTransform(0, 0, size[1], size[0])
    return [
        [x] if all_in else [] if all_out else window.apply_polygons([x])
        for x, all_in, all_out in zip(np.split(points, ends[:-1]), inside, outside)
    ]


def _bounds(mask: Mask) -> tuple[float, ...]:
    """Return the box of a mask, XYXY; four zeros for an empty one."""
    if isinstance(mask, list):
        points = np.concatenate(mask) if mask else np.zeros((1, 2))
        return (*points.min(0), *points.max(0))
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return 0, 0, 0, 0
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1

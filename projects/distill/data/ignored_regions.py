"""Mapper that hides the regions of an image that a training must ignore."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode, polygons_to_bitmask
from numpy.typing import NDArray

from .checks.issues import is_evaluable_mask

Bools = NDArray[np.bool_]


class IgnoredRegionsMapper(DatasetMapper):
    """detectron2's mapper, which paints over the regions that a training must ignore.

    Annotations with ``"ignored": True`` mark these regions: their mask, or their box without one.
    DontCare regions of KITTI and crowds have unlabelled objects, and a Van is not a wrong detection
    of Car. But detectron2 drops such annotations, and the network would learn that the regions are
    background. Its networks have no mask for the loss, and students run their own unmodified
    ``forward``.

    So the pixels change instead of the labels. The regions get the mean colour, which is 0 after
    normalisation and can be called background. Pixels inside a box of a trained class are kept. The
    teacher gets the same image. Images without such annotations are not changed.

    Args:
        is_train: as in :class:`DatasetMapper`; nothing is painted in inference.
        pixel_mean: one value per channel, in the order of ``image_format``.
        options: other arguments of :class:`DatasetMapper`.
    """

    @configurable
    def __init__(self, is_train: bool, *, pixel_mean: Sequence[float], **options: Any):
        super().__init__(is_train, **options)
        self.pixel_mean = torch.tensor(pixel_mean)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        return {**super().from_config(cfg, is_train), "pixel_mean": cfg.MODEL.PIXEL_MEAN}

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        image = dataset_dict["image"]
        if any(x.get("ignored") for x in dataset_dict["annotations"]):
            painted = ignored_pixels(dataset_dict, transforms, image_shape)
            colour = self.pixel_mean.round().to(image.dtype)
            image[:, torch.from_numpy(painted)] = colour[:, None]
        super()._transform_annotations(dataset_dict, transforms, image_shape)


def ignored_pixels(entry: dict[str, Any], transforms: Any, shape: tuple[int, int]) -> Bools:
    """Return True for the pixels (H, W) of ignored regions, outside the boxes of trained classes.

    Args:
        entry: dataset dict of the image.
        transforms: transforms from the image in the file to the transformed one.
        shape: height and width of the transformed image.
    """
    painted = np.zeros(shape, bool)
    for annotation in entry["annotations"]:
        if annotation.get("ignored"):
            painted |= _region(annotation, entry, transforms, shape)
    for annotation in entry["annotations"]:
        if not annotation.get("iscrowd", 0):
            painted &= ~_touched(annotation, transforms, shape)
    return painted


def _region(
    annotation: dict[str, Any], entry: dict[str, Any], transforms: Any, shape: tuple[int, int]
) -> Bools:
    """Return True for the pixels (H, W) of the transformed image that are in a mask or box.

    Args:
        annotation: an annotation of the image.
        entry: dataset dict of the image.
        transforms: transforms from the image in the file to the transformed one.
        shape: height and width of the transformed image.
    """
    mask: Any = annotation.get("segmentation")
    if not is_evaluable_mask(annotation):
        return _touched(annotation, transforms, shape)
    if not isinstance(mask, dict):
        polygons = transforms.apply_polygons([np.asarray(x, float).reshape(-1, 2) for x in mask])
        return polygons_to_bitmask([x.reshape(-1) for x in polygons], *shape)
    if list(mask["size"]) != [entry["height"], entry["width"]]:
        return _touched(annotation, transforms, shape)
    return transforms.apply_segmentation(mask_util.decode(mask)).astype(bool)


def _touched(annotation: dict[str, Any], transforms: Any, shape: tuple[int, int]) -> Bools:
    """Return True for the pixels (H, W) of the transformed image that a box touches."""
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    moved = transforms.apply_box(np.array([box], dtype=float))[0]
    left, top = np.floor(moved[:2]).clip(min=0).astype(int)
    right, bottom = np.ceil(moved[2:]).clip(min=0).astype(int)
    touched = np.zeros(shape, bool)
    touched[top:bottom, left:right] = True
    return touched

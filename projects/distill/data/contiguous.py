"""Images whose rows are contiguous in memory, which detectron2's mapper resizes twice as fast."""

from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetMapper
from detectron2.data.transforms import Augmentation, AugmentationList
from fvcore.transforms.transform import Transform
from numpy.typing import NDArray

Array = NDArray[Any]


class ContiguousTransform(Transform):
    """Copies an image in the order of its pixels; all values and places stay."""

    def apply_image(self, img: Array) -> Array:
        if img.ndim == 3 and img.shape[2] == 3 and img.strides[2] < 0 and img.dtype == np.uint8:
            return cv2.cvtColor(img[:, :, ::-1], cv2.COLOR_RGB2BGR)
        return np.ascontiguousarray(img)

    def apply_coords(self, coords: Array) -> Array:
        return coords

    def apply_box(self, box: Array) -> Array:
        return box

    def apply_segmentation(self, segmentation: Array) -> Array:
        return segmentation

    def inverse(self) -> Transform:
        return self


class Contiguous(Augmentation):
    """Comes before the resizing.

    detectron2 reads a BGR image as a view of RGB values in reverse order. Pillow would copy that
    view value by value, which takes longer than to decode and to resize it.
    """

    def get_transform(self, image: Array) -> Transform:
        return ContiguousTransform()


def with_contiguous_images(mapper: DatasetMapper) -> DatasetMapper:
    """Let a mapper of detectron2 copy an image before it augments it; its results stay the same."""
    mapper.augmentations = AugmentationList([Contiguous(), *mapper.augmentations.augs])
    return mapper

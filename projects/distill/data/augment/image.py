"""Images with their labels, and partners from the positions before a sample."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from detectron2.data.detection_utils import check_image_size, read_image
from fvcore.transforms.transform import Transform, TransformList
from numpy.typing import NDArray

from ...structures import DETECTIONS
from ..guarded_mapper import BadImage
from ..ignored_regions import ignored_pixels
from .labels import ANY_AREA, BoxRule, Labels, Size, read_labels
from .transforms import Place, resize

MAX_DRAWS = 15  # number of partners that are tried until one fits, as in RTMDet


class LabelledImage(NamedTuple):
    """An image and its objects, which no step changes in place.

    Attributes:
        pixels: (H, W, 3), uint8.
        labels: objects in pixels of this image.
        fitted: True if the image was scaled for the size of the result already.
    """

    pixels: NDArray[Any]
    labels: Labels
    fitted: bool = False

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def moved(self, transform: Transform, size: Size, rule: BoxRule = ANY_AREA) -> "LabelledImage":
        """Return the transformed image, scaled for the result; see :meth:`Labels.moved`."""
        labels = self.labels.moved(transform, size, rule)
        return LabelledImage(transform.apply_image(self.pixels), labels, True)


class ImageReader:
    """Reader of an image and its annotations.

    Args:
        image_format: ``INPUT.FORMAT``.
        use_instance_mask: also read the masks.
        instance_mask_format: ``INPUT.MASK_FORMAT``.
        ignored_color: color of regions to ignore, one value per channel; None: they are kept.
    """

    def __init__(
        self,
        *,
        image_format: str,
        use_instance_mask: bool,
        instance_mask_format: str,
        ignored_color: Sequence[int] | None,
    ):
        self.image_format, self.ignored_color = image_format, ignored_color
        self.use_instance_mask = use_instance_mask
        self.instance_mask_format = instance_mask_format

    def __call__(self, entry: dict[str, Any]) -> LabelledImage:
        """Read the image of detectron2's dataset dict.

        Raises:
            OSError, ValueError: the file is unreadable, or has another size than the entry says.
        """
        entry = {"annotations": [], **entry}
        pixels = read_image(entry["file_name"], format="RGB")
        check_image_size(entry, pixels)
        # detectron2's BGR is a view with a negative stride, which is slow to copy.
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if self.image_format == "BGR" else pixels
        size = pixels.shape[:2]
        if self.ignored_color is not None and any(x.get("ignored") for x in entry["annotations"]):
            pixels = pixels.copy()
            pixels[ignored_pixels(entry, TransformList([]), size)] = self.ignored_color
        found = entry.get(DETECTIONS)
        labels = read_labels(entry["annotations"], size, self.use_instance_mask, found)
        return LabelledImage(pixels, labels)


def fit_scale(image: Size, frame: Size) -> float:
    """Return the largest factor by which an image fits into a frame; both (height, width)."""
    return min(frame[0] / image[0], frame[1] / image[1])


def scaled_size(image: Size, scale: float) -> Size:
    """Return height and width of a scaled image, at least 1 pixel each."""
    return max(round(image[0] * scale), 1), max(round(image[1] * scale), 1)


def fit(image: LabelledImage, frame: Size) -> LabelledImage:
    """Resize an image to the largest size that fits into a frame (height, width)."""
    new = scaled_size(image.size, fit_scale(image.size, frame))
    return image.moved(resize(image.size, new), new)


def pad(image: LabelledImage, size: Size, fill: int) -> LabelledImage:
    """Return the image at the top left of a canvas of a size (height, width)."""
    if image.size == size:
        return image
    return image.moved(Place(0, 0, size, fill), size)


class Partners:
    """Source of the images that are combined with a sample.

    Args:
        read: returns the image of an index in the data set, or a bad image. A bad one is no
            partner, and is only reported at its own position of the stream.
        recent: indices of the images before the sample in the stream.
    """

    def __init__(self, read: Callable[[int], LabelledImage | BadImage], recent: Sequence[int]):
        self.read, self.recent = read, recent

    def draw(self, with_objects: bool = False) -> LabelledImage | None:
        """Return a random partner, with replacement, or None if no draw finds one.

        Args:
            with_objects: only images with objects.
        """
        for _ in range(MAX_DRAWS if self.recent else 0):
            found = self.read(self.recent[np.random.randint(len(self.recent))])
            if isinstance(found, LabelledImage) and (len(found.labels) or not with_objects):
                return found
        return None

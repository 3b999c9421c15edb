"""Transforms of images, masks and coordinates.

Coordinates are continuous as in detectron2: pixel i covers [i, i + 1).
"""

from typing import Any

import cv2
import numpy as np
from fvcore.transforms.transform import Transform
from numpy.typing import NDArray

Array = NDArray[Any]
Size = tuple[int, int]
Rectangle = tuple[int, int, int, int]


def overlap(
    canvas: tuple[int, ...], tile: tuple[int, ...], x: int, y: int
) -> tuple[Rectangle, Rectangle]:
    """Return the rectangle that a tile covers of a canvas, and the part of the tile it shows.

    Args:
        canvas, tile: shapes, which begin with height and width.
        x, y: corner of the tile on the canvas, which may be outside.

    Returns:
        Both as (left, top, right, bottom).
    """
    left, top = max(x, 0), max(y, 0)
    right, bottom = max(min(x + tile[1], canvas[1]), left), max(min(y + tile[0], canvas[0]), top)
    return (left, top, right, bottom), (left - x, top - y, right - x, bottom - y)


def paste(canvas: Array, tile: Array, x: int, y: int) -> None:
    """Write a tile over a canvas with its corner at (x, y); the rest of it is cut."""
    (x1, y1, x2, y2), (u1, v1, u2, v2) = overlap(canvas.shape, tile.shape, x, y)
    canvas[y1:y2, x1:x2] = tile[v1:v2, u1:u2]


class Place(Transform):
    """Shift an image onto a canvas, which cuts it and fills the rest.

    Args:
        x, y: corner of the image on the canvas.
        size: height and width of the canvas.
        fill: value of the other pixels. The masks have 0 there.
    """

    def __init__(self, x: int, y: int, size: Size, fill: int = 0):
        super().__init__()
        self.x, self.y, self.size, self.fill = x, y, size, fill

    def apply_image(self, img: Array) -> Array:
        return self._placed(img, self.fill)

    def apply_segmentation(self, segmentation: Array) -> Array:
        return self._placed(segmentation, 0)

    def apply_coords(self, coords: Array) -> Array:
        return coords + (self.x, self.y)

    def _placed(self, tile: Array, fill: int) -> Array:
        canvas = np.full((*self.size, *tile.shape[2:]), fill, tile.dtype)
        paste(canvas, tile, self.x, self.y)
        return canvas


class Zoom(Transform):
    """Cut a window out of an image and resize it.

    Bilinear interpolation reads at most 2 x 2 old pixels. So smaller results are the averages over
    the area of each new pixel, and have no aliasing.

    Args:
        window: left, top, width and height in pixels, inside of the image.
        size: height and width of the result.
    """

    def __init__(self, window: Rectangle, size: Size):
        super().__init__()
        self.window, self.size = window, size
        self.scale = size[1] / window[2], size[0] / window[3]
        self.area_scale = self.scale[0] * self.scale[1]

    def apply_image(self, img: Array) -> Array:
        return self._resized(img, cv2.INTER_AREA if min(self.scale) < 0.5 else cv2.INTER_LINEAR)

    def apply_segmentation(self, segmentation: Array) -> Array:
        return self._resized(segmentation, cv2.INTER_NEAREST_EXACT)

    def apply_coords(self, coords: Array) -> Array:
        return (coords - self.window[:2]) * self.scale

    def _resized(self, img: Array, interpolation: int) -> Array:
        x, y, width, height = self.window
        part = img[y : y + height, x : x + width]
        return cv2.resize(part, self.size[::-1], interpolation=interpolation)


def resize(old: Size, new: Size) -> Zoom:
    """Return the transform that resizes an image; both sizes are heights and widths."""
    return Zoom((0, 0, old[1], old[0]), new)


class Affine(Transform):
    """Map an image by a matrix.

    Args:
        matrix: (2, 3), from old coordinates (x, y, 1) to new ones.
        size: height and width of the new image.
        fill: value of the pixels that the old image does not cover. The masks have 0 there.
    """

    def __init__(self, matrix: Array, size: Size, fill: int):
        super().__init__()
        self.matrix, self.size, self.fill = matrix, size, fill
        self.area_scale = abs(np.linalg.det(matrix[:, :2]))

    def apply_image(self, img: Array) -> Array:
        return self._warped(img, cv2.INTER_LINEAR, self.fill)

    def apply_segmentation(self, segmentation: Array) -> Array:
        return self._warped(segmentation, cv2.INTER_NEAREST, 0)

    def apply_coords(self, coords: Array) -> Array:
        moved: Array = coords @ self.matrix[:, :2].T + self.matrix[:, 2]
        return moved

    def _warped(self, img: Array, flags: int, fill: int) -> Array:
        of_pixels = self.matrix.copy()  # OpenCV's coordinates are 0 at the centre of a pixel
        of_pixels[:, 2] += self.matrix[:, :2] @ (0.5, 0.5) - 0.5
        colour = (fill,) * 3
        return cv2.warpAffine(img, of_pixels, self.size[::-1], flags=flags, borderValue=colour)


def linear_map(rotation: float, scale: float, shear: tuple[float, float]) -> Array:
    """Return (2, 2), a rotation and scaling, and then a shear.

    It is the part S R of YOLOv5's matrix. That of YOLOX has the shears of x and y swapped, and
    mmdetection turns into the other direction. Random draws have the same distribution in all.

    Args:
        rotation: in degrees; a positive one turns the x-axis towards -y.
        scale: factor of lengths.
        shear: angles of x and y in degrees.
    """
    angle = np.deg2rad(rotation)
    turn = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    along_x, along_y = np.tan(np.deg2rad(shear))
    sheared: Array = np.array([[1, along_x], [along_y, 1]]) @ turn
    return sheared

"""Outlines of masks with the conventions of COCO and of Cityscapes."""

from __future__ import annotations

import cv2
import numpy as np

from .scenes import Mask

_Point = tuple[int, int]


def mask_to_polygons(mask: Mask) -> list[list[float]]:
    """Return outlines of a mask (H, W) along pixel edges, as flat lists x0, y0, x1, y1, ….

    There is one polygon per 4-connected piece. Rasterising the polygons gives the mask again.

    Raises:
        ValueError: the mask has holes, which COCO's polygons cannot express.
    """
    # There is one edge per pixel side next to the background, with the pixel on its right side.
    padded = np.pad(mask, 1)
    edges: dict[_Point, list[_Point]] = {}
    for dy, dx, start, end in _PIXEL_SIDES:
        beyond = padded[1 + dy : padded.shape[0] - 1 + dy, 1 + dx : padded.shape[1] - 1 + dx]
        for y, x in np.argwhere(mask & ~beyond).tolist():
            edges.setdefault((x + start[0], y + start[1]), []).append((x + end[0], y + end[1]))

    polygons = []
    while edges:
        first = min(edges)  # the leftmost corner is on an outer outline, if one is left
        corners = _follow_edges(edges, first)
        polygon = np.array(corners, dtype=np.float64)
        x, y = polygon.T
        if np.dot(x, np.roll(y, -1)) < np.dot(y, np.roll(x, -1)):
            raise ValueError("the mask has a hole, which polygons cannot express")
        # Floats, because resizing transforms coordinates in place and would truncate integers.
        polygons.append(polygon.reshape(-1).tolist())
    return polygons


# Offset (dy, dx) of the neighbour at a pixel's side, and the side from corner to corner (x, y).
_PIXEL_SIDES = (
    (-1, 0, (0, 0), (1, 0)),
    (0, 1, (1, 0), (1, 1)),
    (1, 0, (1, 1), (0, 1)),
    (0, -1, (0, 1), (0, 0)),
)


def _follow_edges(edges: dict[_Point, list[_Point]], first: _Point) -> list[_Point]:
    """Remove one closed outline from ``edges``, and return the corners where it turns."""
    corners: list[_Point] = []
    here, step = first, (0, 0)
    while True:
        ends = edges[here]
        # If two pixels touch only at a corner, a right turn stays at the same pixel.
        right = (here[0] - step[1], here[1] + step[0])
        there = right if right in ends else ends[0]
        ends.remove(there)
        if not ends:
            del edges[here]
        new_step = (there[0] - here[0], there[1] - here[1])
        if new_step != step:
            corners.append(here)
        here, step = there, new_step
        if here == first:
            return corners


def mask_to_pixel_outlines(mask: Mask) -> list[list[list[int]]]:
    """Return outlines of a mask (H, W) through the centres of border pixels, as points [x, y].

    There is one outline per 8-connected piece, as in Cityscapes' json files. If PIL draws them, as
    in cityscapesscripts, they give the mask again, without its holes.
    """
    outlines, _ = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    points: list[list[list[int]]] = [outline[:, 0].tolist() for outline in outlines]
    # Shapely needs at least three points, which pieces of one or two pixels do not have.
    return [ring + ring[-1:] * (3 - len(ring)) for ring in points]

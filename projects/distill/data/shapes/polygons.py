"""Outlines of masks in the conventions of COCO and of Cityscapes."""

from __future__ import annotations

import cv2
import numpy as np

from .scenes import Mask

_Point = tuple[int, int]


def mask_to_polygons(mask: Mask) -> list[list[float]]:
    """Outlines of a mask (H, W) along the edges of its pixels, as flat lists x0, y0, x1, y1, ….

    One polygon for each 4-connected piece; rasterising them gives the mask again.

    Raises:
        ValueError: the mask has holes, which COCO's polygons cannot express.
    """
    # One edge per pixel side that has background beyond it, with the pixel on its right-hand side.
    padded = np.pad(mask, 1)
    edges: dict[_Point, list[_Point]] = {}
    for dy, dx, start, end in _PIXEL_SIDES:
        beyond = padded[1 + dy : padded.shape[0] - 1 + dy, 1 + dx : padded.shape[1] - 1 + dx]
        for y, x in np.argwhere(mask & ~beyond).tolist():
            edges.setdefault((x + start[0], y + start[1]), []).append((x + end[0], y + end[1]))

    polygons = []
    while edges:
        first = min(edges)  # The leftmost corner of what is left: on an outer outline if it can be.
        corners = _follow_edges(edges, first)
        polygon = np.array(corners, dtype=np.float64)
        x, y = polygon.T
        if np.dot(x, np.roll(y, -1)) < np.dot(y, np.roll(x, -1)):
            raise ValueError("the mask has a hole, which polygons cannot express")
        # Floats, because resizing transforms coordinates in place and would truncate integers.
        polygons.append(polygon.reshape(-1).tolist())
    return polygons


# Offset (dy, dx) of the neighbour beyond a pixel's side; that side from corner to corner (x, y).
_PIXEL_SIDES = (
    (-1, 0, (0, 0), (1, 0)),
    (0, 1, (1, 0), (1, 1)),
    (1, 0, (1, 1), (0, 1)),
    (0, -1, (0, 1), (0, 0)),
)


def _follow_edges(edges: dict[_Point, list[_Point]], first: _Point) -> list[_Point]:
    """Take one closed outline out of ``edges``; returns the corners where it turns."""
    corners: list[_Point] = []
    here, step = first, (0, 0)
    while True:
        ends = edges[here]
        # Where two pixels meet at a corner only, a right turn stays with the same pixel.
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
    """Outlines of a mask (H, W) through the centres of its border pixels, as points [x, y].

    One for each 8-connected piece, as Cityscapes' json files hold them. Drawn by PIL, as
    cityscapesscripts does, they give the mask again, but for its holes.
    """
    outlines, _ = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    points: list[list[list[int]]] = [outline[:, 0].tolist() for outline in outlines]
    # Shapely refuses a ring of less than three points; a piece one or two pixels long has no more.
    return [ring + ring[-1:] * (3 - len(ring)) for ring in points]

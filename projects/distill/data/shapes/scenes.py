"""Textured geometric scenes with occlusion, for detection without a download.

A scene has one to six of the eight shapes in :data:`CLASSES`, in front of a landscape of the four
regions in :data:`STUFF_CLASSES`. Shapes have random textures and colours, so that only the outline
determines the class. They overlap in depth order, and the border may cut them.

Scene ``i`` of a split depends only on ``(seed, split, i)`` and the config. It is the same in a
larger split. :mod:`distill.data.shapes` writes the scenes in the layouts of COCO, Cityscapes,
PASCAL VOC and KITTI.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from .textures import (
    STUFF_CLASSES,
    Floats,
    Image,
    draw_distractors,
    draw_stuff_map,
    object_texture,
    render_background,
)

__all__ = [
    "CLASSES",
    "SCENES_VERSION",
    "STUFF_CLASSES",
    "Image",
    "Mask",
    "Scene",
    "SceneConfig",
    "iter_scenes",
    "make_scene",
    "mask_to_box",
]

CLASSES = ("circle", "ellipse", "square", "triangle", "pentagon", "star", "cross", "crescent")
SCENES_VERSION = 1  # raise it with every change of the pixels of a scene; written data have it

_SUPERSAMPLING = 4
_PLACEMENT_ATTEMPTS = 30

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class SceneConfig:
    """Appearance of the scenes.

    Args:
        height, width: size of the image in pixels.
        min_objects, max_objects: bounds of the number of objects, which is drawn uniformly. A scene
            has fewer objects if there is no place for one (see ``min_visible``), but at least one.
        min_size, max_size: bounds of the diameter of an object's circumscribed circle, as a
            fraction of the image's shorter side. The diameter is drawn uniformly.
        min_visible: smallest visible fraction of a whole object in [0, 1], given occlusion and the
            border of the image. An object that would violate it is placed again.
        min_area: smallest visible area of an object in pixels.
        max_distractors: largest number of unlabelled blobs and lines behind the objects.
        noise: standard deviation of the pixel noise in grey levels, of 255.
        max_rotation: largest rotation of an object in both directions, in degrees; 180 allows all.
        texture_contrast: difference of the two colours of a texture, in [0, 1]; with 0, an object
            has one colour.
    """

    height: int = 128
    width: int = 128
    min_objects: int = 1
    max_objects: int = 6
    min_size: float = 0.125
    max_size: float = 0.5
    min_visible: float = 0.3
    min_area: int = 32
    max_distractors: int = 4
    noise: float = 6.0
    max_rotation: float = 180.0
    texture_contrast: float = 1.0

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 32:
            raise ValueError(f"a scene is at least 32x32 pixels, got {self.width}x{self.height}")
        if not 1 <= self.min_objects <= self.max_objects <= 100:
            raise ValueError(
                "need 1 <= min_objects <= max_objects <= 100, "
                f"got {self.min_objects}, {self.max_objects}"
            )
        if not 0 < self.min_size <= self.max_size <= 1:
            raise ValueError(
                f"need 0 < min_size <= max_size <= 1, got {self.min_size}, {self.max_size}"
            )
        if not (0 <= self.max_rotation <= 180 and 0 <= self.texture_contrast <= 1):
            raise ValueError(
                "need max_rotation in [0, 180] and texture_contrast in [0, 1], "
                f"got {self.max_rotation}, {self.texture_contrast}"
            )
        if not 0 <= self.min_visible < 1:
            raise ValueError(f"min_visible must be in [0, 1), got {self.min_visible}")
        # The smallest shape (crescent) covers about a tenth of the square around its circle.
        largest = (self.max_size * min(self.height, self.width)) ** 2
        if self.min_area > 0.1 * largest:
            raise ValueError(f"objects of max_size {self.max_size} cannot show {self.min_area} px")


@dataclass(frozen=True, eq=False)
class Scene:
    """Image with its labels; the order of objects is from the farthest to the nearest.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        classes: N indices into :data:`CLASSES`.
        masks: N masks (H, W) of the visible part of each object. They are disjoint, without holes,
            and may have several pieces.
        full_masks: N masks (H, W) of each object as it would be visible without occlusion. Each has
            one 4-connected piece without holes.
        truncations: N fractions in [0, 1) of each object that are outside the image.
        stuff: (H, W) uint8, indices into :data:`STUFF_CLASSES`, also behind the objects.
    """

    image: Image
    classes: list[int]
    masks: list[Mask]
    full_masks: list[Mask]
    truncations: list[float]
    stuff: Image

    @property
    def boxes(self) -> NDArray[np.float64]:
        """Tight XYXY boxes (N, 4) in pixels of the visible masks; a pixel ends at index + 1."""
        return np.array([mask_to_box(mask) for mask in self.masks], dtype=np.float64).reshape(-1, 4)

    @property
    def semantic(self) -> Image:
        """Indices into ``CLASSES + STUFF_CLASSES``, (H, W) uint8; every pixel has a label."""
        semantic = self.stuff + np.uint8(len(CLASSES))
        for class_id, mask in zip(self.classes, self.masks, strict=True):
            semantic[mask] = class_id
        return semantic

    @property
    def visible_fractions(self) -> list[float]:
        """Visible area over the area inside the image: N fractions in (0, 1]."""
        pairs = zip(self.masks, self.full_masks, strict=True)
        return [float(mask.sum() / full.sum()) for mask, full in pairs]


@dataclass(frozen=True, eq=False)
class _Object:
    """Placed object; ``alpha`` (h, w) in [0, 1] covers the window that starts at (x, y)."""

    class_id: int
    x: int
    y: int
    alpha: Floats
    full_mask: Mask
    full_area: float


def mask_to_box(mask: Mask) -> tuple[float, float, float, float]:
    """Return the tight XYXY box of a non-empty (H, W) mask, with exclusive right and lower ends."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def make_scene(split: str, index: int, seed: int = 0, config: SceneConfig | None = None) -> Scene:
    """Render scene ``index`` of ``split``.

    Args:
        split: any name, such as "train"; splits have different scenes.
        index: 0, 1, 2, …
        seed: at least 0; another seed gives another data set.
        config: appearance; by default ``SceneConfig()``.
    """
    config = config or SceneConfig()
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    stuff = draw_stuff_map(rng, config.height, config.width)
    canvas = render_background(rng, stuff)
    draw_distractors(rng, canvas, config.max_distractors)

    objects, masks = _place_objects(rng, config)
    for obj in objects:
        height, width = obj.alpha.shape
        window = canvas[obj.y : obj.y + height, obj.x : obj.x + width]
        texture = object_texture(rng, height, width, config.texture_contrast)
        window += obj.alpha[..., None] * (texture - window)
    canvas += rng.normal(0, config.noise, canvas.shape).astype(np.float32)

    return Scene(
        image=np.clip(np.rint(canvas), 0, 255).astype(np.uint8),
        classes=[obj.class_id for obj in objects],
        masks=masks,
        full_masks=[obj.full_mask for obj in objects],
        # The rasterised area may exceed the exact one by a fraction of a pixel.
        truncations=[max(0.0, 1 - float(o.full_mask.sum()) / o.full_area) for o in objects],
        stuff=stuff,
    )


def iter_scenes(
    split: str, num_scenes: int, seed: int = 0, config: SceneConfig | None = None
) -> Iterator[Scene]:
    """Yield the first ``num_scenes`` scenes of ``split``; see :func:`make_scene`."""
    for index in range(num_scenes):
        yield make_scene(split, index, seed, config)


def _place_objects(
    rng: np.random.Generator, config: SceneConfig
) -> tuple[list[_Object], list[Mask]]:
    """Place objects from back to front, and return them with their visible masks."""
    objects: list[_Object] = []
    masks: list[Mask] = []
    wanted = int(rng.integers(config.min_objects, config.max_objects + 1))
    for _ in range(wanted):
        # The class is drawn outside the loop, so that classes which fit easily are not preferred.
        class_id = int(rng.integers(len(CLASSES)))
        for _ in range(_PLACEMENT_ATTEMPTS):
            candidate = _draw_object(rng, class_id, config)
            if candidate is None or not _is_visible(
                candidate.full_mask, candidate.full_area, config
            ):
                continue
            covered = [mask & ~candidate.full_mask for mask in masks]
            if all(
                new.sum() == old.sum()
                or (_is_visible(new, obj.full_area, config) and not _has_hole(new))
                for new, old, obj in zip(covered, masks, objects, strict=True)
            ):
                objects.append(candidate)
                masks = [*covered, candidate.full_mask]
                break
    if not objects:
        raise RuntimeError(f"no object could be placed with {config}")
    return objects, masks


def _is_visible(mask: Mask, full_area: float, config: SceneConfig) -> bool:
    visible = float(mask.sum())
    return visible >= config.min_area and visible >= config.min_visible * full_area


def _has_hole(mask: Mask) -> bool:
    """Return True if the mask encloses an 8-connected region of the background."""
    background = np.pad(~mask, 1, constant_values=True).astype(np.uint8)
    return int(cv2.connectedComponents(background, connectivity=8)[0]) > 2


def _draw_object(rng: np.random.Generator, class_id: int, config: SceneConfig) -> _Object | None:
    """Draw an object of random size, rotation and centre, or return None if it has no pixel."""
    size = rng.uniform(config.min_size, config.max_size) * min(config.height, config.width)
    angle = math.radians(rng.uniform(-config.max_rotation, config.max_rotation))
    # At most a quarter of the diameter crosses a side: a corner would not determine the class.
    inset = size / 4
    center = rng.uniform((inset, inset), (config.width - inset, config.height - inset))
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    outline = _OUTLINES[class_id](rng) @ rotation * (size / 2) + center

    x0, y0 = np.maximum(np.floor(outline.min(axis=0)).astype(int) - 1, 0)
    x1, y1 = np.minimum(np.ceil(outline.max(axis=0)).astype(int) + 1, (config.width, config.height))
    alpha = _rasterise(outline - (x0, y0), y1 - y0, x1 - x0)
    inside = _largest_piece(alpha >= 0.5)
    if inside is None:
        return None
    # Tips thinner than a pixel are not in the mask, so they must not be in the image either.
    halo = cv2.dilate(inside.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(np.float32)
    full_mask = np.zeros((config.height, config.width), dtype=np.bool_)
    full_mask[y0:y1, x0:x1] = inside
    area = float(cv2.contourArea(outline.astype(np.float32)))
    return _Object(class_id, int(x0), int(y0), alpha * halo, full_mask, area)


def _rasterise(outline: NDArray[np.float64], height: int, width: int) -> Floats:
    """Return the coverage (height, width) in [0, 1] of pixels by a polygon (K, 2) in pixels."""
    fraction_bits = 4
    fine = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), dtype=np.uint8)
    # OpenCV's origin is the centre of the first pixel, the outline's its upper left corner.
    points = np.rint((outline * _SUPERSAMPLING - 0.5) * 2**fraction_bits).astype(np.int32)
    cv2.fillPoly(fine, [points], 255, shift=fraction_bits)
    coverage = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    return coverage.astype(np.float32) / np.float32(255)


def _largest_piece(mask: Mask) -> Mask | None:
    """Return the largest 4-connected piece of a mask; None if it is empty or has holes."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=4
    )
    if count == 1:
        return None
    piece = labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    return None if _has_hole(piece) else piece


def _regular(corners: int, inner_radius: float | None = None) -> NDArray[np.float64]:
    """Return a regular polygon (K, 2); ``inner_radius`` adds a re-entrant corner per side."""
    count = corners if inner_radius is None else 2 * corners
    angles = np.arange(count) * (2 * math.pi / count)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if inner_radius is not None:
        points[1::2] *= inner_radius
    return points


def _ellipse(rng: np.random.Generator) -> NDArray[np.float64]:
    return _regular(48) * (1, rng.uniform(0.45, 0.65))


def _cross(rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a plus sign; the width of its arms is 0.3 to 0.4 of its own width."""
    arm = rng.uniform(0.3, 0.4)
    quarter = np.array([[1, -arm], [1, arm], [arm, arm]])
    turns = [np.array([[1, 0], [0, 1]]), np.array([[0, 1], [-1, 0]])]
    turns += [-turn for turn in turns]
    points: NDArray[np.float64] = np.concatenate([quarter @ turn for turn in turns])
    return points / math.hypot(1, arm)


def _crescent(rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the unit disc without an equal disc that is shifted by 0.6 to 0.8 of the radius."""
    half_shift = rng.uniform(0.6, 0.8) / 2
    tip = math.acos(half_shift)
    outer = np.linspace(tip, 2 * math.pi - tip, 40)
    inner = np.linspace(math.pi + tip, math.pi - tip, 24)[1:-1]
    points = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    bite = np.stack([np.cos(inner) + 2 * half_shift, np.sin(inner)], axis=1)
    return np.concatenate([points, bite])


_OUTLINES: tuple[Callable[[np.random.Generator], NDArray[np.float64]], ...] = (
    lambda rng: _regular(48),
    _ellipse,
    lambda rng: _regular(4),
    lambda rng: _regular(3),
    lambda rng: _regular(5),
    lambda rng: _regular(5, rng.uniform(0.4, 0.5)),
    _cross,
    _crescent,
)

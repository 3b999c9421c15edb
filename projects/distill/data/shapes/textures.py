"""Textures and backgrounds of the scenes."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

STUFF_CLASSES = ("sky", "vegetation", "building", "road")

_STUFF_COLORS = {
    "sky": (150, 185, 220),
    "vegetation": (80, 125, 70),
    "building": (150, 120, 105),
    "road": (110, 105, 115),
}

Image = NDArray[np.uint8]
Floats = NDArray[np.float32]


def object_texture(
    rng: np.random.Generator, height: int, width: int, contrast: float = 1.0
) -> Floats:
    """Return a random pattern of two clearly different colours, (height, width, 3) in [0, 255].

    A smaller ``contrast`` in [0, 1] makes the second colour more similar to the first.
    """
    first = rng.uniform(0, 255, 3)
    second = rng.uniform(0, 255, 3)
    # A second colour that is too close to the first is moved away: a texture must be visible.
    if np.abs(first - second).max() < 60:
        second = np.where(first < 128, first + 90, first - 90)
    pattern = _PATTERNS[int(rng.integers(len(_PATTERNS)))](rng, height, width)
    return (first + pattern[..., None] * contrast * (second - first)).astype(np.float32)


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> Floats:
    """Interpolate random values on a grid of ``cell`` pixels: (height, width) in [0, 1]."""
    grid = rng.random((math.ceil(height / cell) + 1, math.ceil(width / cell) + 1), np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float32)


def _ramp(rng: np.random.Generator, height: int, width: int, angle: float) -> Floats:
    """Return the distance in pixels along ``angle`` from a random origin, (height, width)."""
    rows = np.arange(height, dtype=np.float32)[:, None] * math.sin(angle)
    columns = np.arange(width, dtype=np.float32)[None] * math.cos(angle)
    return rows + columns + np.float32(rng.uniform(0, 64))


def _noise_pattern(rng: np.random.Generator, height: int, width: int) -> Floats:
    return _smooth_noise(rng, height, width, rng.uniform(2, 6))


def _stripes_pattern(rng: np.random.Generator, height: int, width: int) -> Floats:
    period = rng.uniform(4, 12)
    phase = _ramp(rng, height, width, rng.uniform(0, math.pi)) / period
    return (phase % 1 < rng.uniform(0.3, 0.7)).astype(np.float32)


def _checks_pattern(rng: np.random.Generator, height: int, width: int) -> Floats:
    period, angle = rng.uniform(6, 14), rng.uniform(0, math.pi / 2)
    first = _ramp(rng, height, width, angle) / period % 1 < 0.5
    second = _ramp(rng, height, width, angle + math.pi / 2) / period % 1 < 0.5
    return (first ^ second).astype(np.float32)


def _gradient_pattern(rng: np.random.Generator, height: int, width: int) -> Floats:
    ramp = _ramp(rng, height, width, rng.uniform(0, 2 * math.pi))
    low, high = float(ramp.min()), float(ramp.max())
    return (ramp - low) / max(high - low, 1.0)


_PATTERNS = (_noise_pattern, _stripes_pattern, _checks_pattern, _gradient_pattern)


def draw_stuff_map(rng: np.random.Generator, height: int, width: int) -> Image:
    """Draw sky, hills and houses on a horizon, and road below: (H, W) uint8 of STUFF_CLASSES.

    In every column, vegetation and building reach from their outline down to the horizon. So their
    regions, and the regions of the classes before them in the list, never have holes.
    """
    rows = np.arange(height, dtype=np.float64)[:, None]
    columns = np.arange(width, dtype=np.float64)[None]
    tilt = rng.uniform(-0.15, 0.15)
    horizon = rng.uniform(0.4, 0.75) * height + tilt * (columns - width / 2)
    stuff = np.full((height, width), STUFF_CLASSES.index("sky"), dtype=np.uint8)

    waves = 2 * math.pi * columns / width * rng.uniform(0.5, 2) + rng.uniform(0, 2 * math.pi)
    hills = horizon - height * (rng.uniform(0.0, 0.2) + 0.08 * np.sin(waves))
    stuff[rows >= hills] = STUFF_CLASSES.index("vegetation")
    for _ in range(int(rng.integers(0, 3))):
        left, breadth = rng.uniform(-0.1, 0.9) * width, rng.uniform(0.12, 0.35) * width
        top = horizon.min() - rng.uniform(0.05, 0.3) * height
        house = (rows >= top) & (columns >= left) & (columns < left + breadth)
        stuff[house] = STUFF_CLASSES.index("building")
    stuff[rows >= horizon] = STUFF_CLASSES.index("road")
    return stuff


def render_background(rng: np.random.Generator, stuff: Image) -> Floats:
    """Render (H, W, 3) in grey levels; each region has its own kind of texture and a tint."""
    height, width = stuff.shape
    patterns = {
        "sky": _gradient_pattern(rng, height, width),
        "vegetation": _smooth_noise(rng, height, width, 3),
        "building": _building_pattern(rng, height, width),
        "road": rng.random((height, width), np.float32),
    }
    canvas = np.empty((height, width, 3), dtype=np.float32)
    for index, name in enumerate(STUFF_CLASSES):
        color = np.array(_STUFF_COLORS[name]) + rng.uniform(-30, 30, 3)
        shade = rng.uniform(30, 60) * (patterns[name] - 0.5)
        region = stuff == index
        canvas[region] = color + shade[region][:, None]
    # The light changes slowly over the image, so that no colour is constant within a region.
    light = _smooth_noise(rng, height, width, max(height, width) / 4)
    return (canvas + 40 * (light[..., None] - 0.5)).astype(np.float32)


def _building_pattern(rng: np.random.Generator, height: int, width: int) -> Floats:
    """Return windows, which are the darker cells of an upright grid."""
    period = rng.uniform(6, 10)
    window = (_ramp(rng, height, width, 0) / period % 1 < 0.5) & (
        _ramp(rng, height, width, math.pi / 2) / period % 1 < 0.6
    )
    return 1 - window.astype(np.float32)


def draw_distractors(rng: np.random.Generator, canvas: Floats, max_count: int) -> None:
    """Draw up to ``max_count`` lines and soft blobs on ``canvas`` (H, W, 3), in place."""
    height, width = canvas.shape[:2]
    for _ in range(int(rng.integers(0, max_count + 1))):
        color = rng.uniform(0, 255, 3)
        x, y = rng.uniform((0, 0), (width, height))
        alpha: Floats
        if rng.random() < 0.5:
            reach = rng.uniform(0.1, 0.4) * min(height, width)
            angle = rng.uniform(0, 2 * math.pi)
            ends = np.rint([x, y, x + reach * math.cos(angle), y + reach * math.sin(angle)])
            left, top, right, bottom = (int(end) for end in ends)
            line = np.zeros((height, width), dtype=np.uint8)
            thickness = int(rng.integers(1, 3))
            cv2.line(line, (left, top), (right, bottom), 255, thickness, cv2.LINE_AA)
            alpha = line.astype(np.float32) / np.float32(255)
        else:
            radius = rng.uniform(0.03, 0.1) * min(height, width)
            rows = (np.arange(height, dtype=np.float32)[:, None] - y) / radius
            columns = (np.arange(width, dtype=np.float32)[None] - x) / radius
            alpha = np.exp(-(rows**2 + columns**2)).astype(np.float32)
        canvas += alpha[..., None] * (color - canvas).astype(np.float32)

"""Steps of an augmentation pipeline, which ``INPUT.AUGMENT.STEPS`` names in their order.

A step maps an image, and draws its random numbers from NumPy's global state, as detectron2's
augmentations do. The loader seeds that state by the sample's position.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from fvcore.transforms.transform import HFlipTransform
from numpy.typing import NDArray

from .image import LabelledImage, Partners, fit_scale, pad, scaled_size
from .labels import BoxRule, Size, joined
from .transforms import Affine, Place, Zoom, linear_map, paste, resize

Range = tuple[float, float]
Step = Callable[[LabelledImage, Partners], LabelledImage]


class Pipeline:
    """Steps one after the other.

    Args:
        steps: in their order.
    """

    def __init__(self, steps: Sequence[Step]):
        self.steps = tuple(steps)

    @property
    def combines(self) -> bool:
        """True if a step combines several images."""
        return any(isinstance(step, Mosaic | MixUp) for step in self.steps)

    def __call__(self, image: LabelledImage, partners: Partners) -> LabelledImage:
        for step in self.steps:
            image = step(image, partners)
        return image


class Mosaic:
    """Four images around a random point of a canvas of twice the size.

    RTMDet and YOLOX keep the sample at the top left, YOLOv5 shuffles the images. A sample without
    partners, the first of a training, stays as it is.

    Args:
        size: height and width that each image fits into.
        fill: value of the pixels that no image covers.
        prob: probability of a mosaic.
        shuffle: put the sample at a random place of the four.
    """

    def __init__(self, *, size: Size, fill: int, prob: float, shuffle: bool):
        self.size, self.fill, self.prob, self.shuffle = size, fill, prob, shuffle

    def __call__(self, image: LabelledImage, partners: Partners) -> LabelledImage:
        if np.random.rand() >= self.prob:
            return image
        found = [partners.draw() for _ in range(3)]
        tiles = [image, *(x for x in found if x is not None)]
        if len(tiles) < 4:
            return image
        if self.shuffle:
            tiles = [tiles[k] for k in np.random.permutation(4)]
        height, width = self.size
        x, y = (int(np.random.uniform(0.5, 1.5) * side) for side in (width, height))
        return mosaic(tiles, (x, y), (2 * height, 2 * width), self.fill)


def mosaic(
    tiles: Sequence[LabelledImage], center: tuple[int, int], size: Size, fill: int
) -> LabelledImage:
    """Paste four images around a point: top left, top right, bottom left, bottom right.

    Args:
        tiles: images of any size, which are cut at the canvas.
        center: x and y of the point on the canvas.
        size: height and width of the canvas.
        fill: value of the pixels that no image covers.
    """
    canvas = np.full((*size, *tiles[0].pixels.shape[2:]), fill, tiles[0].pixels.dtype)
    labels = []
    for k, tile in enumerate(tiles):
        height, width = tile.size
        x, y = center[0] - width * (k % 2 == 0), center[1] - height * (k < 2)
        paste(canvas, tile.pixels, x, y)
        labels.append(tile.labels.moved(Place(x, y, size), size))
    return LabelledImage(canvas, joined(labels), True)


class Jitter:
    """Large-scale jitter: resize by a random factor, and crop at a random place.

    A crop without any object of the image is drawn again. RTMDet discards the sample instead; here,
    each image is seen as often as the sampler says. RTMDet-Ins keeps such crops.

    Args:
        size: largest height and width of the result.
        scale: range of the factor, 1 for an image that fits into ``size``, or for a whole mosaic.
        draws: crops that are tried until one has an object.
        rule: decides which objects are dropped.
    """

    def __init__(self, *, size: Size, scale: Range, draws: int, rule: BoxRule):
        self.size, self.scale, self.draws, self.rule = size, scale, draws, rule

    def __call__(self, image: LabelledImage, partners: Partners) -> LabelledImage:
        for _ in range(self.draws):
            zoom = self.draw(image)
            labels = image.labels.moved(zoom, zoom.size, self.rule)
            if len(labels) or not len(image.labels):
                break
        return LabelledImage(zoom.apply_image(image.pixels), labels, True)

    def draw(self, image: LabelledImage) -> Zoom:
        """Return a random resize and crop."""
        factor = np.random.uniform(*self.scale)
        if not image.fitted:
            factor *= fit_scale(image.size, self.size)
        height, width = (
            min(new, limit) for new, limit in zip(scaled_size(image.size, factor), self.size)
        )
        high, wide = (
            min(max(round(k / factor), 1), side) for k, side in zip((height, width), image.size)
        )
        y, x = (np.random.randint(side - k + 1) for side, k in zip(image.size, (high, wide)))
        return Zoom((x, y, wide, high), (height, width))


class RandomAffine:
    """Random rotation, scaling, shear and translation, from an image or mosaic to the size.

    Args:
        size: height and width of the result.
        fill: value of the pixels that the image does not cover.
        rotation: largest angle in degrees.
        scale: range of the factor, 1 as in :class:`Jitter`.
        shear: largest angle in degrees.
        translation: largest shift as a share of ``size``.
        centered: turn around the centre of the image, which goes to that of the result, as in
            YOLOv5. If False, it is the corner instead of the centre, as in YOLOX.
        rule: decides which objects are dropped.
    """

    def __init__(
        self,
        *,
        size: Size,
        fill: int,
        rotation: float,
        scale: Range,
        shear: float,
        translation: float,
        centered: bool,
        rule: BoxRule,
    ):
        self.size, self.fill, self.rule = size, fill, rule
        self.rotation, self.scale, self.shear = rotation, scale, shear
        self.translation, self.centered = translation, centered

    def __call__(self, image: LabelledImage, partners: Partners) -> LabelledImage:
        rotation = np.random.uniform(-self.rotation, self.rotation)
        scale = np.random.uniform(*self.scale)
        shear = np.random.uniform(-self.shear, self.shear, 2)
        shift = np.random.uniform(-self.translation, self.translation, 2) * self.size[::-1]
        if not image.fitted:
            scale *= fit_scale(image.size, self.size)
        linear = linear_map(rotation, scale, (shear[0], shear[1]))
        matrix = affine_matrix(linear, shift, image.size, self.size, self.centered)
        return image.moved(Affine(matrix, self.size, self.fill), self.size, self.rule)


def affine_matrix(
    linear: NDArray[Any], shift: Any, old: Size, new: Size, centered: bool
) -> NDArray[Any]:
    """Return the (2, 3) matrix of a linear map and a shift.

    Args:
        linear: (2, 2).
        shift: x and y in pixels.
        old, new: heights and widths of both images.
        centered: the centre of the old image goes to that of the new one, instead of the corners.
    """
    offset = np.asarray(shift, dtype=float)
    if centered:
        offset = offset + np.array(new[::-1]) / 2 - linear @ (np.array(old[::-1]) / 2)
    return np.column_stack([linear, offset])


class MixUp:
    """Blend of the image with a partner, with the objects of both.

    Args:
        size: height and width of the result.
        fill: value of padding.
        prob: probability of a blend.
        before: the steps that a partner has gone through, too (RTMDet, YOLOv5); None: the partner
            is an image with jitter of its own (YOLOX).
        scale: range of the factor of a partner without steps.
        beta: both parameters of the Beta distribution of the image's share; 0: it is 0.5.
        rule: decides which objects of a partner without steps are dropped.
    """

    def __init__(
        self,
        *,
        size: Size,
        fill: int,
        prob: float,
        before: Pipeline | None,
        scale: Range,
        beta: float,
        rule: BoxRule,
    ):
        self.size, self.fill, self.prob, self.before = size, fill, prob, before
        self.scale, self.beta, self.rule = scale, beta, rule

    def __call__(self, image: LabelledImage, partners: Partners) -> LabelledImage:
        if np.random.rand() >= self.prob:
            return image
        partner = partners.draw(with_objects=True)
        if partner is None:
            return image
        other = self.before(partner, partners) if self.before else self._jittered(partner)
        share = np.random.beta(self.beta, self.beta) if self.beta else 0.5
        image, other = (pad(x, self.size, self.fill) for x in (image, other))
        pixels = cv2.addWeighted(image.pixels, share, other.pixels, 1 - share, 0)
        return LabelledImage(pixels, joined([image.labels, other.labels]), True)

    def _jittered(self, partner: LabelledImage) -> LabelledImage:
        """Scale and flip a partner on its canvas, which is cut or extended by black pixels."""
        canvas = pad(partner, self.size, self.fill)
        new = scaled_size(canvas.size, np.random.uniform(*self.scale))
        canvas = flip(canvas.moved(resize(canvas.size, new), new))
        y, x = (np.random.randint(max(n - k, 0) + 1) for n, k in zip(new, self.size))
        return canvas.moved(Place(-x, -y, self.size), self.size, self.rule)


class HSV:
    """Random hue, saturation and value.

    Args:
        image_format: BGR or RGB.
        additive: add whole numbers, each with probability 0.5 (RTMDet, YOLOX); if False, multiply
            by factors (YOLOv5).
        gains: largest change of hue (in [0, 180)), saturation and value (in [0, 255]), or of the
            three factors.
    """

    def __init__(self, *, image_format: str, additive: bool, gains: Sequence[float]):
        self.codes = [getattr(cv2, f"COLOR_{x}") for x in _CONVERSIONS[image_format]]
        self.additive, self.gains = additive, gains

    def __call__(self, image: LabelledImage, partners: Partners) -> LabelledImage:
        changes = np.random.uniform(-1, 1, 3) * self.gains
        if self.additive:
            changes = changes * np.random.randint(0, 2, 3)
        pixels = cv2.cvtColor(image.pixels, self.codes[0])
        cv2.LUT(pixels, hsv_tables(changes, self.additive), dst=pixels)
        cv2.cvtColor(pixels, self.codes[1], dst=pixels)
        return image._replace(pixels=pixels)


_CONVERSIONS = {"BGR": ("BGR2HSV", "HSV2BGR"), "RGB": ("RGB2HSV", "HSV2RGB")}


def hsv_tables(changes: NDArray[Any], additive: bool) -> NDArray[np.uint8]:
    """Return (1, 256, 3), the new values of hue, saturation and value.

    Args:
        changes: three numbers to add, of which only the whole part counts; or factors minus 1.
        additive: see :class:`HSV`.
    """
    values = np.arange(256)[:, None]
    new = values + changes.astype(int) if additive else values * (1 + changes)
    table = np.concatenate([new[:, :1] % 180, new[:, 1:].clip(0, 255)], 1)
    return table.astype(np.uint8)[None]


class Flip:
    """Horizontal flip with probability 0.5."""

    def __call__(self, image: LabelledImage, partners: Partners) -> LabelledImage:
        return flip(image)


def flip(image: LabelledImage) -> LabelledImage:
    """Flip an image horizontally with probability 0.5."""
    if np.random.rand() >= 0.5:
        return image
    labels = image.labels.moved(HFlipTransform(image.size[1]), image.size)
    return image._replace(pixels=cv2.flip(image.pixels, 1), labels=labels)


def build_pipeline(cfg: CfgNode, names: Sequence[str]) -> Pipeline:
    """Build the steps of ``INPUT.AUGMENT.STEPS`` or ``LAST_STEPS``."""
    node, common = cfg.INPUT, cfg.INPUT.AUGMENT
    size = (common.SIZE[0], common.SIZE[1])
    canvas: dict[str, Any] = {"size": size, "fill": common.FILL}
    rule = BoxRule(common.MIN_SIDE, common.MIN_VISIBLE, common.MAX_ASPECT or np.inf)
    steps: list[Step] = []
    build: dict[str, Callable[[], Step]] = {
        "mosaic": lambda: Mosaic(**canvas, prob=node.MOSAIC.PROB, shuffle=node.MOSAIC.SHUFFLE),
        "jitter": lambda: Jitter(
            size=size, scale=node.JITTER.SCALE, draws=node.JITTER.DRAWS, rule=rule
        ),
        "fit": lambda: Jitter(size=size, scale=(1.0, 1.0), draws=1, rule=rule),
        "affine": lambda: RandomAffine(
            **canvas,
            rotation=node.AFFINE.ROTATION,
            scale=node.AFFINE.SCALE,
            shear=node.AFFINE.SHEAR,
            translation=node.AFFINE.TRANSLATION,
            centered=node.AFFINE.CENTERED,
            rule=rule,
        ),
        "mixup": lambda: MixUp(
            **canvas,
            prob=node.MIXUP.PROB,
            before=Pipeline(steps) if node.MIXUP.PARTNER == "steps" else None,
            scale=node.MIXUP.SCALE,
            beta=node.MIXUP.BETA,
            rule=rule,
        ),
        "hsv": lambda: HSV(
            image_format=node.FORMAT, additive=node.HSV.MODE == "add", gains=node.HSV.GAINS
        ),
        "flip": Flip,
    }
    for name in names:
        steps.append(build[name]())
    return Pipeline(steps)

"""Augmentations against the numbers of their authors' code, and labels against pixels."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from detectron2.structures import polygons_to_bitmask
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from distill.config.defaults import AUGMENT_STEPS
from distill.data.augment.image import LabelledImage, Partners, fit, fit_scale, pad, scaled_size
from distill.data.augment.labels import BoxRule, Labels, read_labels
from distill.data.augment.mapper import ImageCache, MultiScale
from distill.data.augment.steps import (
    HSV,
    Jitter,
    MixUp,
    Mosaic,
    Pipeline,
    RandomAffine,
    affine_matrix,
    build_pipeline,
    flip,
    hsv_tables,
    mosaic,
)
from distill.data.augment.transforms import Affine, Place, linear_map, overlap, resize
from distill.data.guarded_mapper import BadImage
from distill.utils.seeding import private_randomness
from tests.support.networks import tiny_cfg

SIZE = (48, 64)
ALL = BoxRule()
NO_ONE = Partners(lambda index: BadImage("", ""), ())


def labels_of(boxes: Any, masks: Any = None) -> Labels:
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    return Labels(boxes, np.arange(len(boxes)), np.full(len(boxes), np.nan), masks)


def corners(x1: float, y1: float, x2: float, y2: float) -> Any:
    return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], dtype=float)


def scene(boxes: Any, size: tuple[int, int] = SIZE, bitmask: bool = False) -> LabelledImage:
    """A black image with a white rectangle for each box, which is its mask."""
    pixels = np.zeros((*size, 3), np.uint8)
    masks: list[Any] = []
    for box in boxes:
        x1, y1, x2, y2 = map(int, box)
        pixels[y1:y2, x1:x2] = 255
        masks.append([corners(*box)])
        if bitmask:
            masks[-1] = np.zeros(size, np.uint8)
            masks[-1][y1:y2, x1:x2] = 1
    return LabelledImage(pixels, labels_of(boxes, masks))


# ---- Numbers of the authors' code, run unmodified.


@pytest.mark.parametrize(
    "center, size, places",
    [
        (
            (400, 900),
            (480, 640),
            [
                ((0, 420, 400, 900), (240, 0, 640, 480)),
                ((400, 420, 1040, 900), (0, 0, 640, 480)),
                ((0, 900, 400, 1280), (240, 0, 640, 380)),
                ((400, 900, 1040, 1280), (0, 0, 640, 380)),
            ],
        ),
        (
            (900, 330),
            (640, 427),
            [
                ((473, 0, 900, 330), (0, 310, 427, 640)),
                ((900, 0, 1280, 330), (0, 310, 380, 640)),
                ((473, 330, 900, 970), (0, 0, 427, 640)),
                ((900, 330, 1280, 970), (0, 0, 380, 640)),
            ],
        ),
    ],
)
def test_places_of_a_mosaic_are_those_of_mmdetection(center: Any, size: Any, places: Any) -> None:
    height, width = size
    for k, place in enumerate(places):
        x, y = center[0] - width * (k % 2 == 0), center[1] - height * (k < 2)
        assert overlap((1280, 1280), size, x, y) == place
    tiles = []
    for value in (1, 2, 3, 4):
        tile = np.full((*size, 3), value, np.uint8)
        tiles.append(LabelledImage(tile, labels_of([[0, 0, width, height]])))
    found = mosaic(tiles, center, (1280, 1280), 114)
    covered = np.full((1280, 1280), 114, np.uint8)
    for value, ((x1, y1, x2, y2), _) in enumerate(places, 1):
        covered[y1:y2, x1:x2] = value
    assert (found.pixels[..., 1] == covered).all()
    assert_array_equal(found.labels.boxes, [paste for paste, _ in places])


def test_matrices_are_those_of_the_authors() -> None:
    shift = np.array([0.04, -0.07]) * 640
    size = (640, 640)
    yolox = affine_matrix(linear_map(3, 1.3, (-1, 1.5)), shift, (1280, 1280), size, False)
    expected = [[1.29941, 0.0453763, 25.6], [-0.0340417, 1.3, -44.8]]
    assert_allclose(yolox, expected, rtol=1e-4)
    mmdet = affine_matrix(linear_map(-3, 1.3, (1.5, -1)), shift, (1280, 1280), size, False)
    expected = [[1.3, -0.0340417, 25.6], [0.0453763, 1.29941, -44.8]]
    assert_allclose(mmdet, expected, rtol=1e-4)
    yolov5 = affine_matrix(linear_map(3, 1.3, (1.5, -1)), shift, (1280, 1280), size, True)
    expected = [[1.29644, 0.102032, -549.42], [-0.0906972, 1.29703, -496.853]]
    assert_allclose(yolov5, expected, rtol=1e-5)
    boxes = [[500, 500, 700, 640], [5, 5, 60, 60], [600, 600, 610, 1000]]
    rule = BoxRule(min_side=2, min_visible=0.1, max_aspect=100)
    kept = labels_of(boxes).moved(Affine(yolov5, size, 114), size, rule)
    assert kept.classes.tolist() == [0, 2]
    expected = [[149.814, 88.1739, 423.386, 287.898], [289.661, 226.04, 343.438, 640]]
    assert_allclose(kept.boxes, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "additive, changes, expected",
    [
        (True, [0.5 * 5, -0.4 * 30, 0], [39, 136, 200]),  # YOLOX, the third is switched off
        (False, [0.5 * 0.015, -0.4 * 0.7, 0.3 * 0.4], [87, 160, 224]),  # YOLOv5
    ],
)
def test_colors_are_those_of_the_authors(additive: bool, changes: Any, expected: Any) -> None:
    pixel = cv2.cvtColor(np.array([[[30, 120, 200]]], np.uint8), cv2.COLOR_BGR2HSV)
    pixel = cv2.LUT(pixel, hsv_tables(np.array(changes), additive))
    assert cv2.cvtColor(pixel, cv2.COLOR_HSV2BGR).tolist() == [[expected]]


@pytest.mark.parametrize(
    "old, new",
    [((375, 1242), (193, 640)), ((480, 640), (480, 640)), ((333, 500), (426, 640))],
)
def test_an_image_fits_as_in_the_letterbox_of_yolov5(old: Any, new: Any) -> None:
    """Its padding is 223.5, 80 and 107 pixels on both sides; ours is at the bottom and right."""
    assert scaled_size(old, fit_scale(old, (640, 640))) == new
    image = fit(scene([[10, 10, 100, 200]], old), (640, 640))
    assert image.size == new and image.fitted
    assert_allclose(image.labels.boxes, np.array([[10, 10, 100, 200]]) * new[1] / old[1], rtol=3e-3)


def test_hue_wraps_and_rgb_is_bgr_reversed() -> None:
    assert hsv_tables(np.array([5.9, 30, -30]), True)[0, [0, 175, 240], 0].tolist() == [5, 0, 65]
    assert hsv_tables(np.array([0, 30, -30]), True)[0, [10, 240], 1:].tolist() == [
        [40, 0],
        [255, 210],
    ]
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    results = []
    for name, image in (("BGR", pixels), ("RGB", np.ascontiguousarray(pixels[..., ::-1]))):
        step = HSV(image_format=name, additive=False, gains=[0.015, 0.7, 0.4])
        with private_randomness(3):
            results.append(step(LabelledImage(image, labels_of([])), NO_ONE).pixels)
    assert_array_equal(results[0], results[1][..., ::-1])
    assert (results[0] != pixels).any()


# ---- Every step of a config, on images with and without objects.

STEPS: dict[str, Callable[[], Any]] = {
    "mosaic": lambda: Mosaic(size=SIZE, fill=114, prob=1, shuffle=True),
    "jitter": lambda: Jitter(size=SIZE, scale=(0.5, 2), draws=15, rule=ALL),
    "affine": lambda: RandomAffine(
        size=SIZE,
        fill=114,
        rotation=0,
        scale=(0.5, 1.5),
        shear=0,
        translation=0.2,
        centered=True,
        rule=ALL,
    ),
    "mixup": lambda: MixUp(
        size=SIZE, fill=114, prob=1, before=None, scale=(0.5, 1.5), beta=0, rule=ALL
    ),
    "flip": lambda: lambda image, partners: flip(image),
}


def drawn(seed: int, *names: str, image: LabelledImage, partners: Partners = NO_ONE) -> Any:
    with private_randomness(seed):
        return Pipeline([STEPS[name]() for name in names])(image, partners)


@pytest.mark.parametrize("bitmask", [False, True])
@pytest.mark.parametrize("name", ["mosaic", "jitter", "affine", "flip"])
def test_pixels_are_where_boxes_are(name: str, bitmask: bool) -> None:
    """One object, whose pixels are white; without a rotation its box is exact."""
    empty = scene([], (40, 40))
    found = 0
    for seed in range(12):
        start = scene([[20, 10, 44, 30]], bitmask=bitmask)
        image = drawn(seed, name, image=start, partners=Partners(lambda k: empty, (0,)))
        rows, columns = (np.flatnonzero((image.pixels[..., 0] > 180).any(k)) for k in (1, 0))
        for box in image.labels.boxes:
            white = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert_allclose(box, white, atol=1.01)
        found += len(image.labels)
    assert found >= 8


def test_a_rotation_goes_around_the_centre() -> None:
    image = scene([[28, 18, 36, 30]])
    matrix = affine_matrix(linear_map(90, 1, (0, 0)), (0, 0), SIZE, SIZE, True)
    turned = image.moved(Affine(matrix, SIZE, 0), SIZE)
    assert_allclose(turned.labels.boxes, [[26, 20, 38, 28]], atol=1e-9)
    assert_array_equal(turned.pixels, scene(turned.labels.boxes.round()).pixels)


@pytest.mark.parametrize("masks", [None, []])
@pytest.mark.parametrize("name", STEPS)
def test_images_without_objects(name: str, masks: list[Any] | None) -> None:
    image = LabelledImage(np.zeros((30, 50, 3), np.uint8), labels_of([], masks))
    found = drawn(0, name, image=image, partners=Partners(lambda k: image, (0,)))
    assert len(found.labels) == 0 and found.labels.masks == masks


def concave(cx: float, cy: float, r: float, turn: float) -> Any:
    """A star, which a border may cut into several parts."""
    angle = np.arange(10) * np.pi / 5 + turn
    radius = np.where(np.arange(10) % 2, 0.35 * r, r)
    return np.stack([cx + radius * np.cos(angle), cy + radius * np.sin(angle)], 1)


stars = st.builds(
    concave, st.floats(0, 64), st.floats(0, 48), st.floats(2, 40), st.floats(0, 3)
).map(lambda x: x.clip(0, (64, 48)))


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.lists(stars, min_size=1, max_size=2), max_size=3), st.integers(0, 10**6))
def test_boxes_and_masks_stay_consistent(masks: Any, seed: int) -> None:
    boxes = [np.r_[np.concatenate(x).min(0), np.concatenate(x).max(0)] for x in masks]
    start = LabelledImage(np.zeros((*SIZE, 3), np.uint8), labels_of(boxes, masks))
    turned = RandomAffine(
        size=SIZE,
        fill=0,
        rotation=30,
        scale=(0.4, 1.6),
        shear=10,
        translation=0.3,
        centered=False,
        rule=BoxRule(min_side=1),
    )
    with private_randomness(seed):
        steps = Pipeline([STEPS["mosaic"](), turned, STEPS["mixup"](), STEPS["flip"]()])
        found = steps(start, Partners(lambda k: start, (0,)))
    labels, (height, width) = found.labels, found.size
    assert found.size == SIZE and len(labels.masks or ()) == len(labels)
    for box, mask in zip(labels.boxes, labels.masks or ()):
        points = np.concatenate(mask)
        assert (points >= -1e-9).all() and (points <= np.array([width, height]) + 1e-9).all()
        assert_allclose(box, np.r_[points.min(0), points.max(0)], atol=1e-9)
        assert (box[2:] > box[:2]).all()
    truth = labels.instances(found.size, "polygon")
    if len(truth):
        tight = truth.gt_masks.get_bounding_boxes().tensor
        assert_allclose(truth.gt_boxes.tensor.numpy(), tight.numpy(), atol=1e-3)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(stars, st.integers(0, 10**6))
def test_polygons_and_bitmasks_move_alike(star: Any, seed: int) -> None:
    size = (96, 128)
    star = star * 2
    bitmask = polygons_to_bitmask([star.ravel()], *size).astype(np.uint8)
    if bitmask.sum() < 200:
        return
    results = []
    for mask in ([star], bitmask):
        labels = labels_of([[*star.min(0), *star.max(0)]], [mask])
        image = LabelledImage(np.zeros((*size, 3), np.uint8), labels)
        with private_randomness(seed):
            moved = Jitter(size=size, scale=(0.7, 1.6), draws=1, rule=ALL)(flip(image), NO_ONE)
        truth = moved.labels.instances(moved.size, "bitmask")
        results.append(truth.gt_masks.tensor.any(0).numpy() if len(truth) else np.zeros(size, bool))
    if min(x.sum() for x in results) < 200:
        return
    both = (results[0] & results[1]).sum() / (results[0] | results[1]).sum()
    assert both > 0.85


# ---- Jitter, mixup, mosaic and partners.


def test_a_crop_without_objects_is_drawn_again() -> None:
    image = scene([[20, 16, 26, 22]])
    counts = []
    for draws in (1, 15):
        step = Jitter(size=SIZE, scale=(2, 3), draws=draws, rule=ALL)
        with private_randomness(0):
            counts.append(sum(len(step(image, NO_ONE).labels) for _ in range(40)))
    assert counts[0] < 32 and counts[1] == 40


def test_jitter_scales_an_image_to_the_size_and_a_mosaic_by_itself() -> None:
    step = Jitter(size=SIZE, scale=(1, 1), draws=1, rule=ALL)
    assert step(scene([], (96, 96)), NO_ONE).size == (48, 48)
    whole = step(scene([], (96, 128))._replace(fitted=True), NO_ONE)
    assert whole.size == SIZE  # a crop, at its own scale


def test_mixup_blends_pixels_and_joins_objects() -> None:
    first, second = scene([[0, 0, 8, 8]]), scene([[4, 4, 16, 12]])
    step = MixUp(size=SIZE, fill=114, prob=1, before=Pipeline([]), scale=(1, 1), beta=0, rule=ALL)
    found = step(first, Partners(lambda k: second, (3,)))
    expected = (first.pixels.astype(int) + second.pixels) / 2
    assert_allclose(found.pixels, expected, atol=0.51)
    assert found.labels.boxes.tolist() == [[0, 0, 8, 8], [4, 4, 16, 12]]
    assert len(found.labels.masks or ()) == 2
    step.beta = 32.0
    with private_randomness(1):
        share = step(first, Partners(lambda k: second, (3,))).pixels[0, 0, 0] / 255
    assert 0.3 < share < 0.7 and abs(share - 0.5) > 1e-3


def test_partners_have_objects_and_can_be_read() -> None:
    images = {0: scene([]), 1: BadImage("b.png", "truncated"), 2: scene([[0, 0, 8, 8]])}
    partners = Partners(images.__getitem__, (0, 1, 2))
    with private_randomness(0):
        assert {id(partners.draw(True)) for _ in range(20)} == {id(images[2])}
        assert {id(partners.draw()) for _ in range(20)} == {id(images[0]), id(images[2])}
        assert Partners(images.__getitem__, (0, 1)).draw(with_objects=True) is None
    start = scene([[2, 2, 9, 9]])
    for name in ("mosaic", "mixup"):  # without partners, the image stays as it is
        assert drawn(0, name, image=start) is start


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_sample_is_at_the_top_left_unless_shuffled(shuffle: bool) -> None:
    step = Mosaic(size=SIZE, fill=114, prob=1, shuffle=shuffle)
    partners = Partners(lambda k: scene([]), (0,))
    places = set()
    for seed in range(12):
        with private_randomness(seed):
            found = step(scene([[0, 0, 64, 48]]), partners)
        assert found.size == (96, 128)
        places.add(tuple(x > 0 for x in found.labels.boxes[0, :2]))
    assert len(places) > 1 or not shuffle
    assert shuffle or all(found.labels.boxes[0, 2:] <= (96, 72))


def test_a_box_rule_has_three_limits() -> None:
    boxes = np.array([[0, 0, 2, 9], [0, 0, 3, 9], [0, 0, 60, 3], [5, 5, 5, 9]], dtype=float)
    areas = np.array([18, 28, 180, 4.0])
    assert ALL.keeps(boxes, areas).tolist() == [True, True, True, False]
    assert BoxRule(min_side=2).keeps(boxes, areas).tolist() == [False, True, True, False]
    assert BoxRule(min_visible=0.98).keeps(boxes, areas).tolist() == [True, False, True, False]
    assert BoxRule(max_aspect=20).keeps(boxes, areas).tolist() == [True, True, False, False]


def test_padding_keeps_boxes() -> None:
    image = pad(scene([[2, 3, 9, 9]], (20, 30)), SIZE, 114)
    assert image.size == SIZE and image.pixels[-1, -1].tolist() == [114] * 3
    assert image.labels.boxes.tolist() == [[2, 3, 9, 9]]
    assert pad(image, SIZE, 114) is image
    bitmask = scene([[2, 3, 9, 9]], (20, 30), bitmask=True).labels.moved(Place(-4, 0, SIZE), SIZE)
    assert bitmask.boxes.tolist() == [[0, 3, 5, 9]]


def test_annotations_are_read_without_crowds() -> None:
    polygon = [[0.0, 0, 8, 0, 8, 8]]
    rows = [
        {"bbox": [1, 2, 90, 4], "bbox_mode": 1, "category_id": 2, "segmentation": polygon},
        {"bbox": [0, 0, 9, 9], "bbox_mode": 1, "category_id": 0, "iscrowd": 1},
    ]
    found = read_labels(rows, SIZE, masks=True)
    assert found.boxes.tolist() == [[1, 2, 64, 6]] and found.classes.tolist() == [2]
    assert read_labels([], SIZE, masks=True).boxes.shape == (0, 4)
    assert read_labels(rows, SIZE, masks=False).masks is None


def test_a_small_cache_keeps_the_latest() -> None:
    cache, made = ImageCache(2), []
    for index in (1, 2, 1, 3, 1, 2):
        cache.get(index, lambda index=index: made.append(index) or scene([]))
    assert made == [1, 2, 3, 2]
    assert len(ImageCache(0).images) == 0


def test_sizes_of_batches() -> None:
    scales = MultiScale(period=10, low=15, high=25)
    sizes = [scales.size(7, k, (640, 640)) for k in range(2000)]
    assert {h for h, _ in sizes} == {32 * k for k in range(15, 26)}
    assert all(len(set(sizes[k : k + 10])) == 1 for k in range(0, 2000, 10))
    assert all(h == w for h, w in sizes)
    assert sizes != [scales.size(8, k, (640, 640)) for k in range(2000)]
    assert MultiScale(1, 2, 2).size(0, 3, (640, 1280)) == (64, 128)


def test_every_name_of_the_config_builds() -> None:
    cfg = tiny_cfg("faster")
    for name in AUGMENT_STEPS:
        (step,) = build_pipeline(cfg, (name,)).steps
        assert callable(step)
    assert build_pipeline(cfg, ("mosaic", "fit")).combines
    assert not build_pipeline(cfg, ("fit", "hsv")).combines
    assert resize((10, 20), (5, 10)).scale == (0.5, 0.5)

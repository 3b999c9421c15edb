"""The runner without torch does what detectron2 does before and after a network."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.structures import Instances
from PIL import Image
from pycocotools import mask as coco_mask

from distill.export import runner
from distill.export.runner import (
    ExportError,
    Prediction,
    Predictor,
    coco_annotations,
    combined,
    draw,
    enlarged_masks,
    network_input,
    pasted,
    read_image,
    resized,
    resized_maps,
    run_lengths,
)
from distill.nets.rtmdet_ins import ImageMasks
from tests.support.cases import for_each
from tests.support.exports import scene

HOSTILE = "<script>alert(1)</script>\x1b[31m\n&\"'"
INFO: dict[str, Any] = {
    "preprocessing": "inside",
    "postprocessing": "inside",
    "thing_classes": ["cat", HOSTILE],
    "stuff_classes": [],
    "input_format": "BGR",
    "min_size": 40,
    "max_size": 60,
    "size": None,
    "size_divisibility": 32,
    "pixel_mean": [1.0, 2.0, 3.0],
    "pixel_std": [2.0, 2.0, 2.0],
    "pad_value": [1.0, 2.0, 3.0],
}


def prediction(height: int = 30, width: int = 40, masks: bool = True) -> Prediction:
    boxes = np.array([[2.5, 3, 20, 25], [10, 8, 39, 30]], np.float32)
    found = Prediction((height, width), boxes, np.array([0.9, 0.4]), np.array([1, 0]))
    if masks:
        found.masks = np.zeros((2, height, width), bool)
        found.masks[0, 5:20, 4:15] = found.masks[1, 9:25, 12:30] = True
    return found


# ---- Before the network.


@for_each("size", [(50, 90), (90, 50), (33, 33), (40, 55), (640, 427), (479, 640)])
@for_each("limits", [(40, 60), (200, 333), (0, 0)])
def test_images_are_resized_as_by_detectron2(
    size: tuple[int, int], limits: tuple[int, int]
) -> None:
    if limits[0] == 800 and size[0] * size[1] > 10000:
        size = size[0] // 8, size[1] // 8
    image = scene(0, *size)
    pixels = np.asarray(image)
    expected = ResizeShortestEdge([limits[0]] * 2, limits[1], "choice").get_transform(pixels)
    found = resized(image, {**INFO, "min_size": limits[0], "max_size": limits[1]})
    assert np.array_equal(np.asarray(found), expected.apply_image(pixels))


def test_an_image_fits_into_a_fixed_size() -> None:
    info = {**INFO, "size": [32, 96]}
    assert resized(scene(0, 90, 120), info).size == (43, 32)
    assert resized(scene(0, 10, 100), {**info, "min_size": 0}).size == (96, 10)
    assert resized(scene(0, 1, 300), INFO).size == (60, 1)  # detectron2 fails here
    with pytest.raises(ExportError, match="has 33 x 10 pixels, but the file takes at most 32 x 96"):
        network_input(np.zeros((3, 33, 10), np.float32), info)


def test_padding_is_zero_after_the_normalization() -> None:
    pixels = np.full((3, 30, 40), 7, np.float32)
    inside = network_input(pixels, INFO)
    assert inside.shape == (1, 3, 32, 64) and inside.dtype == np.float32
    assert (inside[0, :, :30, :40] == 7).all() and inside[0, :, 31, 63].tolist() == [1, 2, 3]
    outside = network_input(pixels, {**INFO, "preprocessing": "outside"})
    assert outside[0, :, 0, 0].tolist() == [3, 2.5, 2] and not outside[..., 40:].any()


def test_channels_are_in_the_order_of_the_network() -> None:
    seen = []

    def run(feed: dict[str, Any]) -> dict[str, Any]:
        seen.append(feed)
        return {}

    image = Image.new("RGB", (40, 40), (10, 20, 30))
    for order in ("BGR", "RGB"):
        Predictor(run, ["image", "image_size"], {**INFO, "input_format": order})(image)
    assert [x["image"][0, :, 0, 0].tolist() for x in seen] == [[30, 20, 10], [10, 20, 30]]
    assert seen[0]["image_size"].tolist() == [40, 40]


def test_exif_data_turn_an_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    scene(0, 20, 30).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (20, 30)


# ---- After the network.


@for_each("old, new", [((5, 7), (9, 4)), ((4, 4), (4, 9)), ((1, 3), (6, 6)), ((8, 8), (64, 64))])
def test_maps_are_resized_as_by_torch(old: tuple[int, int], new: tuple[int, int]) -> None:
    x = torch.randn(2, *old, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x[None], new, mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(resized_maps(x.numpy(), new), expected, atol=1e-5)


def test_masks_are_pasted_as_by_detectron2() -> None:
    g = torch.Generator().manual_seed(0)
    masks = torch.rand(6, 14, 14, generator=g)
    corners = torch.rand(6, 2, generator=g) * torch.tensor([50.0, 30.0])
    boxes = torch.cat([corners, corners + 1 + 20 * torch.rand(6, 2, generator=g)], 1)
    expected = paste_masks_in_image(masks, boxes, (40, 60)).numpy()
    found = pasted(masks.numpy(), boxes.numpy(), (40, 60))
    assert found.sum() > 100
    assert (found != expected).mean() < 1e-4
    assert pasted(masks.numpy()[:0], boxes.numpy()[:0], (40, 60)).shape == (0, 40, 60)


def test_masks_of_the_padded_image_are_enlarged_as_by_its_network() -> None:
    logits = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    masks = ImageMasks(logits, (30, 50), 8)
    expected = masks.to_bitmasks(None, 45, 75).tensor.numpy()  # type: ignore[arg-type]
    found = enlarged_masks(logits.numpy(), 8, (30, 50), (45, 75))
    assert (found != expected).mean() < 1e-3 and 0.3 < found.mean() < 0.7


@for_each("seed", range(4))
def test_panoptic_segments_are_those_of_detectron2(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = np.zeros((5, 24, 30), bool)
    for mask in masks[: 4 + seed % 2]:
        y, x = rng.integers(0, 18, 2)
        mask[y : y + 12, x : x + 12] = True
    scores = np.sort(rng.random(5))[::-1].copy()
    sem_seg = np.repeat(np.repeat(rng.normal(size=(4, 3, 3)), 8, 1), 10, 2)
    found = Prediction((24, 30), np.zeros((5, 4)), scores, rng.integers(0, 3, 5), masks, sem_seg)
    rule = {"overlap": 0.5, "stuff_area": 30, "score": 0.3}
    segments, info = combined(found, **rule)
    instances = Instances((24, 30))
    instances.scores, instances.pred_masks = torch.from_numpy(scores), torch.from_numpy(masks)
    instances.pred_classes = torch.from_numpy(found.classes)
    labels = torch.from_numpy(sem_seg.argmax(0))
    expected, rows = combine_semantic_and_instance_outputs(instances, labels, *rule.values())
    assert np.array_equal(segments, expected.numpy()) and len(info) > 2
    assert info == [{k: v for k, v in x.items() if k != "instance_id"} for x in rows]


@for_each("mask", [np.zeros((3, 4), bool), np.ones((3, 4), bool), np.eye(5, dtype=bool)])
def test_run_lengths_are_coco_s(mask: Any) -> None:
    lengths = run_lengths(mask)
    encoded = coco_mask.frPyObjects(json.loads(json.dumps(lengths)), *mask.shape)
    assert np.array_equal(coco_mask.decode(encoded), mask)
    assert sum(lengths["counts"]) == mask.size


def test_annotations_in_coco_s_format() -> None:
    first, second = coco_annotations(prediction(), 7)
    assert first["bbox"] == [2.5, 3, 17.5, 22] and first["category_id"] == 2
    assert first["image_id"] == 7 and first["score"] == pytest.approx(0.9)
    assert first["area"] == 15 * 11 and second["segmentation"]["size"] == [30, 40]
    boxes_only = coco_annotations(prediction(masks=False), 1)[0]
    assert boxes_only["area"] == 17.5 * 22 and "segmentation" not in boxes_only
    assert coco_annotations(Prediction((5, 5), np.zeros((0, 4)), *[np.zeros(0)] * 2), 1) == []


def test_drawing_changes_the_image_at_its_objects_only() -> None:
    image = Image.new("RGB", (40, 30), (0, 0, 0))
    drawn = np.asarray(draw(image, prediction(), ["cat", HOSTILE]))
    assert drawn.shape == (30, 40, 3)
    assert drawn[12, 8].any() and not drawn[29, 0].any()
    assert not np.asarray(image).any()  # a copy is drawn on
    empty = Prediction((30, 40), np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    assert not np.asarray(draw(image, empty, [])).any()
    assert runner.one_line(HOSTILE) == "<script>alert(1)</script> [31m &\"'"


def test_semantic_classes_and_segments_are_drawn() -> None:
    image = Image.new("RGB", (40, 30), (0, 0, 0))
    found = Prediction((30, 40), np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    found.sem_seg = np.zeros((2, 30, 40))
    found.sem_seg[1, :, 20:] = 1
    drawn = np.asarray(draw(image, found, []))
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) == 2
    found.segments = np.zeros((30, 40), int)
    found.segments[:10], found.segments_info = 1, [{"id": 1}]
    assert not np.asarray(draw(image, found, []))[15:].any()


def test_objects_of_small_scores_are_left_out() -> None:
    found = prediction().above(0.5)
    assert found.scores.tolist() == [0.9] and found.masks is not None and len(found.masks) == 1


# ---- Files.


def test_a_file_of_layers_has_no_detections() -> None:
    with pytest.raises(ExportError, match="export it with --postprocessing inside"):
        Predictor(lambda feed: {}, [], {**INFO, "postprocessing": "outside"})


def test_a_file_that_is_no_network(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "text.onnx"
    path.write_text("<html>")
    with pytest.raises(ExportError, match="cannot be read by onnxruntime"):
        Predictor.from_onnx(str(path))


@pytest.mark.e2e
def test_the_runner_needs_neither_torch_nor_this_package(tmp_path: Path) -> None:
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, *args):
        if name.split(".")[0] in ("torch", "detectron2", "cv2", "scipy", "distill", "rich"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {str(Path(runner.__file__).parent)!r})
import numpy, runner
predictor = runner.Predictor(lambda feed: {{}}, ["image"], {INFO!r})
image = runner.read_image({str(tmp_path / "a.png")!r})
runner.draw(image, predictor(image), predictor.classes).save({str(tmp_path / "b.png")!r})
"""
    scene(0, 30, 40).save(tmp_path / "a.png")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert (tmp_path / "b.png").is_file()

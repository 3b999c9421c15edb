"""Images are copied before they are augmented: faster, and with the same bits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from PIL import Image

from distill.data.contiguous import ContiguousTransform
from distill.data.loader import inference_mapper
from distill.engine.trainer import train_mapper
from distill.utils.seeding import private_randomness
from tests.support.networks import tiny_cfg
from tests.support.trainings import Shapes, trainable_cfg

CROP = ("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", (40, 40))


@pytest.mark.parametrize("format_", ["BGR", "RGB"])
@pytest.mark.parametrize("opts", [(), CROP, ("INPUT.MIN_SIZE_TRAIN", (0,))])
@pytest.mark.parametrize("family", ["retinanet", "mask"])
def test_samples_have_the_same_bits(
    family: str, format_: str, opts: tuple[Any, ...], shapes: Shapes, tmp_path: Path
) -> None:
    cfg = trainable_cfg(family, shapes, tmp_path, "INPUT.FORMAT", format_, *opts)
    own, stock = train_mapper(cfg), DatasetMapper(cfg, is_train=True)
    for position, entry in enumerate(DatasetCatalog.get(shapes[0])[:4]):
        found = []
        for mapper in (own, stock):
            with private_randomness(7, position):
                found.append(mapper(entry))
        assert torch.equal(found[0]["image"], found[1]["image"])
        a, b = (x["instances"].get_fields() for x in found)
        assert a.keys() == b.keys() and torch.equal(a["gt_boxes"].tensor, b["gt_boxes"].tensor)
        if "gt_masks" in a:
            for p, q in zip(a["gt_masks"].polygons, b["gt_masks"].polygons):
                assert all(np.array_equal(x, y) for x, y in zip(p, q, strict=True))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("format_", ["BGR", "RGB", "L"])
def test_images_of_other_modes(mode: str, format_: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").convert(mode).save(tmp_path / "image.png")
    cfg = tiny_cfg("retinanet", "INPUT.FORMAT", format_)
    entry = {"file_name": str(tmp_path / "image.png"), "height": 30, "width": 40}
    found = inference_mapper(cfg)(entry)["image"]
    assert torch.equal(found, DatasetMapper(cfg, is_train=False)(entry)["image"])


def test_what_pillow_gets_is_contiguous(
    monkeypatch: pytest.MonkeyPatch, shapes: Shapes, tmp_path: Path
) -> None:
    """The stock mapper gives it a view with negative strides, which is why the copy exists."""
    cfg = trainable_cfg("retinanet", shapes, tmp_path)
    seen = []
    original = Image.fromarray

    def fromarray(x: Any, *args: Any) -> Any:
        seen.append(x.flags.c_contiguous)
        return original(x, *args)

    monkeypatch.setattr(Image, "fromarray", fromarray)
    entry = DatasetCatalog.get(shapes[0])[0]
    DatasetMapper(cfg, is_train=True)(entry)
    train_mapper(cfg)(entry)
    inference_mapper(cfg)(entry)
    assert seen == [False, True, True]


def test_arrays_of_other_kinds_keep_their_values() -> None:
    rng = np.random.default_rng(0)
    for x in (rng.random((4, 5, 3)), rng.integers(0, 9, (4, 5)), rng.random((4, 5, 6))):
        for view in (x, x[:, ::-1], x[..., ::-1]):
            copy = ContiguousTransform().apply_image(view)
            assert np.array_equal(copy, view) and copy.flags.c_contiguous

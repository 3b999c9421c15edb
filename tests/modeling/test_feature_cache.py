"""The teacher's maps on disk change no bit of a training, and are never those of another image."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.env import seed_all_rng

from distill.config import get_distill_cfg
from distill.engine import Trainer
from distill.errors import ConfigError
from distill.modeling.feature_cache import FeatureCache, check_cache
from distill.structures import Batch
from tests.support.networks import distill_opts
from tests.support.trainings import Shapes, differences, trainable_cfg, write_teacher

CLASSES = ("MODEL.ROI_HEADS.NUM_CLASSES", 8, "MODEL.RETINANET.NUM_CLASSES", 8)
DIR, MAX_GB, DTYPE = (f"MODEL.DISTILL.TEACHER.CACHE.{x}" for x in ("DIR", "MAX_GB", "DTYPE"))
CPU = torch.device("cpu")


class Backbone:
    """Doubles the images; counts its calls."""

    def __init__(self, factor: float = 2.0):
        self.factor = factor
        self.calls = 0

    def maps(self, batch: Batch) -> Callable[[], dict[str, torch.Tensor]]:
        def compute() -> dict[str, torch.Tensor]:
            self.calls += 1
            images = torch.stack([x["image"].float() for x in batch.inputs])
            return {"p3": images * self.factor, "p4": images[:, :, ::2, ::2] * self.factor}

        return compute


def batch_of(*seeds: int, size: tuple[int, int] = (32, 32)) -> Batch:
    images = [
        torch.randint(256, (3, 8, 8), generator=torch.Generator().manual_seed(k)).byte()
        for k in seeds
    ]
    return Batch([{"image": x} for x in images], size)


def cache_in(folder: Path, teacher: str = "t", **kw: Any) -> FeatureCache:
    return FeatureCache(folder, teacher, **{"dtype": torch.float32, "max_bytes": 1e9, **kw})


def ask(cache: FeatureCache, backbone: Backbone, batch: Batch, *names: str) -> dict[str, Any]:
    return cache.outputs(batch, names or ("p3", "p4"), CPU, backbone.maps(batch))


# ---- Trainings


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "heads"), [("faster", ("FitNet", "ROIKD")), ("retinanet", ("IMA", "DenseKD"))]
)
def test_a_training_has_the_same_bits(
    family: str, heads: tuple[str, ...], tmp_path: Path, shapes: Shapes
) -> None:
    teacher = write_teacher(tmp_path, family, *CLASSES)
    last = ("SOLVER.MAX_ITER", 3, "SEED", 1)
    results, calls = [], []
    for k, opts in enumerate([(), (DIR, str(tmp_path / "cache")), (DIR, str(tmp_path / "cache"))]):
        opts = (*distill_opts(family, heads), *teacher, *last, *opts)
        cfg = trainable_cfg(family, shapes, tmp_path / str(k), *opts)
        seed_all_rng(cfg.SEED)
        trainer = Trainer(cfg)
        calls.append(count_calls(trainer))
        trainer.resume_or_load(resume=False)
        trainer.train()
        results.append(torch.load(tmp_path / str(k) / "model_final.pth", weights_only=True))
    assert calls == [[3], [3], [0]]
    for result in results[1:]:
        assert differences(results[0]["model"], result["model"]) == []
        assert differences(results[0]["distill"], result["distill"]) == []


def count_calls(trainer: Trainer) -> list[int]:
    """Return the number of forwards of the teacher's backbone, which grows."""
    calls = [0]

    def count(*args: Any) -> None:
        calls[0] += 1

    assert trainer.teacher is not None
    trainer.teacher.model.backbone.register_forward_hook(count)
    return calls


@pytest.mark.e2e
def test_students_of_different_seeds_see_the_same_images(tmp_path: Path, shapes: Shapes) -> None:
    def images(*opts: Any) -> list[torch.Tensor]:
        cfg = trainable_cfg("faster", shapes, tmp_path / "unused", *opts)
        trainer = Trainer(cfg)
        return [x["image"] for x in next(iter(trainer._trainer.data_loader))]

    first, second, other = (
        images("SEED", k, "DATALOADER.SEED", d) for k, d in [(1, 7), (2, 7), (1, -1)]
    )
    assert all(map(torch.equal, first, second))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other))


# ---- Files


def test_what_is_known_is_not_computed(tmp_path: Path) -> None:
    backbone, batch = Backbone(), batch_of(0, 1)
    first = ask(cache_in(tmp_path), backbone, batch)
    again = ask(cache_in(tmp_path), backbone, batch)
    assert backbone.calls == 1
    assert differences(first, again) == []
    assert list(ask(cache_in(tmp_path), backbone, batch, "p4")) == ["p4"]
    assert backbone.calls == 1
    # One unknown image: the whole batch is computed, and then known.
    for _ in range(2):
        ask(cache_in(tmp_path), backbone, batch_of(1, 2))
        assert backbone.calls == 2


def test_an_image_that_is_twice_in_a_batch(tmp_path: Path) -> None:
    backbone, batch = Backbone(), batch_of(0, 0)
    for _ in range(2):
        found = ask(cache_in(tmp_path), backbone, batch)
        assert torch.equal(found["p3"][0], found["p3"][1])
    assert backbone.calls == 1


def test_anything_else_is_unknown(tmp_path: Path) -> None:
    backbone, batch = Backbone(), batch_of(0)
    ask(cache_in(tmp_path), backbone, batch)
    moved = batch_of(0)
    moved.inputs[0]["image"][0, 0, 0] ^= 1
    ask(cache_in(tmp_path), backbone, moved)
    ask(cache_in(tmp_path), backbone, batch_of(0, size=(32, 64)))
    ask(cache_in(tmp_path, teacher="other"), backbone, batch)
    ask(cache_in(tmp_path, dtype=torch.bfloat16), backbone, batch)
    with torch.autocast("cpu", torch.bfloat16):
        ask(cache_in(tmp_path), backbone, batch)
    assert backbone.calls == 6


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "text"])
def test_a_damaged_file_is_written_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone, batch = Backbone(), batch_of(0, 1)
    expected = ask(cache_in(tmp_path), backbone, batch)
    path = sorted(tmp_path.rglob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(
        {"flipped": content, "cut": content[:-9], "empty": b"", "text": b"<html>"}[damage]
    )
    assert differences(ask(cache_in(tmp_path), backbone, batch), expected) == []
    assert backbone.calls == 2
    assert f"'{path}' is damaged; its map is computed again." in caplog.text
    assert differences(ask(cache_in(tmp_path), backbone, batch), expected) == []
    assert backbone.calls == 2


def test_processes_that_write_the_same_files(tmp_path: Path) -> None:
    batch = batch_of(*range(6))

    def one(_: int) -> dict[str, Any]:
        return ask(cache_in(tmp_path), Backbone(), batch)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(16)))
    assert all(differences(x, found[0]) == [] for x in found)
    files = [x for x in tmp_path.rglob("*") if x.is_file()]
    assert len(files) == 12 and {x.suffix for x in files} == {".safetensors"}


def test_a_full_folder_keeps_what_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone = Backbone()
    ask(cache_in(tmp_path), backbone, batch_of(0))
    size = sum(x.stat().st_size for x in tmp_path.rglob("*.safetensors"))
    cache = cache_in(tmp_path, max_bytes=size + 100)
    for k in (1, 2):
        assert torch.equal(
            ask(cache, backbone, batch_of(k))["p3"], backbone.maps(batch_of(k))()["p3"]
        )
    assert sum(x.stat().st_size for x in tmp_path.rglob("*") if x.is_file()) == size
    assert caplog.text.count("no more maps are stored") == 1


def test_a_disk_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill.modeling.feature_cache.os.replace", fail)
    ask(cache_in(tmp_path), Backbone(), batch_of(0))
    assert "No space left on device" in caplog.text
    assert not [x for x in tmp_path.rglob("*") if x.is_file()]


def test_half_precision_is_rounded_for_the_first_student_too(tmp_path: Path) -> None:
    backbone, batch = Backbone(1 / 3), batch_of(0)
    for dtype in (torch.float16, torch.bfloat16):
        first, second = (ask(cache_in(tmp_path, dtype=dtype), backbone, batch) for _ in range(2))
        assert differences(first, second) == []
        assert first["p3"].dtype == torch.float32
        exact = backbone.maps(batch)()["p3"]
        assert torch.equal(first["p3"], exact.to(dtype).float()) and not torch.equal(
            first["p3"], exact
        )


def test_values_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        ask(cache_in(tmp_path, dtype=torch.float16), Backbone(1e4), batch_of(0))
    assert "CACHE.DTYPE float16 cannot hold values of the teacher's p3 up to" in str(error.value)
    assert str(error.value).endswith("take bfloat16 or float32.")


# ---- Size


FPN = [ShapeSpec(channels=256, stride=2**k) for k in range(3, 8)]


def coco(**opts: Any) -> CfgNode:
    cfg = get_distill_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (800,), 1333
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH = 90000, 16
    cfg.MODEL.DISTILL.TEACHER.CACHE.DIR = "/cache"
    return cfg


def test_a_cache_of_coco_is_refused() -> None:
    sizes = [{"height": 480, "width": 640}, {"height": 640, "width": 480}]
    with pytest.raises(ConfigError) as error:
        check_cache(coco(), FPN, sizes)
    assert "would need about 26,189 GB for the maps of 1,440,000 augmented images" in str(
        error.value
    )


def test_the_size_of_a_small_set(caplog: pytest.LogCaptureFixture) -> None:
    """500 images of one size, and their mirror images."""
    cfg = coco()
    with caplog.at_level(logging.INFO):
        check_cache(cfg, FPN, 500 * [{"height": 480, "width": 640}])
    gb = 1000 * 800 * 800 * 4 / 3 * sum(256 / x.stride**2 for x in FPN) * 4 / 1e9
    assert f"'/cache' will have up to {gb:.1f} GB of maps." in caplog.text
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.MODEL.DISTILL.TEACHER.CACHE.DTYPE = "float16"
    with caplog.at_level(logging.INFO):
        check_cache(cfg, FPN, 500 * [{"height": 480, "width": 640}])
    assert f"will have up to {gb / 4:.1f} GB of maps." in caplog.text

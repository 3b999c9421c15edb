"""Test that batches depend only on the run's seed and the iteration, for any loader."""

import random
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_cfg
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from PIL import Image

from distill.data.loader import (
    Batches,
    Sample,
    Samples,
    TrainLoader,
    _start_worker,
    build_train_loader,
)
from distill.errors import DataError

SEED = 7
# Images with portrait and landscape format.
DICTS: list[dict[str, Any]] = [
    {"width": 64 if k % 3 else 32, "height": 48, "image_id": k} for k in range(11)
]


@pytest.fixture(scope="module", autouse=True)
def _files(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Write the images, which the guard of every mapper opens."""
    folder = tmp_path_factory.mktemp("images")
    for x in DICTS:
        x["file_name"] = str(folder / f"{x['image_id']}.png")
        Image.new("RGB", (x["width"], x["height"])).save(x["file_name"])


def draw(image: dict[str, Any]) -> dict[str, Any]:
    """Map an image with random numbers of every generator."""
    numbers = (random.random(), float(np.random.rand()), float(torch.rand(())))
    return {**image, "numbers": numbers}


def cfg(*opts: Any) -> Any:
    return tiny_cfg("faster", "SOLVER.IMS_PER_BATCH", 4, "DATALOADER.NUM_WORKERS", 0, *opts)


def batches(count: int, *opts: Any, mapper: Callable[..., Any] = draw, start: int = 0) -> list[Any]:
    loader = build_train_loader(cfg(*opts), DICTS, mapper, seed=SEED, start=start)
    return list(islice(loader, count))


@pytest.mark.parametrize("grouping", [True, False])
def test_order_and_grouping_are_detectron2s(grouping: bool) -> None:
    sampler = TrainingSampler(len(DICTS), seed=SEED)
    theirs = build_detection_train_loader(
        DICTS,
        mapper=lambda x: x,
        sampler=sampler,
        total_batch_size=4,
        aspect_ratio_grouping=grouping,
        num_workers=0,
    )
    groups = [x["width"] > x["height"] for x in DICTS] if grouping else None
    ours = Batches(sampler, 4, groups)
    for batch, samples in zip(islice(theirs, 30), ours):
        assert [x["image_id"] for x in batch] == [s.image for s in samples]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(workers: int) -> None:
    expected = batches(9)
    assert batches(9, "DATALOADER.NUM_WORKERS", workers) == expected
    assert len({x["numbers"] for batch in expected for x in batch}) == 36  # samples differ


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("start", [1, 8])
def test_a_later_start_goes_on_as_if_it_had_been_there(start: int, grouping: bool) -> None:
    opts = ("DATALOADER.ASPECT_RATIO_GROUPING", grouping)
    assert batches(4, *opts, start=start) == batches(start + 4, *opts)[start:]


@pytest.mark.parametrize("name", ["RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"])
def test_detectron2s_other_samplers_follow_the_seed(name: str) -> None:
    annotated = [{**x, "annotations": [{"category_id": x["image_id"] % 2}]} for x in DICTS]
    opts = ("DATALOADER.SAMPLER_TRAIN", name)

    def order(seed: int, start: int = 0) -> list[list[int]]:
        config = cfg(*opts)
        config.DATALOADER.RANDOM_SUBSET_RATIO = 0.5  # which detectron2 reads and does not declare
        loader = build_train_loader(config, annotated, draw, seed=seed, start=start)
        return [[x["image_id"] for x in batch] for batch in islice(loader, 6)]

    assert order(3) == order(3)
    assert order(3, start=2)[:4] == order(3)[2:]
    if name == "RandomSubsetTrainingSampler":
        assert order(3) != order(4)


def test_another_seed_is_another_order() -> None:
    orders = [
        [
            [x["image_id"] for x in b]
            for b in islice(build_train_loader(cfg(), DICTS, draw, seed=s), 5)
        ]
        for s in (1, 2)
    ]
    assert orders[0] != orders[1]


def test_loading_leaves_the_global_generators_alone() -> None:
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    batches(3)
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert states == after


def test_processes_share_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of two samples get the same samples as one process of four."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    seen: list[Sample] = []
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        for batch in islice(Batches(TrainingSampler(11, seed=SEED), 2), 6):
            seen += batch
    monkeypatch.undo()
    joint = [s for batch in islice(Batches(TrainingSampler(11, seed=SEED), 4), 6) for s in batch]
    assert sorted(seen) == joint
    samples = Samples(DICTS, draw, SEED)
    assert [samples[s] for s in sorted(seen)] == [samples[s] for s in joint]


class Spoilt:
    """Mapper that cannot read images with an odd number."""

    def __call__(self, image: dict[str, Any]) -> dict[str, Any]:
        if image["image_id"] % 2:
            raise OSError("image file is truncated")
        return draw(image)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_with_its_name(workers: int) -> None:
    with pytest.raises(DataError, match=r"Image .*\d+\.png: .*truncated.*ON_BAD_IMAGE") as error:
        batches(3, "DATALOADER.NUM_WORKERS", workers, mapper=Spoilt())
    assert "Traceback" not in str(error.value) and "worker process" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_and_counted(workers: int, caplog: Any) -> None:
    opts = ("DATALOADER.ON_BAD_IMAGE", "drop", "DATALOADER.NUM_WORKERS", workers)
    loader = build_train_loader(cfg(*opts), DICTS, Spoilt(), seed=SEED)
    found = list(islice(loader, 12))
    assert {x["image_id"] % 2 for batch in found for x in batch} == {0}
    assert [len(batch) for batch in found] == [4] * 12
    assert all(x.keys() == {*DICTS[0], "numbers"} for batch in found for x in batch)
    assert sorted(loader.left_out) == sorted(x["file_name"] for x in DICTS if x["image_id"] % 2)
    assert "truncated" in loader.left_out[DICTS[1]["file_name"]] and "(5 so far)" in caplog.text
    # A resumed run has the same replacements, because they depend only on the position.
    resumed = build_train_loader(cfg(*opts), DICTS, Spoilt(), seed=SEED, start=7)
    assert list(islice(resumed, 5)) == found[7:]


class Hopeless:
    def __call__(self, image: dict[str, Any]) -> dict[str, Any]:
        raise OSError("gone")


def test_a_data_set_of_bad_images_is_an_error() -> None:
    with pytest.raises(DataError, match=r"gone.*; \d+ other images in its place are bad, too"):
        batches(1, "DATALOADER.ON_BAD_IMAGE", "drop", mapper=Hopeless())


@pytest.mark.parametrize("mode", ["stop", "drop"])
def test_a_mapper_may_ask_for_another_image(mode: str) -> None:
    """A mapper of detectron2 returns None for this, which is not an error."""
    opts = ("DATALOADER.ON_BAD_IMAGE", mode)
    found = batches(8, *opts, mapper=lambda x: None if x["image_id"] < 4 else draw(x))
    assert min(x["image_id"] for batch in found for x in batch) == 4
    with pytest.raises(DataError, match="None"):
        batches(1, *opts, mapper=lambda x: None)


class Broken:
    def __call__(self, image: dict[str, Any]) -> dict[str, Any]:
        return image["no such key of the programmer"].nothing


def test_a_mistake_in_a_mapper_keeps_its_traceback() -> None:
    with pytest.raises((KeyError, AttributeError)):
        batches(1, mapper=Broken())


class Asleep:
    def __call__(self, image: dict[str, Any]) -> dict[str, Any]:
        time.sleep(2.5)
        return image


def test_a_worker_that_hangs_is_an_error(tmp_path: Path) -> None:
    loader = TrainLoader(
        Samples(DICTS, Asleep(), SEED),
        Batches(TrainingSampler(11, seed=SEED), 1),
        workers=1,
        timeout=1,
    )
    with pytest.raises(RuntimeError, match="timed out"):
        next(iter(loader))


def test_a_worker_says_nothing_of_a_parent_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook shows errors of multiprocessing's thread that sends a batch."""
    shown: list[Any] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, *_: shown.append(kind))
    _start_worker(0)
    for kind in (ConnectionResetError, BrokenPipeError, EOFError, ValueError):
        sys.excepthook(kind, kind(), None)
    assert shown == [ValueError]

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
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from PIL import Image

from distill.config import validate_config
from distill.data.loader import (
    Batches,
    Sample,
    Samples,
    TrainLoader,
    _start_worker,
    build_sampler,
    build_train_loader,
    repeat_factors,
)
from distill.errors import ConfigError, DataError
from tests.support.networks import tiny_cfg

SEED = 7
# Images with portrait and landscape format.
DICTS: list[dict[str, Any]] = [
    {"width": 64 if k % 3 else 32, "height": 48, "image_id": k} for k in range(11)
]
SETS = [("train", DICTS)]


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
    loader = build_train_loader(cfg(*opts), SETS, mapper, seed=SEED, start=start)
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


@pytest.mark.e2e
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


# ---- Samplers.

ANNOTATED = [{**x, "annotations": [{"category_id": int(x["image_id"] > 8)}]} for x in DICTS]
TWO_SETS = [("much", ANNOTATED[:7]), ("rare", ANNOTATED[7:])]
TRAIN = ("DATASETS.TRAIN", ("much", "rare"))
WEIGHTS = ("DATASETS.TRAIN_REPEAT_FACTOR", (("rare", 3.5),))
SAMPLERS: dict[str, tuple[Any, ...]] = {
    "RepeatFactorTrainingSampler": ("DATALOADER.REPEAT_THRESHOLD", 0.9),
    "RandomSubsetTrainingSampler": ("DATALOADER.RANDOM_SUBSET_RATIO", 0.5),
    "WeightedTrainingSampler": WEIGHTS,
    "WeightedCategoryTrainingSampler": (*WEIGHTS, "DATALOADER.REPEAT_THRESHOLD", 0.9),
}


def order(name: str, seed: int, start: int = 0, count: int = 12) -> list[list[int]]:
    """Images of the batches from iteration ``start`` on."""
    config = cfg("DATALOADER.SAMPLER_TRAIN", name, *TRAIN, *SAMPLERS[name])
    validate_sampler(config)
    for x, y in zip(ANNOTATED, DICTS):
        x["file_name"] = y["file_name"]
    loader = build_train_loader(config, TWO_SETS, draw, seed=seed, start=start)
    return [[x["image_id"] for x in batch] for batch in islice(loader, count)]


def validate_sampler(config: CfgNode) -> None:
    for name in config.DATASETS.TRAIN:
        if name not in DatasetCatalog.list():
            DatasetCatalog.register(name, list)
    validate_config(config)


@pytest.mark.parametrize("name", SAMPLERS)
def test_detectron2s_other_samplers_are_functions_of_seed_and_iteration(name: str) -> None:
    expected = order(name, 3)
    assert order(name, 3) == expected
    for start in (1, 7):
        assert order(name, 3, start, 12 - start) == expected[start:]
    if name != "RepeatFactorTrainingSampler":  # detectron2 gives it SEED
        assert order(name, 4) != expected


def test_a_random_subset_is_always_the_same() -> None:
    seen = {x for batch in order("RandomSubsetTrainingSampler", 3, count=30) for x in batch}
    assert len(seen) == 5 < len(DICTS) / 2


@pytest.mark.parametrize("by_category", [False, True])
def test_weights_are_those_of_detectron2(
    by_category: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"Weighted{'Category' if by_category else ''}TrainingSampler"
    config = cfg(*TRAIN, *SAMPLERS[name])
    own = dict(TWO_SETS)
    monkeypatch.setattr(build, "get_detection_dataset_dicts", lambda names, **_: own[names[0]])
    theirs = build._build_weighted_sampler(config, by_category)
    ours = repeat_factors(config, TWO_SETS, by_category)
    assert ours.unique().numel() > 1 and ours.min() == 1
    torch.testing.assert_close(ours, theirs._int_part + theirs._frac_part, rtol=0, atol=1e-6)


def test_an_image_that_was_left_out_is_not_weighted() -> None:
    """detectron2 counts it, and then draws an index that the data set does not have."""
    config = cfg("DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler", *TRAIN, *WEIGHTS)
    sets = [("much", ANNOTATED[:2]), ("rare", [])]
    sampler = build_sampler(config, sets)
    assert {*islice(sampler, 20)} == {0, 1}


UNUSABLE = {
    "no classes": (
        ("DATALOADER.SAMPLER_TRAIN", "WeightedCategoryTrainingSampler"),
        "WeightedCategoryTrainingSampler repeats images with rare classes, but",
    ),
    "empty subset": (
        (
            *("DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"),
            *("DATALOADER.RANDOM_SUBSET_RATIO", 0.05),
        ),
        "RANDOM_SUBSET_RATIO is 0.05, which leaves none of the 11 images; raise it",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_samplers_that_draw_nothing_are_refused(case: str) -> None:
    opts, sentence = UNUSABLE[case]
    with pytest.raises(ConfigError, match=sentence):
        build_sampler(cfg(*opts), SETS)


def test_another_seed_is_another_order() -> None:
    orders = [
        [
            [x["image_id"] for x in b]
            for b in islice(build_train_loader(cfg(), SETS, draw, seed=s), 5)
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


@pytest.mark.e2e
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_with_its_name(workers: int) -> None:
    with pytest.raises(DataError, match=r"Image .*\d+\.png: .*truncated.*ON_BAD_IMAGE") as error:
        batches(3, "DATALOADER.NUM_WORKERS", workers, mapper=Spoilt())
    assert "Traceback" not in str(error.value) and "worker process" not in str(error.value)


@pytest.mark.e2e
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_and_counted(workers: int, caplog: Any) -> None:
    opts = ("DATALOADER.ON_BAD_IMAGE", "drop", "DATALOADER.NUM_WORKERS", workers)
    loader = build_train_loader(cfg(*opts), SETS, Spoilt(), seed=SEED)
    found = list(islice(loader, 12))
    assert {x["image_id"] % 2 for batch in found for x in batch} == {0}
    assert [len(batch) for batch in found] == [4] * 12
    assert all(x.keys() == {*DICTS[0], "numbers"} for batch in found for x in batch)
    assert sorted(loader.left_out) == sorted(x["file_name"] for x in DICTS if x["image_id"] % 2)
    assert "truncated" in loader.left_out[DICTS[1]["file_name"]] and "(5 so far)" in caplog.text
    # A resumed run has the same replacements, because they depend only on the position.
    resumed = build_train_loader(cfg(*opts), SETS, Spoilt(), seed=SEED, start=7)
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


@pytest.mark.e2e
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

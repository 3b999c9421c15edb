"""Augmented samples as functions of seed and position, for any loader; and config keys."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import BoxMode
from detectron2.utils import comm
from PIL import Image

from distill.config import validate_config
from distill.config.resume import takes_effect, training_values
from distill.data.augment.mapper import AugmentingMapper
from distill.data.loader import Batches, Samples, build_train_loader
from distill.engine import Trainer
from distill.engine.setup import scale_to_workers
from distill.engine.trainer import train_mapper
from distill.errors import ConfigError, DataError
from tests.support.networks import tiny_cfg
from tests.support.trainings import Shapes, trainable_cfg

SEED = 5
RTMDET = ("mosaic", "jitter", "hsv", "flip", "mixup")
YOLOX = ("mosaic", "affine", "mixup", "hsv", "flip")
OPTS = ("INPUT.AUGMENT.SIZE", [64, 64], "INPUT.JITTER.SCALE", [0.5, 1.5])
SWITCH = ("INPUT.AUGMENT.LAST_STEPS", ("fit",), "INPUT.AUGMENT.SWITCH_ITER", 3)
SCALES = ("INPUT.MULTI_SCALE.PERIOD", 2, "INPUT.MULTI_SCALE.RANGE", [1, 3])
DICTS: list[dict[str, Any]] = []


@pytest.fixture(scope="module", autouse=True)
def _files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Write noise images of two shapes, with up to three objects and a crowd."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for k in range(11):
        width, height = (64, 48) if k % 3 else (40, 56)
        name = str(folder / f"{k}.png")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(name)
        objects = []
        for j in range(k % 4):
            x, y = 4 + 9 * j, 6 + 7 * j
            polygon = [float(v) for v in (x, y, x + 12, y, x + 12, y + 14, x, y + 14)]
            box = [x, y, x + 12, y + 14]
            row = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": j % 3}
            objects.append({**row, "segmentation": [polygon]})
        crowd = {"bbox": [0, 0, 20, 20], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        objects.append({**crowd, "iscrowd": 1, "segmentation": [[0, 0, 20, 0, 20, 20]]})
        size = {"file_name": name, "width": width, "height": height, "image_id": k}
        DICTS.append({**size, "annotations": objects})
    yield
    DICTS.clear()


def cfg(*opts: Any, steps: Any = RTMDET, family: str = "mask", **kw: Any) -> Any:
    own = ("SOLVER.IMS_PER_BATCH", 4, "DATALOADER.NUM_WORKERS", 0)
    return tiny_cfg(family, *own, *OPTS, "INPUT.AUGMENT.STEPS", steps, *opts, **kw)


def batches(number: int, *opts: Any, start: int = 0, **kw: Any) -> list[Any]:
    config = cfg(*opts, **kw)
    mapper = AugmentingMapper(config, False)
    loader = build_train_loader(config, [("train", DICTS)], mapper, seed=SEED, start=start)
    return list(islice(loader, number))


def content(sample: dict[str, Any]) -> tuple[Any, ...]:
    """All numbers of a sample."""
    truth = sample["instances"]
    polygons = truth.gt_masks.polygons if truth.has("gt_masks") else ()
    masks = [[x.tolist() for x in mask] for mask in polygons]
    labels = truth.gt_boxes.tensor.tolist(), truth.gt_classes.tolist(), masks
    return sample["image_id"], sample["image"].numpy().tobytes(), *labels


def contents(found: list[Any]) -> list[list[Any]]:
    return [[content(x) for x in batch] for batch in found]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [RTMDET, YOLOX])
def test_a_later_start_and_another_cache_change_nothing(steps: Any) -> None:
    expected = contents(batches(7, *SWITCH, *SCALES, steps=steps))
    for start in (2, 4):
        found = contents(batches(7 - start, *SWITCH, *SCALES, steps=steps, start=start))
        assert found == expected[start:]
    assert contents(batches(7, *SWITCH, *SCALES, "INPUT.AUGMENT.CACHE", 0, steps=steps)) == expected
    assert len({x[1] for batch in expected[:3] for x in batch}) == 12


@pytest.mark.e2e
@pytest.mark.parametrize("start", [0, 3])
def test_workers_change_nothing(start: int) -> None:
    expected = contents(batches(7, *SWITCH, *SCALES))
    found = batches(7 - start, *SWITCH, *SCALES, "DATALOADER.NUM_WORKERS", 2, start=start)
    assert contents(found) == expected[start:]


@pytest.mark.parametrize("grouping", [False, True])
def test_the_pipeline_switches_at_its_iteration(grouping: bool) -> None:
    opts = ("DATALOADER.ASPECT_RATIO_GROUPING", grouping)
    found = batches(6, *opts, *SWITCH)
    for sample in (x for batch in found[3:] for x in batch):  # the image fits, and is padded
        assert len(sample["instances"]) == sample["image_id"] % 4
        scale = 64 / max(sample["height"], sample["width"])
        high, wide = round(sample["height"] * scale), round(sample["width"] * scale)
        padding = sample["image"].clone()
        padding[:, :high, :wide] = 114
        assert (padding == 114).all() and (sample["image"] != 114).any()
    strong = batches(6, *opts)
    assert contents(found[:3]) == contents(strong[:3])
    assert contents(found[3:]) != contents(strong[3:])


def test_processes_share_one_stream_and_its_partners(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Samples(DICTS, AugmentingMapper(cfg(*SCALES), False), SEED)
    joint = [s for batch in islice(Batches(TrainingSampler(11, seed=SEED), 4), 4) for s in batch]
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        own = [s for batch in islice(Batches(TrainingSampler(11, seed=SEED), 2), 4) for s in batch]
        assert own == joint[rank::2]
    assert [s.iteration for s in joint] == [k // 4 for k in range(16)]
    assert joint[9].recent == tuple(s.image for s in joint[:9])
    assert content(samples[joint[9]]) == content(samples[joint[9]])


def test_partners_reach_back_40_positions() -> None:
    stream = [s for batch in islice(Batches(TrainingSampler(11, seed=0), 1), 60) for s in batch]
    assert stream[50].recent == tuple(s.image for s in stream[10:50])
    assert stream[0].recent == ()


def test_all_images_of_an_iteration_have_one_size() -> None:
    sizes = [{tuple(x["image"].shape[1:]) for x in batch} for batch in batches(8, *SCALES)]
    assert all(len(x) == 1 for x in sizes)
    assert sizes[::2] == sizes[1::2] and len(set.union(*sizes)) > 1
    for sample in (x for batch in batches(4, *SCALES) for x in batch):
        high, wide = sample["image"].shape[1:]
        assert sample["instances"].image_size == (high, wide)
        boxes = sample["instances"].gt_boxes.tensor
        assert (boxes <= torch.tensor([wide, high] * 2)).all()


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_samples_have_what_networks_read(mask_format: str) -> None:
    found = [x for b in batches(6, "INPUT.MASK_FORMAT", mask_format) for x in b]
    masked = [x["instances"] for x in found if len(x["instances"])]
    assert len(masked) > 12
    for truth in masked:
        tight = truth.gt_masks.get_bounding_boxes().tensor
        slack = 1.01 if mask_format == "bitmask" else 1e-3
        assert ((truth.gt_boxes.tensor - tight).abs() <= slack).all()
    assert all(x["image"].dtype == torch.uint8 and x["image"].is_contiguous() for x in found)
    plain = [x["instances"] for b in batches(2, family="faster") for x in b]
    assert not any(x.has("gt_masks") for x in plain)


def test_a_bad_image_is_no_partner(tmp_path: Path) -> None:
    broken = [{**x} for x in DICTS]
    path = tmp_path / "broken.png"
    path.write_bytes(Path(broken[4]["file_name"]).read_bytes()[:-900])
    broken[4]["file_name"] = str(path)
    config = cfg("DATALOADER.ON_BAD_IMAGE", "drop")
    loaders = [
        build_train_loader(
            config, [("train", broken)], AugmentingMapper(config, False), seed=SEED, start=start
        )
        for start in (0, 3)
    ]
    whole, later = (list(islice(x, n)) for x, n in zip(loaders, (6, 3)))
    assert contents(whole[3:]) == contents(later)
    assert loaders[0].left_out.keys() == {str(path)}
    config = cfg()
    mapper = AugmentingMapper(config, False)
    with pytest.raises(DataError, match=r"Image .*broken\.png"):
        list(islice(build_train_loader(config, [("train", broken)], mapper, seed=SEED), 6))


def test_regions_to_ignore_get_the_mean_color() -> None:
    region = {"bbox": [30, 20, 40, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    rows = [*DICTS[1]["annotations"], {**region, "iscrowd": 1, "ignored": True}]
    entry = {**DICTS[1], "annotations": rows}
    config = cfg("MODEL.PIXEL_MEAN", [10.4, 20, 30], steps=("fit",))
    found = {}
    for name, ignored in (("kept", False), ("painted", True)):
        mapper = AugmentingMapper(config, ignored)
        (sample,) = (
            Samples([entry], mapper, SEED)[s]
            for s in next(iter(Batches(TrainingSampler(1, seed=0), 1)))
        )
        found[name] = sample["image"]
    assert found["painted"][:, 24:38, 32:39].flatten(1).unique(dim=1).squeeze().tolist() == [
        10,
        20,
        30,
    ]
    assert not torch.equal(found["kept"], found["painted"])


def test_the_trainer_chooses_the_mapper() -> None:
    MetadataCatalog.get("augment_regions").ignored_regions = True
    found = train_mapper(cfg("DATASETS.TRAIN", ("augment_regions",)))
    assert isinstance(found, AugmentingMapper) and found.read.ignored_color is not None
    assert not isinstance(train_mapper(tiny_cfg("mask")), AugmentingMapper)


# ---- Config keys.

A = "INPUT.AUGMENT"
WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "name": ((f"{A}.STEPS", ("mosiac", "fit")), "did you mean mosaic"),
    "no size": ((f"{A}.STEPS", ("mosaic", "flip")), "must have one of jitter, affine, fit"),
    "two sizes": ((f"{A}.STEPS", ("fit", "jitter")), "must have one of"),
    "mosaic late": ((f"{A}.STEPS", ("fit", "mosaic")), "mosaic only as the first"),
    "mixup early": ((f"{A}.STEPS", ("mixup", "fit")), "mixup only after"),
    "twice": ((f"{A}.STEPS", ("fit", "hsv", "hsv")), "no step twice"),
    "last": ((f"{A}.STEPS", ("fit",), *SWITCH[:2]), "set both, or leave both"),
    "last name": ((f"{A}.STEPS", ("fit",), f"{A}.LAST_STEPS", ("x",), f"{A}.SWITCH_ITER", 9), "x"),
    "scale without steps": (("INPUT.MULTI_SCALE.PERIOD", 10), "STEPS is empty, but"),
    "crop": ((f"{A}.STEPS", ("fit",), "INPUT.CROP.ENABLED", True), "INPUT.CROP.ENABLED is True"),
    "format": ((f"{A}.STEPS", ("hsv", "fit"), "INPUT.FORMAT", "HSV"), "needs BGR or RGB"),
    "gains": (("INPUT.HSV.MODE", "scale"), r"must be in \[0, 1\]"),
    "range": (("INPUT.JITTER.SCALE", [2.0, 0.1]), "two numbers above 0, rising"),
    "square": ((f"{A}.STEPS", ("fit",), "MODEL.CSPNEXT.SQUARE_PAD", 320), "SQUARE_PAD to 0"),
    "keypoints": ((f"{A}.STEPS", ("fit",), "MODEL.KEYPOINT_ON", True), "keypoints"),
}


@pytest.mark.parametrize("case", WRONG)
def test_steps_that_do_not_work_are_refused(case: str) -> None:
    opts, sentence = WRONG[case]
    with pytest.raises(ConfigError, match=sentence):
        validate_config(tiny_cfg("faster", *opts), training=False)


@pytest.mark.parametrize("family", ["semantic", "panoptic"])
def test_semantic_labels_are_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="semantic labels"):
        validate_config(cfg(family=family), training=False)


def test_a_resume_may_move_the_switch_and_resize_the_cache() -> None:
    assert takes_effect(f"{A}.SWITCH_ITER") and not takes_effect(f"{A}.STEPS")
    values = training_values(cfg())
    assert f"{A}.CACHE" not in values and values[f"{A}.STEPS"] == list(RTMDET)


def test_the_switch_is_scaled_to_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    opts = ("SOLVER.REFERENCE_WORLD_SIZE", 1, "SOLVER.MAX_ITER", 60, "SOLVER.STEPS", ())
    scaled = scale_to_workers(cfg(*opts, f"{A}.LAST_STEPS", ("fit",), f"{A}.SWITCH_ITER", 40))
    assert scaled.INPUT.AUGMENT.SWITCH_ITER == 20


@pytest.mark.e2e
@pytest.mark.parametrize("family", ["mask", "retinanet", "rtmdet_ins"])
def test_a_training_with_every_step(family: str, tmp_path: Path, shapes: Shapes) -> None:
    opts = (*OPTS, *SCALES, f"{A}.STEPS", RTMDET, *SWITCH, "SOLVER.MAX_ITER", 5)
    config = trainable_cfg(family, shapes, tmp_path, *opts, "TEST.EVAL_PERIOD", 0)
    validate_config(config)
    trainer = Trainer(config)
    trainer.train()
    assert trainer.iter == 5
